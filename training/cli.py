"""``pi-train``: the teacher, SENet and evaluation from the command line."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pi_system import checkpoint
from pi_system.checkpoint import write_atomic
from pi_system.errors import PiError, UsageError
from pi_system.nn import count_relus

from . import data as data_module
from . import evaluate as evaluate_module
from . import recipe as recipe_module
from . import senet as senet_module
from . import teacher as teacher_module
from .loop import Reporter, Row, Run, derive_seed

F = TypeVar("F", bound=Callable[..., None])


class Group(click.Group):
    """Turns an error of this project into one line on stderr and its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except PiError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(PiError.exit_code)


class LineReporter(Reporter):
    """One line per epoch on stderr."""

    def epoch(self, row: Row) -> None:
        click.echo(describe(row), err=True)


class BarReporter(Reporter):
    """A progress bar per stage, with its remaining time, on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def begin(self, stage: str, epochs: int, done: int) -> None:
        if done == epochs:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            console=self._console,
        )
        self._task = self._progress.add_task(stage, total=1.0, loss=float("nan"))
        self._progress.update(self._task, completed=done / epochs)
        self._progress.start()

    def step(self, stage: str, fraction: float, loss: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=fraction, loss=loss)

    def epoch(self, row: Row) -> None:
        self._console.print(describe(row), highlight=False)

    def end(self, stage: str) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(row: Row) -> str:
    """One epoch on one line."""
    parts = [
        f"{row.stage} {row.epoch}/{row.epochs}",
        f"lr {row.lr:.4f}",
        f"loss {row.loss:.4f}",
        f"train {row.train_accuracy:.2%}",
    ]
    if row.validation_accuracy is not None:
        parts.append(f"validation {row.validation_accuracy:.2%}")
    if row.hamming is not None:
        parts.append(f"hamming {row.hamming:.4f}")
    return "  ".join([*parts, f"{row.seconds:.0f} s"])


def emit(rows: Sequence[dict[str, Any]], output_format: str, output: Path | None) -> None:
    """Write ``rows`` as a table, JSON list or CSV to ``output``, or to stdout."""
    if output_format == "json":
        text = json.dumps(list(rows), indent=2) + "\n"
    elif output_format == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    else:
        table = Table(*(name.replace("_", " ") for name in rows[0]))
        for row in rows:
            table.add_row(*(_cell(name, value) for name, value in row.items()))
        console = Console(file=io.StringIO(), width=200)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        text = "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())
    if output is None:
        click.echo(text, nl=False)
    else:
        write_atomic(output, text.encode())


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if name.endswith("accuracy") else str(value)


def _output_options(command: F) -> F:
    command = click.option(
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the figures to this file instead of stdout.",
    )(command)
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
    )(command)


def _run_options(command: F) -> F:
    command = click.option(
        "--run",
        "directory",
        required=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Directory of this run; a run that was stopped goes on from it.",
    )(command)
    command = click.option(
        "--data",
        "data_path",
        required=True,
        type=click.Path(path_type=Path),
        help="The data set's official archive or its unpacked folder.",
    )(command)
    return click.option(
        "--recipe",
        "recipe_name",
        required=True,
        metavar="NAME|PATH",
        help="A bundled recipe or a .toml file.",
    )(command)


def _open(recipe_name: str, data_path: Path, directory: Path) -> Run:
    chosen = recipe_module.load(recipe_name)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    reporter: Reporter = BarReporter() if sys.stderr.isatty() else LineReporter()
    return Run(directory, chosen, data_module.load(chosen.dataset, data_path), reporter)


@click.group(cls=Group)
def cli() -> None:
    """Train networks with few ReLUs (SENet) from your own copy of a data set.

    \b
    Bundled recipes:
      quick                  ResNet-10 of width 8 on CIFAR-10, minutes on a CPU
      cifar100-resnet18-w16  the bundled demo, about an hour on two CPU cores
      cifar10-resnet18, cifar100-resnet18, cifar100-wrn22-8, cifar10-vgg16
                             the paper's schedules; use a GPU-class machine or patience
    """


@cli.command()
@_run_options
@_output_options
def teacher(
    recipe_name: str, data_path: Path, directory: Path, output_format: str, output: Path | None
) -> None:
    """Train the all-ReLU teacher alone; its checkpoint is RUN/teacher.

    \b
    Example:
      pi-train teacher --recipe quick --data cifar-10-binary.tar.gz --run runs/quick
    """
    run = _open(recipe_name, data_path, directory)
    count = count_relus(teacher_module.train(run))
    manifest = checkpoint.load(directory / teacher_module.FOLDER)[1]
    result = senet_module.Result(
        teacher_module.FOLDER,
        count.kept,
        count.total,
        manifest.validation_accuracy,
        manifest.test_accuracy,
    )
    emit([asdict(result)], output_format, output)


@cli.command()
@_run_options
@_output_options
def senet(
    recipe_name: str, data_path: Path, directory: Path, output_format: str, output: Path | None
) -> None:
    """Train teacher and student: sensitivity, layer budgets, masks, fine-tuning.

    Stages that RUN already holds are skipped. The checkpoints are RUN/teacher and RUN/student;
    the test split is read once, at the end.

    \b
    Example:
      pi-train senet --recipe quick --data cifar-10-binary.tar.gz --run runs/quick --format json
    """
    results = senet_module.train(_open(recipe_name, data_path, directory))
    emit([asdict(result) for result in results], output_format, output)


@cli.command()
@click.argument("directory", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    required=True,
    type=click.Path(path_type=Path),
    help="The data set's official archive or its unpacked folder.",
)
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME|PATH",
    help="The recipe the network was trained with; needed for the validation split.",
)
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    default="test",
    show_default=True,
)
@_output_options
def evaluate(
    directory: Path,
    data_path: Path,
    recipe_name: str | None,
    split: str,
    output_format: str,
    output: Path | None,
) -> None:
    """Measure the accuracy of the CHECKPOINT folder and count its ReLUs.

    \b
    Example:
      pi-train evaluate runs/quick/student --data cifar-10-binary.tar.gz
    """
    dataset = data_module.load(checkpoint.load(directory)[1].dataset, data_path)
    images = dataset.test
    if split == "validation":
        if recipe_name is None:
            raise UsageError("the validation split depends on the recipe; give --recipe")
        chosen = recipe_module.load(recipe_name)
        seed = derive_seed(chosen.seed, "split", 0)
        images = data_module.split(dataset.train, chosen.validation, seed)[1]
    result = evaluate_module.evaluate(directory, dataset, images, split)
    emit([asdict(result)], output_format, output)


def main() -> None:
    """The ``pi-train`` command."""
    cli(prog_name="pi-train")


if __name__ == "__main__":
    main()
