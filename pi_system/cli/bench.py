"""``pi-bench``: measure private inference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from . import common


@click.group(epilog=common.EXIT_CODES)
def cli() -> None:
    """Measure private inference: latency, bytes, round trips and agreement with plaintext.

    \b
    Example:
      pi-bench run --model demo --images 20 --predictions
    """


@cli.command()
@click.option(
    "--model", default="demo", show_default=True,
    help="demo, demo-teacher, random:ARCH@RELUS (random:resnet18@49600, @all) or a path.",
)  # fmt: skip
@click.option("--backend", default="crypten", show_default=True, help="Backend to measure.")
@click.option(
    "--images", type=click.IntRange(1, 100_000), default=None,
    help="Number of images: the bundled ones where they fit the model, else random. [default: 1]",
)  # fmt: skip
@click.option(
    "--images-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npy",
    help="Images of your own, (N, C, H, W): normalised float32, or raw uint8.",
)  # fmt: skip
@click.option(
    "--repeat", type=click.IntRange(1), default=5, show_default=True,
    help="At least so many inferences; every image is classified once in any case.",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(0), default=1, show_default=True,
    help="Inferences before these that are not counted.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Images per inference.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Threads per party, and of plaintext.",
)  # fmt: skip
@click.option(
    "--device", default="cpu", show_default=True, help="Torch device of server and dealer."
)
@click.option(
    "--network", default="loopback", show_default=True, metavar="NAME",
    help="Emulated links: loopback, lan, wan or RTT:MBPS[:LOSS] (ms, Mbit/s, fraction).",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=8.0, show_default=True,
    help="Seconds a party may be silent within a protocol step.",
)  # fmt: skip
@click.option(
    "--agreement", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="Trained models: least fraction of answers equal to plaintext's (else exit code 4).",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.1, show_default=True,
    help="Random models: largest logit error (else exit code 4).",
)  # fmt: skip
@click.option("--predictions", is_flag=True, help="List every image's predictions in the table.")
@click.option("--layers", is_flag=True, help="List every layer's bytes and times in the table.")
@common.output_options
def run(
    model: str,
    backend: str,
    images: int | None,
    images_file: Path | None,
    repeat: int,
    warmup: int,
    batch: int,
    threads: int,
    device: str,
    network: str,
    timeout: float,
    agreement: float,
    tolerance: float,
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
    """
    from ..errors import UsageError

    common.check_output(output)
    from ..net import link

    link.parse(network)
    if images is not None and images_file is not None:
        raise UsageError("give --images or --images-file, not both")
    from ..backends import base

    base.check(backend)
    from ..bench.measure import Measurement, check_parity, measure
    from ..bench.schema import flatten
    from ..bench.table import print_result
    from ..models import images as model_images
    from ..models import resolve
    from ..parties.timeouts import Timeouts

    graph = resolve(model)
    if images_file is None:
        array, labels = model_images(graph, images or batch)
    else:
        array, labels = _own_images(images_file, graph), None
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
    if format_ != "table" or output is not None:
        for warning in result.stability.warnings:
            click.echo(f"unstable: {warning}", err=True)
    trained = graph.metadata.get("dataset") not in (None, "random")
    check_parity(result, trained=trained, agreement=agreement, tolerance=tolerance)


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


def _own_images(path: Path, graph: Any) -> Any:
    from ..errors import UsageError
    from ..parties.images import normalise, read_images

    try:
        with open(path, "rb") as file:
            images = read_images(file, name=str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return normalise(images, graph.metadata, graph.input.shape)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"{text} ...", err=True)


if __name__ == "__main__":
    main()
