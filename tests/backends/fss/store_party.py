"""Server and client as real processes over a store, for tests that kill them."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

import numpy as np

from pi_system.backends.base import Database
from pi_system.backends.fss.party import FssBackend
from pi_system.errors import PiError
from pi_system.graph import serialize
from pi_system.net.listen import Listener
from pi_system.parties.address import Address
from pi_system.parties.admission import Limits
from pi_system.parties.client import Client, ClientSettings
from pi_system.parties.dealer import Dealer
from pi_system.parties.server import ServerSettings, serve_once
from pi_system.parties.serving import ServingSettings
from pi_system.parties.timeouts import Timeouts

PATIENCE = 40.0
"""Seconds, more than a busy machine takes: who waits so long for a killed peer has not noticed."""
TIMEOUTS = Timeouts(step=PATIENCE, prepare=PATIENCE, idle=PATIENCE, hello=PATIENCE, life=PATIENCE)
INFERENCES = 3
REFUSED, LOST = 6, 5


def dealer(listening: socket.socket) -> None:
    # Sessions of killed parties may linger: they must not crowd out the next ones.
    limits = Limits(sessions=64, queue=64, per_client=128)
    settings = ServingSettings(FssBackend(), "fss", timeouts=TIMEOUTS, limits=limits)
    Dealer(Listener.adopt(listening.detach()), settings).host().serve_forever()


def server(listening: socket.socket, dealer_port: int, model: str, where: Path | Database) -> None:
    with _exit_code():
        backend = FssBackend()
        backend.open_store(where, "server")
        graph = serialize.load(Path(model))
        settings = ServerSettings(
            model=graph, sha256=graph.sha256(), dealers=(Address("127.0.0.1", dealer_port),),
            keeps=True, backend=backend, backend_name="fss", timeouts=TIMEOUTS,
        )  # fmt: skip
        serve_once(Listener.adopt(listening.detach()), settings)


def client(port: int, dealer_port: int, directory: str, images: str, expected: str) -> None:
    """Lay in two items if there are none, then three inferences: from stock, then made."""
    with _exit_code():
        backend = FssBackend()
        backend.open_store(Path(directory), "client")
        x, logits = np.load(images), np.load(expected)
        settings = ClientSettings(
            Address("127.0.0.1", port), (Address("127.0.0.1", dealer_port),), backend, "fss",
            timeouts=TIMEOUTS,
        )  # fmt: skip
        with Client(settings) as session:
            session.setup()
            if not session.stock:
                session.prepare(2)
            for _ in range(INFERENCES):
                session.offline(1)
                assert np.abs(session.online(x) - logits).max() < 0.1


@contextlib.contextmanager
def _exit_code():  # type: ignore[no-untyped-def]
    try:
        yield
    except PiError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
