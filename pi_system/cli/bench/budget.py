"""``pi-bench budget``: a model held to limits in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import common
from . import options

_images_file = click.option(
    "--images-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Images to measure on, as pi-bench run takes them. [default: the bundled ones where "
    "they fit the model, else random]",
)  # fmt: skip
_labels_file = click.option(
    "--labels-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npy",
    help="Their labels, (N,) integers.",
)  # fmt: skip
_repeat = click.option(
    "--repeat", type=click.IntRange(1), default=5, show_default=True,
    help="Inferences measured on each network, at least.",
)  # fmt: skip


@click.group()
def budget() -> None:
    """Write down what a model may cost and reveal, and hold it to that.

    \b
    Example:
      pi-bench budget init --model demo --output budget.toml
      pi-bench budget check budget.toml --model demo --junit budget.xml
    """


@budget.command()
@options.model
@common.plan_option
@options.batch
@click.option(
    "--images", type=click.IntRange(1, 100_000), default=16, show_default=True,
    help="Images that accuracy is to be measured on.",
)  # fmt: skip
@click.option("--measure", "measuring", is_flag=True, help="Measure, and limit what was measured.")
@click.option(
    "--network", "networks", multiple=True, metavar="NAME",
    help="With --measure: limit the latency on this network (loopback, lan, wan, RTT:MBPS). Again "
    "for more. [default: loopback]",
)  # fmt: skip
@click.option(
    "--headroom", type=click.FloatRange(min=0), default=0.5, show_default=True,
    help="Fraction by which latencies may be higher than measured.",
)  # fmt: skip
@_repeat
@options.threads
@options.timeout
@_images_file
@_labels_file
@click.option(
    "--output", type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the file there instead of stdout.",
)  # fmt: skip
def init(
    model: str,
    plan: str,
    batch: int,
    images: int,
    measuring: bool,
    networks: tuple[str, ...],
    headroom: float,
    repeat: int,
    threads: int,
    timeout: float,
    images_file: Path | None,
    labels_file: Path | None,
    output: Path | None,
) -> None:
    """Write limits that a model keeps, as a TOML file to tighten or loosen.

    \b
    Examples:
      pi-bench budget init --model demo --output budget.toml
      pi-bench budget init --model demo --measure --network loopback --network wan
    """
    from dataclasses import replace

    from ...errors import UsageError
    from ...net import link

    common.check_output(output)
    for network in networks:
        link.parse(network)
    if networks and not measuring:
        raise UsageError("--network goes with --measure")
    from ...bench.budget import check as checks
    from ...bench.budget.draft import comment, draft, with_measured
    from ...bench.budget.limits import to_toml
    from ...models import resolve

    graph = resolve(model)
    made = draft(graph, plan, batch, images)
    if measuring:
        subject = _subject(
            model, graph, images, batch, images_file, labels_file, threads, repeat, timeout
        )
        asked = dict.fromkeys(networks or ("loopback",), 0.0)
        # An audit finds what it finds whatever the limits are.
        unaudited = replace(made.reveals, audited=None)
        found = checks.run(
            replace(made, latency_ms=asked, reveals=unaudited), subject, progress=options.say
        )
        made = with_measured(made, found, headroom)
    common.write(to_toml(made, comment(model)), output)


@budget.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@options.model
@click.option("--measure", "measuring", is_flag=True, help="Also run the model, for the rest.")
@click.option(
    "--junit", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE.xml",
    help="Write a JUnit report there as well.",
)  # fmt: skip
@_repeat
@options.threads
@options.timeout
@_images_file
@_labels_file
@common.output_options
def check(
    file: Path,
    model: str,
    measuring: bool,
    junit: Path | None,
    repeat: int,
    threads: int,
    timeout: float,
    images_file: Path | None,
    labels_file: Path | None,
    format_: str,
    output: Path | None,
) -> None:
    """Hold a model to the limits in FILE. Exit code 3 if one is broken.

    ReLUs, bytes, round trips, material and what is revealed follow from the model and need no
    run; with --measure they are also measured, and so are latencies, accuracy and an audit.

    \b
    Examples:
      pi-bench budget check budget.toml --model demo
      pi-bench budget check budget.toml --model demo --measure --junit budget.xml
    """
    from ...bench.budget import check as checks
    from ...bench.budget import report
    from ...bench.budget.limits import load
    from ...models import resolve

    for path in (output, junit):
        common.check_output(path)
    limits = load(file)
    graph = resolve(model)
    found = None
    if measuring:
        count = limits.accuracy.images
        subject = _subject(
            model, graph, count, limits.batch, images_file, labels_file, threads, repeat, timeout
        )
        found = checks.run(limits, subject, progress=options.say)
    done = checks.check(limits, graph, found)
    if junit is not None:
        common.write(report.to_junit(done).decode(), junit)
    common.emit(
        report.to_json(model, done),
        format_=format_,
        output=output,
        table=lambda console: report.print_checks(console, model, done),
        rows=lambda: report.rows(done),
    )
    checks.raise_if_over(done)


def _subject(
    model: str,
    graph: Any,
    count: int,
    batch: int,
    images_file: Path | None,
    labels_file: Path | None,
    threads: int,
    repeat: int,
    timeout: float,
) -> Any:
    from ...bench.budget.check import Subject
    from ...errors import UsageError
    from ...models import images as model_images
    from ...parties.timeouts import Timeouts
    from .run import own_images

    if labels_file is not None and images_file is None:
        raise UsageError("--labels-file goes with --images-file")
    if images_file is None:
        images, labels = model_images(graph, max(count, batch))
    else:
        images, labels = own_images(images_file, labels_file, graph)
        if len(images) < count:
            raise UsageError(f"{images_file} holds {len(images)} images, {count} are wanted")
        images, labels = images[:count], None if labels is None else labels[:count]
    return Subject(model, graph, images, labels, threads, repeat, Timeouts(step=timeout))
