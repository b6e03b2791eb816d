"""Options and manners that several commands of ``pi-bench`` share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from .. import common

F = TypeVar("F", bound=Callable[..., Any])

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
_agreement = click.option(
    "--agreement", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="Trained models: least fraction of answers equal to plaintext's (else exit code 4).",
)  # fmt: skip
_tolerance = click.option(
    "--tolerance", type=click.FloatRange(min=0), default=None,
    help="Random models: largest logit error (else exit code 4). [default: what the backend's "
    "plan states, or 0.1]",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What ``pi-bench run`` and ``compare`` measure on and how; see :func:`setting`."""

    model: str
    plan: str
    repeat: int
    warmup: int
    batch: int
    threads: int
    device: str
    network: str
    timeout: float
    agreement: float
    tolerance: float | None

    def common(self) -> dict[str, Any]:
        """The fields that a measurement and a comparison share."""
        from ...parties.timeouts import Timeouts

        names = ("model", "plan", "repeat", "warmup", "batch", "threads", "device", "network")
        named = {name: getattr(self, name) for name in names}
        return {**named, "timeouts": Timeouts(step=self.timeout)}

    def parity(self) -> dict[str, Any]:
        """What answers are held to."""
        return {"agreement": self.agreement, "tolerance": self.tolerance}


def setting(*, repeat: int, repeat_help: str, warmup_help: str) -> Callable[[F], F]:
    """The options of a :class:`Setting`, which the command gets as its argument ``setting``."""
    added = (
        model,
        common.plan_option,
        click.option(
            "--repeat", type=click.IntRange(1), default=repeat, show_default=True, help=repeat_help
        ),
        click.option(
            "--warmup", type=click.IntRange(0), default=1, show_default=True, help=warmup_help
        ),
        batch,
        threads,
        device,
        network,
        timeout,
        _agreement,
        _tolerance,
    )
    names = [field.name for field in fields(Setting)]

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            values = {name: given.pop(name) for name in names}
            return function(setting=Setting(**values), **given)

        for option in reversed(added):
            command = option(command)
        return cast(F, command)

    return decorate


def warn(warnings: list[str], format_: str, output: Path | None) -> None:
    """On stderr, unless the table has said it."""
    if format_ != "table" or output is not None:
        for warning in warnings:
            click.echo(f"unstable: {warning}", err=True)


def say(text: str) -> None:
    """On stderr, if somebody is looking."""
    if sys.stderr.isatty():
        click.echo(f"{text} ...", err=True)
