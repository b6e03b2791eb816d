"""A program that launches the three parties and waits: for tests that interrupt or kill it."""

from __future__ import annotations

import sys

import click
import numpy as np

from pi_system.cli.common import run
from pi_system.parties.local import LocalRun, run_local


@click.command()
@click.argument("model")
@click.argument("backend")
def main(model: str, backend: str) -> None:
    run_local(LocalRun(model, backend, np.zeros((1, 3, 8, 8), np.float32), repeat=1000))


if __name__ == "__main__":
    sys.exit(run(main))
