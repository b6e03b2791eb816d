"""``pi-bench run``: measure one backend on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...backends import DEFAULT
from .. import common
from . import options


@click.command()
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
@options.setting(
    repeat=5,
    repeat_help="At least so many inferences; every image is classified once in any case.",
    warmup_help="Inferences before these that are not counted.",
)
@click.option("--predictions", is_flag=True, help="List every image's predictions in the table.")
@click.option("--layers", is_flag=True, help="List every layer's bytes and times in the table.")
@common.output_options
def run(
    setting: options.Setting,
    backend: str,
    images: int | None,
    images_file: Path | None,
    labels_file: Path | None,
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
    from ...errors import UsageError
    from ...net import link

    common.check_output(output)
    link.parse(setting.network)
    if images is not None and images_file is not None:
        raise UsageError("give --images or --images-file, not both")
    if labels_file is not None and images_file is None:
        raise UsageError("--labels-file goes with --images-file")
    from ...backends import base

    base.check(backend)
    from ...bench.measure import Measurement, measure
    from ...bench.parity import check_parity, is_trained
    from ...bench.schema import flatten
    from ...bench.table import print_result
    from ...models import images as model_images
    from ...models import resolve

    graph = resolve(setting.model)
    if images_file is None:
        array, labels = model_images(graph, images or setting.batch)
    else:
        array, labels = own_images(images_file, labels_file, graph)
    result = measure(
        Measurement(
            graph=graph,
            backend=backend,
            images=array,
            labels=labels,
            every=predictions,
            **setting.common(),
        ),
        progress=options.say,
    )
    value = result.to_json()
    common.emit(
        value,
        format_=format_,
        output=output,
        table=lambda console: print_result(console, result, predictions=predictions, layers=layers),
        rows=lambda: [flatten(value)],
    )
    options.warn(result.stability.warnings, format_, output)
    trained = is_trained(result.model.dataset)
    check_parity(result.accuracy, trained=trained, **setting.parity())


def own_images(path: Path, labels_file: Path | None, graph: Any) -> Any:
    """Normalised images, and their labels or None."""
    from ...errors import UsageError
    from ...parties.images import normalise, read_cifar, read_images, read_labels

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
