"""``pi-train``: training, its stages, sweeps and evaluation from the command line."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import sys
import tempfile
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
from pi_system.bench import cost
from pi_system.checkpoint import write_atomic
from pi_system.errors import PiError, UsageError

from . import allocate as allocate_module
from . import data as data_module
from . import distill, search
from . import evaluate as evaluate_module
from . import network as network_module
from . import pictures as pictures_module
from . import recipe as recipe_module
from . import report as report_module
from . import senet as senet_module
from . import sensitivity as sensitivity_module
from . import smoke as smoke_module
from . import sweep as sweep_module
from . import teacher as teacher_module
from .loop import Reporter, Row, Run, derive_seed
from .ranks import Ranks, joined
from .recipe import Recipe

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
    if not Ranks.here().first:
        return
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


_DATA = click.option(
    "--data",
    "data_path",
    required=True,
    type=click.Path(path_type=Path),
    help="The data set's official archive or its unpacked folder.",
)
_DIRECTORY = click.option(
    "--run",
    "directory",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of this run; a run that was stopped goes on from it.",
)
_SHARED = click.option(
    "--shared",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of teacher and sensitivities, if several runs share them.",
)
_THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads in place of the recipe's; results repeat up to rounding alone.",
)
_PICTURES = click.option(
    "--pictures/--no-pictures",
    default=False,
    help="Draw the stage's output beside it (needs matplotlib).",
)


def _run_options(command: F) -> F:
    for option in (_THREADS, _SHARED, _DIRECTORY, _DATA):
        command = option(command)
    return click.option(
        "--recipe",
        "recipe_name",
        required=True,
        metavar="NAME|PATH",
        help="A bundled recipe or a .toml file.",
    )(command)


def _open(recipe_name: str, **where: Any) -> Run:
    return _run(recipe_module.load(recipe_name), **where)


def _run(
    chosen: Recipe, data_path: Path, directory: Path, shared: Path | None, threads: int | None
) -> Run:
    ranks = click.get_current_context().with_resource(joined())
    level = logging.INFO if ranks.first else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    reporter = Reporter()
    if ranks.first:
        reporter = BarReporter() if sys.stderr.isatty() else LineReporter()
    dataset = data_module.load(chosen.dataset, data_path)
    return Run(directory, chosen, dataset, reporter, shared, ranks, threads or 0)


@click.group(cls=Group)
def cli() -> None:
    """Train networks with few ReLUs (SENet and its rivals) from your own copy of a data set.

    \b
    Bundled recipes:
      quick                  ResNet-10 of width 8 on CIFAR-10, minutes on a CPU
      cifar100-resnet10-w16  the measured comparison, see sweep
      cifar100-resnet18-w16  the bundled demo, about an hour on two CPU cores
      DATA-NETWORK           full width and length; see smoke for what they take. DATA is
                             cifar10, cifar100, tiny-imagenet or imagenet, NETWORK resnet18,
                             resnet34, wrn22-8 or vgg16

    \b
    The stages one by one, each with its output file (and picture) in the run directory:
      teacher, sensitivity, allocate, masks, finetune; senet runs them all.
    """


@cli.command()
@_run_options
@_output_options
def teacher(output_format: str, output: Path | None, **where: Any) -> None:
    """Train the all-ReLU teacher alone; its checkpoint is RUN/teacher.

    \b
    Example:
      pi-train teacher --recipe quick --data cifar-10-binary.tar.gz --run runs/quick
    """
    run = _open(**where)
    teacher_module.train(run)
    result = senet_module.figures(run.folder("teacher") / teacher_module.FOLDER)
    emit([asdict(result)], output_format, output)


@cli.command()
@_run_options
@_PICTURES
@_output_options
def sensitivity(pictures: bool, output_format: str, output: Path | None, **where: Any) -> None:
    """Measure the ReLU sensitivity of each layer by sparse training: RUN/sensitivity.json.

    The picture, RUN/sensitivity.png, has ResNet-18's published profile beside it.

    \b
    Example:
      pi-train sensitivity --recipe quick --data cifar-10-binary.tar.gz --run runs/quick
    """
    run = _open(**where)
    sensitivity_module.run_stage(run)
    document = run.read_json(sensitivity_module.OUTPUT, "sensitivity")
    assert document is not None
    if pictures:
        pictures_module.sensitivity(document, run.folder("sensitivity") / "sensitivity.png")
    shown = ("site", "parameters", "parameters_kept", "eta_theta", "eta_alpha")
    emit([{k: layer[k] for k in shown} for layer in document["layers"]], output_format, output)


def _milliseconds(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
    if text is None:
        return None
    number, scale = (text[:-2], 1) if text.endswith("ms") else (text.removesuffix("s"), 1000)
    try:
        value = float(number) * scale
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{text!r} is no time; give 400ms or 0.4s")
    return value


@cli.command()
@_run_options
@_PICTURES
@click.option(
    "--target-latency",
    "target",
    callback=_milliseconds,
    metavar="TIME",
    help="Choose the budget too: the best layer budgets with this online latency (400ms, 0.4s).",
)
@click.option("--network", default="wan", show_default=True, help="As in pi-bench run.")
@click.option(
    "--measured",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Results of pi-bench run on loopback of this network, at least two ReLU counts.",
)
@_output_options
def allocate(
    pictures: bool,
    target: float | None,
    network: str,
    measured: tuple[Path, ...],
    output_format: str,
    output: Path | None,
    **where: Any,
) -> None:
    """Divide the budget over the layers: RUN/allocation.json, RUN/allocation.png.

    With --target-latency the result is RUN/network.json: which layers to empty, each of which
    saves a round trip, and what the others keep. Put it into a recipe as allocate.rule "given".

    \b
    Examples:
      pi-train allocate --recipe quick --data cifar-10-binary.tar.gz --run runs/quick
      pi-train allocate --recipe quick --data cifar-10-binary.tar.gz --run runs/quick \\
          --target-latency 300ms --network wan --measured few.json --measured all.json
    """
    run = _open(**where)
    if target is not None:
        document = network_module.run_stage(run, cost.load(measured), network, target)
        name = network_module.OUTPUT
    else:
        senet_module.measure(run)
        found = run.read_json(allocate_module.OUTPUT, "masks")
        assert found is not None
        document, name = found, allocate_module.OUTPUT
        if document["rule"] == "search":
            raise UsageError("allocate.rule is search: pi-train masks finds the budgets")
    if pictures:
        pictures_module.budgets(document, (run.directory / name).with_suffix(".png"))
    emit(document["layers"], output_format, output)


@cli.command()
@_run_options
@_PICTURES
@_output_options
def masks(pictures: bool, output_format: str, output: Path | None, **where: Any) -> None:
    """Find the positions that keep their ReLU: RUN/masks.json, RUN/masks.safetensors.

    The pictures are RUN/masks.png, RUN/hamming.png and RUN/layers.png.

    \b
    Example:
      pi-train masks --recipe quick --data cifar-10-binary.tar.gz --run runs/quick --pictures
    """
    run = _open(**where)
    _, found = senet_module.find_masks(run)
    document = run.read_json(search.OUTPUT, "masks")
    assert document is not None
    if pictures:
        pictures_module.masks(found, run.directory / "masks.png")
        pictures_module.hamming(document["hamming"], run.directory / "hamming.png")
        pictures_module.budgets(document, run.directory / "layers.png")
    emit(document["layers"], output_format, output)


@cli.command()
@_run_options
@_PICTURES
@_output_options
def finetune(pictures: bool, output_format: str, output: Path | None, **where: Any) -> None:
    """Fine-tune with frozen masks: the checkpoint RUN/student. The test split stays unread.

    With [widths] in the recipe (SENet++) each width is a checkpoint of its own, such as
    RUN/student-0.5, and the picture is RUN/widths.png: accuracy against ReLUs and operations.

    \b
    Example:
      pi-train finetune --recipe quick --data cifar-10-binary.tar.gz --run runs/quick
    """
    run = _open(**where)
    distill.run_stage(run, *senet_module.find_masks(run))
    results = [senet_module.figures(directory) for directory in senet_module.students(run)]
    if pictures:
        pictures_module.widths(results, run.directory / "widths.png")
    emit([asdict(result) for result in results], output_format, output)


@cli.command()
@_run_options
@_PICTURES
@_output_options
def senet(pictures: bool, output_format: str, output: Path | None, **where: Any) -> None:
    """Train teacher and student: all stages, then the test accuracy.

    Stages that RUN already holds are skipped. The checkpoints are RUN/teacher and RUN/student,
    with [widths] in the recipe also those of finetune; the test split is read once, at the end.

    \b
    Example:
      pi-train senet --recipe quick --data cifar-10-binary.tar.gz --run runs/quick --format json
    """
    run = _open(**where)
    results = senet_module.train(run)
    if pictures:
        pictures_module.widths(results[1:], run.directory / "widths.png")
    emit([asdict(result) for result in results], output_format, output)


@cli.command()
@click.option("--recipe", "recipe_name", required=True, metavar="NAME|PATH")
@click.option("--steps", type=click.IntRange(2), default=3, show_default=True, help="Per epoch.")
@click.option("--batch", type=click.IntRange(2), help="Images per step; the recipe's by default.")
@_output_options
def smoke(
    recipe_name: str, steps: int, batch: int | None, output_format: str, output: Path | None
) -> None:
    """Try a recipe on random images: each stage for a few steps, with no data set at hand.

    Shows whether the recipe fits this machine, how fast each stage trains, and, at the recipe's
    own batch, about how many hours its epochs would take.

    \b
    Example:
      pi-train smoke --recipe imagenet-resnet18 --batch 4
    """
    chosen = recipe_module.load(recipe_name)
    with tempfile.TemporaryDirectory() as directory:
        paces = smoke_module.run(chosen, Path(directory), steps=steps, batch=batch)
    emit([asdict(pace) for pace in paces], output_format, output)


@cli.command()
@click.argument("path", metavar="SWEEP.toml", type=click.Path(path_type=Path))
@_DATA
@_DIRECTORY
@_SHARED
@click.option(
    "--results",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that gets one JSON file per finished student.",
)
@_THREADS
@_output_options
def sweep(
    path: Path,
    data_path: Path,
    directory: Path,
    shared: Path | None,
    results: Path,
    threads: int | None,
    output_format: str,
    output: Path | None,
) -> None:
    """Train the students of SWEEP.toml (methods x budgets x seeds) that have no result yet.

    One teacher and one sensitivity measurement serve them all. A sweep that was stopped goes on
    where it was. Start it several times, with few --threads each, to train students side by side.

    \b
    Example:
      pi-train sweep benchmarks/senet.toml --data cifar-100-binary.tar.gz \\
          --run runs/sweep --results benchmarks/results/senet
    """
    jobs = sweep_module.load(path)
    base = _run(jobs[0].recipe, data_path, directory, shared or directory / "shared", threads)
    for _ in sweep_module.run(jobs, base, results):
        pass
    shown = ("method", "relu_kept", "seed", "validation_accuracy", "test_accuracy")
    found = [sweep_module.stored(job, results) for job in jobs]
    emit([{k: r[k] for k in shown} for r in found if r is not None], output_format, output)


@cli.command()
@click.argument("results", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--sweep",
    "sweep_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Report the students of this SWEEP.toml alone, those without a result too.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Markdown file.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Picture: .svg or .png."
)
def report(results: Path, sweep_path: Path | None, output: Path | None, plot: Path | None) -> None:
    """Make the Markdown table and the plot of a sweep's RESULTS folder.

    A sweep need not be finished: students without a result are marked.

    \b
    Example:
      pi-train report benchmarks/results/senet --sweep benchmarks/senet.toml \\
          --plot benchmarks/results/senet/accuracy.svg
    """
    found = report_module.load(results, sweep_module.load(sweep_path) if sweep_path else ())
    text = report_module.table(found)
    if plot is not None:
        report_module.plot(found, plot)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_atomic(output, text.encode())


@cli.command()
@click.argument("directory", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@_DATA
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
