"""The backend's entry in the registry."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ...errors import PeerError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Database, Options
from . import device
from .client import Client
from .dealer import Dealer
from .prepared import Workshop
from .server import Server
from .source import SYSTEM, Source
from .store import Store


class FssBackend:
    """One round trip per ReLU layer, and none for linearized positions.

    The server's convolutions run on as many threads of the CPU as the options ask for, all else
    on one. Server and dealer can compute their linear layers on another device (see
    :mod:`device`).
    """

    name = "fss"

    def __init__(self, source: Source = SYSTEM) -> None:
        self._source = source
        self._store: Store | None = None
        self._workshop = Workshop()

    def open_store(self, where: Path | Database, role: str, limit: int | None = None) -> None:
        """Keep material of this party there, for all sessions from now on.

        Raises:
            PiError: see :class:`.store.Store`.
        """
        self._store = Store(where, role, limit=Store.DEFAULT_LIMIT if limit is None else limit)

    def stock(self) -> int | None:
        """Items in this party's store, of all pairs; ``None`` where its database is away."""
        with contextlib.suppress(PeerError):
            return None if self._store is None else self._store.count()
        return None

    def server(
        self, graph: Graph, client: Channel, dealer: Channel | None, options: Options
    ) -> Server:
        _check(options)
        return Server(graph, client, dealer, options, self._store, self._source, self._workshop)

    def client(
        self, public: Graph, server: Channel, dealer: Channel | None, options: Options
    ) -> Client:
        _check(options)
        return Client(public, server, dealer, options, self._store, self._source)

    def dealer(self, server: Channel, client: Channel, options: Options) -> Dealer:
        _check(options)
        return Dealer(server, client, options, self._source)


def _check(options: Options) -> None:
    """Refuse what would be ignored, and recorded in results as if it had not been.

    Raises:
        UsageError: a device that is not there.
    """
    device.check(options.device)
