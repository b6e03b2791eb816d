"""``pi-export``: a trained or a user's own network becomes a file the parties can run."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import common

if TYPE_CHECKING:
    from rich.console import Console

    from ..graph.fixedpoint import Parity
    from ..graph.ir import Graph

RANDOM_IMAGES = 8


def _input_shape(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", value):
        raise click.BadParameter(f"{value!r} is not CxHxW, such as 3x32x32")
    return tuple(int(part) for part in value.split("x"))


@click.command(epilog=common.EXIT_CODES)
@click.argument("checkpoint", required=False)
@click.option("-o", "target", type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--from", "factory", metavar="FILE.PY:FACTORY", help="A network of your own.")
@click.option("--input", "shape", metavar="CxHxW", callback=_input_shape, help="Its input.")
@click.option(
    "--relus", type=click.IntRange(0), metavar="N", help="With --from: keep N, at random positions."
)
@click.option(
    "--calibrate",
    "samples",
    metavar="FILE|bundled|synthetic",
    help="Images for the fixed-point plans: .npy, or .bin as CIFAR's binary version comes. They "
    "should be like those to come, and none of a test set. [default: bundled ones where they fit "
    "the model, else synthetic]",
)
@click.option(
    "--calibrate-images", type=click.IntRange(1), default=512, show_default=True,
    help="Use the first so many of them.",
)  # fmt: skip
@click.option(
    "--plans-only", is_flag=True,
    help="Write the plans into the checkpoint itself, as the bundled models have them.",
)  # fmt: skip
@click.option(
    "--parity",
    "parity_images",
    metavar="IMAGES.npy|bundled|random",
    help="Compare fixed point with plaintext on these images.",
)
@click.option(
    "--fractional-bits", type=click.IntRange(1, 24), default=16, show_default=True,
    help="With --parity: precision of the fixed point.",
)  # fmt: skip
@common.output_options
def command(
    checkpoint: str | None,
    target: Path | None,
    factory: str | None,
    shape: tuple[int, ...] | None,
    relus: int | None,
    samples: str | None,
    calibrate_images: int,
    plans_only: bool,
    parity_images: str | None,
    fractional_bits: int,
    format_: str,
    output: Path | None,
) -> None:
    """Export CHECKPOINT, or your own network, to a directory that pi-party and pi-bench run.

    CHECKPOINT is what pi-train wrote, or a model's name (demo, demo-teacher,
    random:resnet18@49600). The ReLU layers are printed; without -o nothing is written.

    --from runs FILE.PY, your own code, and calls FACTORY(), which returns an nn.Module.
    --parity ends with exit code 4 when the logits in fixed point are too far off.

    The exported model holds the fixed-point plans of the fss backend, one per --plan of
    pi-party server, calibrated on sample images; a plan that the checkpoint has already stays
    unless --calibrate is given.

    \b
    Examples:
      pi-export runs/student --calibrate cifar-100-binary/train.bin -o student
      pi-export runs/student -o student --parity random
      pi-export --from mynet.py:build --input 3x32x32 --relus 20000 -o mynet
    """
    common.check_output(output)
    graph = _graph(checkpoint, factory, shape, relus, plans=samples is None)
    if relus is not None:
        _note(f"note: the {relus} kept ReLUs are at random positions and nothing was trained")
    result = None if parity_images is None else _parity(graph, parity_images, fractional_bits)
    if plans_only and (samples is None or target is not None):
        raise UsageError("--plans-only needs --calibrate, and no -o")
    if samples is not None or target is not None:
        graph = _calibrated(graph, samples, calibrate_images)
    if plans_only:
        _write_plans(Path(checkpoint or ""), graph)
    if target is not None:
        from ..graph import serialize

        serialize.save(target, graph)
        _note(f"wrote {target}")
    _print(graph, result, format_, output)
    if result is not None:
        result.require()


def main() -> None:
    """Entry point of ``pi-export``."""
    sys.exit(common.run(command))


def _note(text: str) -> None:
    click.echo(text, err=True)


def _graph(
    checkpoint: str | None,
    factory: str | None,
    shape: tuple[int, ...] | None,
    relus: int | None,
    *,
    plans: bool,
) -> Graph:
    from .. import models

    if (checkpoint is None) == (factory is None):
        raise UsageError("give either a CHECKPOINT or --from FILE.PY:FACTORY")
    if factory is not None:
        if shape is None:
            raise UsageError("--from needs --input, such as --input 3x32x32")
        return models.from_file(factory, shape, relus=relus)
    if shape is not None or relus is not None:
        raise UsageError("--input and --relus go with --from; a checkpoint has its own")
    assert checkpoint is not None
    if (Path(checkpoint) / "manifest.json").is_file():
        return models.from_checkpoint(Path(checkpoint), plans=plans)
    return models.resolve(checkpoint)


def _calibrated(graph: Graph, samples: str | None, count: int) -> Graph:
    """The graph with fixed-point plans in its metadata."""
    from ..backends.fss import plan
    from ..errors import UnsupportedLayer

    if samples is None and plan.PLAN_KEY in graph.metadata:
        return graph
    images, source = _samples(graph, samples, count)
    try:
        plans, failures = plan.calibrated(graph, images, source)
    except (UsageError, UnsupportedLayer) as error:
        if samples is not None:
            raise
        _note(f"warning: the fss backend cannot run this model: {error}")
        return graph
    for name, reason in failures.items():
        _note(f"warning: no {name} plan: {reason}")
    for name in plan.PRECISIONS.keys() - failures.keys():
        stated = plans[name]["error"]
        _note(f"{name} plan, calibrated on {source}: logits within {stated:.2g} of plaintext's")
    return dataclasses.replace(graph, metadata={**graph.metadata, plan.PLAN_KEY: plans})


def _samples(graph: Graph, samples: str | None, count: int) -> tuple[Any, str]:
    """Normalised images, and what they are."""
    from .. import models
    from ..backends.fss import plan

    fits = graph.metadata.get("dataset") == "cifar100" and graph.input.shape == models.RANDOM_INPUT
    if samples is None:
        samples = "bundled" if fits else "synthetic"
        _note(
            f"warning: plans calibrated on {samples} images, which those to come may exceed; "
            "give samples with --calibrate"
        )
    if samples == "synthetic":
        images = plan.synthetic_images(graph)
        return images, f"{len(images)} synthetic images"
    if samples == "bundled":
        images = models.normalise(models.demo_images()[0][:count], graph.metadata)
        return images, f"{len(images)} bundled images"
    path = Path(samples)
    if path.suffix == ".bin":
        from ..parties.images import normalise, read_cifar

        try:
            with open(path, "rb") as file:
                pixels, _ = read_cifar(file, name=samples)
        except OSError as error:
            raise UsageError(f"cannot read {samples}: {error.strerror}") from error
        images = normalise(pixels[:count], graph.metadata, graph.input.shape)
    else:
        images = models.read_images(path, graph)[:count]
    return images, f"{len(images)} images of {path.name}"


def _write_plans(checkpoint: Path, graph: Graph) -> None:
    import json

    from .. import models
    from ..backends.fss.plan import PLAN_KEY
    from ..files import write_atomic

    if not (checkpoint / "manifest.json").is_file():
        raise UsageError(f"--plans-only needs a checkpoint's directory, not {str(checkpoint)!r}")
    document = {
        "weights_sha256": models.weights_hash(checkpoint),
        "metadata": {PLAN_KEY: graph.metadata[PLAN_KEY]},
    }
    write_atomic(checkpoint / models.PLANS_NAME, (json.dumps(document) + "\n").encode())
    _note(f"wrote {checkpoint / models.PLANS_NAME}")


def _parity(graph: Graph, source: str, fractional_bits: int) -> Parity:
    from .. import models
    from ..graph import fixedpoint

    if source == "random":
        images = models.random_images(RANDOM_IMAGES, graph.input.shape)
    elif source == "bundled":
        images = models.normalise(models.demo_images()[0], graph.metadata)
    else:
        images = models.read_images(Path(source), graph)
    return fixedpoint.parity(graph, images, fractional_bits=fractional_bits)


def _print(graph: Graph, parity: Parity | None, format_: str, output: Path | None) -> None:
    from ..graph import summary

    facts = summary.describe(graph)
    document = {
        "model": facts,
        "parity": None if parity is None else dataclasses.asdict(parity),
    }
    errors = {} if parity is None else {node.name: node for node in parity.nodes}

    def rows() -> list[dict[str, Any]]:
        return [
            {
                "layer": layer["name"],
                "op": layer["op"],
                "shape": "x".join(map(str, layer["shape"])),
                "relu_total": layer["relu_total"],
                "relu_kept": layer["relu_kept"],
            }
            | (
                {
                    "max_abs_value": errors[layer["name"]].max_abs_value,
                    "max_abs_error": errors[layer["name"]].max_abs_error,
                }
                if parity is not None
                else {}
            )
            for layer in facts["layers"]
        ]

    def table(console: Console) -> None:
        _table(console, graph, facts)
        if parity is not None:
            _parity_table(console, parity)

    common.emit(document, format_=format_, output=output, table=table, rows=rows)


def _table(console: Console, graph: Graph, facts: dict[str, Any]) -> None:
    from rich.table import Table

    from ..graph import summary

    table = Table(title=f"{facts['name']}: ReLU layers", title_justify="left")
    table.add_column("layer")
    for column in ("shape", "ReLUs", "kept", "kept %"):
        table.add_column(column, justify="right")
    for layer in summary.relu_layers(graph):
        _row(table, layer.name, "x".join(map(str, layer.shape)), layer.total, layer.kept)
    table.add_section()
    _row(table, "all (as SENet counts)", "", facts["relu_total"], facts["relu_kept"])
    _row(
        table,
        "without the stem (as SNL counts)",
        "",
        facts["relu_total_without_stem"],
        facts["relu_kept_without_stem"],
    )
    console.print(table)
    console.print(f"{facts['parameters']:,} parameters, SHA-256 {facts['sha256']}", soft_wrap=True)


def _row(table: Any, name: str, shape: str, total: int, kept: int) -> None:
    share = f"{100 * kept / total:.1f}" if total else "-"
    table.add_row(name, shape, f"{total:,}", f"{kept:,}", share)


def _parity_table(console: Console, parity: Parity) -> None:
    from rich.table import Table

    title = f"plaintext against fixed point of {parity.fractional_bits} fractional bits"
    table = Table(title=f"{title}, {parity.images} images", title_justify="left")
    for column in ("layer", "op"):
        table.add_column(column)
    for column in ("max |value|", "max |error|"):
        table.add_column(column, justify="right")
    for node in parity.nodes:
        table.add_row(node.name, node.op, f"{node.max_abs_value:.3f}", f"{node.max_abs_error:.2e}")
    console.print(table)
    console.print(f"argmax agrees on {100 * parity.argmax_agreement:.1f} % of the images")


if __name__ == "__main__":
    main()
