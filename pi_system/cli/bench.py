"""``pi-bench``: measure private inference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from ..backends import DEFAULT
from . import common


@click.group(epilog=common.EXIT_CODES)
def cli() -> None:
    """Measure private inference: latency, bytes, round trips and agreement with plaintext.

    \b
    Example:
      pi-bench run --model demo --images 20 --predictions
    """


_model = click.option(
    "--model", default="demo", show_default=True,
    help="demo, demo-teacher, random:ARCH@RELUS (random:resnet18@49600, @all) or a path.",
)  # fmt: skip
_batch = click.option(
    "--batch", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Images per inference.",
)  # fmt: skip
_threads = click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Threads per party, and of plaintext.",
)  # fmt: skip
_device = click.option(
    "--device", default="cpu", show_default=True, help="Torch device of server and dealer."
)
_network = click.option(
    "--network", default="loopback", show_default=True, metavar="NAME",
    help="Emulated links: loopback, lan, wan or RTT:MBPS[:LOSS] (ms, Mbit/s, fraction).",
)  # fmt: skip
_timeout = click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=8.0, show_default=True,
    help="Seconds a party may be silent within a protocol step.",
)  # fmt: skip
_agreement = click.option(
    "--agreement", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="Trained models: least fraction of answers equal to plaintext's (else exit code 4).",
)  # fmt: skip
_tolerance = click.option(
    "--tolerance", type=click.FloatRange(min=0), default=None,
    help="Random models: largest logit error (else exit code 4). [default: what the backend's "
    "plan states, or 0.1]",
)  # fmt: skip


@cli.command()
@_model
@click.option("--backend", default=DEFAULT, show_default=True, help="Backend to measure.")
@click.option(
    "--images", type=click.IntRange(1, 100_000), default=None,
    help="Number of images: the bundled ones where they fit the model, else random. [default: 1]",
)  # fmt: skip
@click.option(
    "--images-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Images of your own: .npy (N, C, H, W) of normalised float32 or raw uint8, or .bin as "
    "CIFAR's binary version comes, with its labels.",
)  # fmt: skip
@click.option(
    "--labels-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npy",
    help="Their labels, (N,) integers.",
)  # fmt: skip
@common.plan_option
@click.option(
    "--repeat", type=click.IntRange(1), default=5, show_default=True,
    help="At least so many inferences; every image is classified once in any case.",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(0), default=1, show_default=True,
    help="Inferences before these that are not counted.",
)  # fmt: skip
@_batch
@_threads
@_device
@_network
@_timeout
@_agreement
@_tolerance
@click.option("--predictions", is_flag=True, help="List every image's predictions in the table.")
@click.option("--layers", is_flag=True, help="List every layer's bytes and times in the table.")
@common.output_options
def run(
    model: str,
    backend: str,
    images: int | None,
    images_file: Path | None,
    labels_file: Path | None,
    plan: str,
    repeat: int,
    warmup: int,
    batch: int,
    threads: int,
    device: str,
    network: str,
    timeout: float,
    agreement: float,
    tolerance: float | None,
    predictions: bool,
    layers: bool,
    format_: str,
    output: Path | None,
) -> None:
    """Run server, client and dealer on this machine and measure an inference.

    Plaintext torch is timed in the same run, before and after. Exit code 4 when the private
    answers are not plaintext's.

    \b
    Examples:
      pi-bench run --model demo --images 20 --predictions
      pi-bench run --model random:resnet18@49600 --format json --output result.json
      pi-bench run --images-file cifar-100-binary/test.bin --agreement 0.99 --plan high
    """
    from ..errors import UsageError
    from ..net import link

    common.check_output(output)
    link.parse(network)
    if images is not None and images_file is not None:
        raise UsageError("give --images or --images-file, not both")
    if labels_file is not None and images_file is None:
        raise UsageError("--labels-file goes with --images-file")
    from ..backends import base

    base.check(backend)
    from ..bench.measure import Measurement, measure
    from ..bench.parity import check_parity, is_trained
    from ..bench.schema import flatten
    from ..bench.table import print_result
    from ..models import images as model_images
    from ..models import resolve
    from ..parties.timeouts import Timeouts

    graph = resolve(model)
    if images_file is None:
        array, labels = model_images(graph, images or batch)
    else:
        array, labels = _own_images(images_file, labels_file, graph)
    result = measure(
        Measurement(
            model=model,
            graph=graph,
            backend=backend,
            images=array,
            labels=labels,
            batch=batch,
            threads=threads,
            device=device,
            network=network,
            repeat=repeat,
            warmup=warmup,
            timeouts=Timeouts(step=timeout),
            plan=plan,
            every=predictions,
        ),
        progress=_progress,
    )
    value = result.to_json()
    common.emit(
        value,
        format_=format_,
        output=output,
        table=lambda console: print_result(console, result, predictions=predictions, layers=layers),
        rows=lambda: [flatten(value)],
    )
    _warn(result.stability.warnings, format_, output)
    trained = is_trained(result.model.dataset)
    check_parity(result.accuracy, trained=trained, agreement=agreement, tolerance=tolerance)


@cli.command()
@_model
@click.option(
    "--contender", "contenders", multiple=True, metavar="NAME",
    help="A backend, or one with -all behind (crypten-all): on the version of the model that "
    "keeps every ReLU. Again for more. [default: fss, crypten, crypten-all]",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True,
    help="Every contender runs once in each, with new processes.",
)  # fmt: skip
@click.option(
    "--repeat", type=click.IntRange(1), default=4, show_default=True,
    help="Inferences of each contender in a round.",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(0), default=1, show_default=True,
    help="Inferences before these, in each round, that are not counted.",
)  # fmt: skip
@_batch
@_threads
@_device
@_network
@_timeout
@_agreement
@_tolerance
@common.output_options
def compare(
    model: str,
    contenders: tuple[str, ...],
    rounds: int,
    repeat: int,
    warmup: int,
    batch: int,
    threads: int,
    device: str,
    network: str,
    timeout: float,
    agreement: float,
    tolerance: float | None,
    format_: str,
    output: Path | None,
) -> None:
    """Measure several backends beside plaintext, in turns, so that their ratios hold.

    Ratios are taken in each round and given as median, least and largest. What cannot run is
    listed with the reason. Exit code 4 when private answers are not plaintext's.

    \b
    Examples:
      pi-bench compare --model demo
      pi-bench compare --model random:resnet18@49600 --format json --output compare.json
    """
    common.check_output(output)
    from ..bench.compare import DEFAULT as ALL
    from ..bench.compare import Plan, check_answers
    from ..bench.compare import compare as run_comparison
    from ..bench.comparison_table import print_comparison
    from ..bench.schema import flatten
    from ..parties.timeouts import Timeouts
    from .progress import Progress

    plan = Plan(
        model=model,
        contenders=contenders or ALL,
        rounds=rounds,
        repeat=repeat,
        warmup=warmup,
        batch=batch,
        threads=threads,
        device=device,
        network=network,
        timeouts=Timeouts(step=timeout),
    )
    with Progress() as progress:
        comparison = run_comparison(plan, progress=progress)
    value = comparison.to_json()
    common.emit(
        value,
        format_=format_,
        output=output,
        table=lambda console: print_comparison(console, comparison),
        rows=lambda: [flatten(contender) for contender in value["contenders"]],
    )
    _warn(comparison.stability.warnings, format_, output)
    check_answers(comparison, agreement=agreement, tolerance=tolerance)


@cli.command()
@click.argument("scenario", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="The table: .csv, .parquet (needs pyarrow) or .json (raw values and layers too). "
    "Rows it has are not measured again.",
)  # fmt: skip
@_timeout
@click.option(
    "--format", "format_", type=click.Choice(common.FORMATS), default="table", show_default=True,
    help="Shape in which the finished table is printed on stdout.",
)  # fmt: skip
def sweep(scenario: Path, output: Path, timeout: float, format_: str) -> None:
    """Measure every combination that a TOML file lists, into one table.

    Each row is written as soon as it is measured; a sweep that was stopped goes on where it
    was when it is called again. A row that fails does not stop the others; the exit code is
    its own then.

    \b
    Example:
      pi-bench sweep benchmarks/scenarios/relus.toml --output relus.csv
    """
    common.check_output(output)
    from ..bench.sheet import Sheet
    from ..bench.sweep import read_scenario
    from ..bench.sweep import sweep as run_sweep
    from ..bench.sweep_table import print_rows
    from ..parties.timeouts import Timeouts
    from .progress import Progress

    cases = read_scenario(scenario)
    sheet = Sheet(output)
    with Progress() as progress:
        outcome = run_sweep(cases, sheet, timeouts=Timeouts(step=timeout), progress=progress)
    rows = sheet.tidy_rows()
    common.emit(
        rows,
        format_=format_,
        output=None,
        table=lambda console: print_rows(console, rows),
        rows=lambda: rows,
    )
    click.echo(f"{outcome.measured} measured, {outcome.skipped} were there", err=True)
    for case, error in outcome.failures:
        click.echo(f"not measured: {case}: {error}", err=True)
    if outcome.failures:
        raise outcome.failures[0][1]


@cli.command()
@common.output_options
def env(format_: str, output: Path | None) -> None:
    """Describe this machine and the software, as results record it.

    \b
    Example:
      pi-bench env --format json
    """
    from ..bench.environment import describe
    from ..bench.schema import flatten

    common.check_output(output)
    value = describe()

    def table(console: Any) -> None:
        for key, item in value.items():
            for name, text in (flatten(item, key) or {key: " ".join(map(str, item))}).items():
                console.print(f"{name:<32} {'-' if text is None else text}", markup=False)

    common.emit(value, format_=format_, output=output, table=table, rows=lambda: [flatten(value)])


@cli.command()
@click.argument("before", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--threshold", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="Growth that still counts as none.",
)  # fmt: skip
@common.output_options
def regress(before: Path, after: Path, threshold: float, format_: str, output: Path | None) -> None:
    """Compare two results of one measurement on like machines: is the second worse?

    A slowdown counts if it is larger than the threshold and significant (permutation test on
    the raw values, 1 %); bytes and round trips are exact. Exit code 3 if anything is worse.

    \b
    Example:
      pi-bench run --repeat 30 --format json --output before.json
      pi-bench run --repeat 30 --format json --output after.json
      pi-bench regress before.json after.json
    """
    from dataclasses import asdict

    from ..bench.regress import compare as compare_results
    from ..bench.regress import print_changes, read
    from ..errors import BudgetError

    common.check_output(output)
    changes = compare_results(read(before), read(after), threshold=threshold)
    rows = [asdict(change) for change in changes]
    common.emit(
        rows,
        format_=format_,
        output=output,
        table=lambda console: print_changes(console, changes),
        rows=lambda: rows,
    )
    worse = [change for change in changes if change.worse]
    if worse:
        raise BudgetError(
            "worse than before: "
            + ", ".join(f"{change.figure} x {change.ratio:.2f}" for change in worse)
        )


def main() -> NoReturn:
    """Entry point of ``pi-bench``."""
    sys.exit(common.run(cli))


def _warn(warnings: list[str], format_: str, output: Path | None) -> None:
    """On stderr, unless the table has said it."""
    if format_ != "table" or output is not None:
        for warning in warnings:
            click.echo(f"unstable: {warning}", err=True)


def _own_images(path: Path, labels_file: Path | None, graph: Any) -> Any:
    """Normalised images, and their labels or None."""
    from ..errors import UsageError
    from ..parties.images import normalise, read_cifar, read_images, read_labels

    labels = None
    try:
        with open(path, "rb") as file:
            if path.suffix == ".bin":
                images, labels = read_cifar(file, name=str(path))
            else:
                images = read_images(file, name=str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if labels_file is not None:
        labels = read_labels(labels_file, len(images))
    classes = graph.output.shape[0]
    if labels is not None and not ((labels >= 0) & (labels < classes)).all():
        raise UsageError(f"a label is outside 0 to {classes - 1}, the model's classes")
    return normalise(images, graph.metadata, graph.input.shape), labels


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"{text} ...", err=True)


if __name__ == "__main__":
    main()
