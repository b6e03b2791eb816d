"""Options and manners that several commands of ``pi-bench`` share."""

from __future__ import annotations

import sys
from pathlib import Path

import click

model = click.option(
    "--model", default="demo", show_default=True,
    help="demo, demo-teacher, random:ARCH@RELUS (random:resnet18@49600, @all) or a path.",
)  # fmt: skip
batch = click.option(
    "--batch", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Images per inference.",
)  # fmt: skip
threads = click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Threads per party, and of plaintext.",
)  # fmt: skip
device = click.option(
    "--device", default="cpu", show_default=True, help="Torch device of server and dealer."
)
network = click.option(
    "--network", default="loopback", show_default=True, metavar="NAME",
    help="Emulated links: loopback, lan, wan or RTT:MBPS[:LOSS] (ms, Mbit/s, fraction).",
)  # fmt: skip
timeout = click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=8.0, show_default=True,
    help="Seconds a party may be silent within a protocol step.",
)  # fmt: skip
agreement = click.option(
    "--agreement", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="Trained models: least fraction of answers equal to plaintext's (else exit code 4).",
)  # fmt: skip
tolerance = click.option(
    "--tolerance", type=click.FloatRange(min=0), default=None,
    help="Random models: largest logit error (else exit code 4). [default: what the backend's "
    "plan states, or 0.1]",
)  # fmt: skip


def warn(warnings: list[str], format_: str, output: Path | None) -> None:
    """On stderr, unless the table has said it."""
    if format_ != "table" or output is not None:
        for warning in warnings:
            click.echo(f"unstable: {warning}", err=True)


def say(text: str) -> None:
    """On stderr, if somebody is looking."""
    if sys.stderr.isatty():
        click.echo(f"{text} ...", err=True)
