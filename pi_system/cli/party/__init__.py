"""``pi-party``: the server, the client and the dealer of a private classification."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from .. import common
from .client import client
from .dealer import dealer
from .server import server


@click.group(epilog=common.EXIT_CODES)
def cli() -> None:
    """Classify images privately: the server keeps its model, the client its images.

    A third party, the dealer, hands out correlated randomness; it sees neither, and must not
    collude with either.

    \b
    Links between the parties are NOT ENCRYPTED yet (TLS is to come): an eavesdropper on them
    breaks the protocol. Use loopback or a network you trust.

    \b
    On two hosts (the dealer on the server's, for a trial only):
      server$  pi-party dealer --listen 10.0.0.5:7001
      server$  pi-party server --model demo --listen 10.0.0.5:7000 --dealer 10.0.0.5:7001
      client$  pi-party client --server 10.0.0.5:7000 --dealer 10.0.0.5:7001 --images x.npy
    """


for _command in (server, dealer, client):
    cli.add_command(_command)


def main() -> NoReturn:
    """Entry point of ``pi-party``."""
    sys.exit(common.run(cli))
