"""``pi-party``: the server, the client and the dealer of a private classification."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from .. import common
from .certs import certs
from .client import client
from .dealer import dealer
from .server import server
from .status import status


@click.group(epilog=common.EXIT_CODES, context_settings={"auto_envvar_prefix": "PI_PARTY"})
def cli() -> None:
    """Classify images privately: the server keeps its model, the client its images.

    A third party, the dealer, hands out correlated randomness; it sees neither, and must not
    collude with either.

    All links are TLS 1.3, and each party shows a certificate for its role (pi-party certs).

    \b
    On two hosts (the dealer on the server's, for a trial only):
      any$     pi-party certs certs --folders    # give each host its roles' folders
      server$  pi-party dealer --listen 10.0.0.5:7001 --certs certs/dealer
      server$  pi-party server --model demo --listen 10.0.0.5:7000 --dealer 10.0.0.5:7001 \\
                 --certs certs/server
      client$  pi-party client --server 10.0.0.5:7000 --dealer 10.0.0.5:7001 --images x.npy \\
                 --certs certs/client
    """


for _command in (server, dealer, client, certs, status):
    cli.add_command(_command)


def main() -> NoReturn:
    """Entry point of ``pi-party``."""
    sys.exit(common.run(cli))
