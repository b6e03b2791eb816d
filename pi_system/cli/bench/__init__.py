"""``pi-bench``: measure private inference."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from .. import common
from .audit import audit
from .budget import budget
from .compare import compare
from .env import env
from .predict import predict
from .regress import regress
from .report import report
from .run import run
from .sweep import sweep


@click.group(epilog=common.EXIT_CODES)
def cli() -> None:
    """Measure private inference: latency, bytes, round trips and agreement with plaintext.

    \b
    Example:
      pi-bench run --model demo --images 20 --predictions
    """


for _command in (run, compare, sweep, predict, report, regress, audit, env, budget):
    cli.add_command(_command)


def main() -> NoReturn:
    """Entry point of ``pi-bench``."""
    sys.exit(common.run(cli))
