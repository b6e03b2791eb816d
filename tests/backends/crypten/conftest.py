"""The ``trio`` fixture; makes ``crypten_trio`` importable, which importlib mode does not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from crypten_trio import PAIRS, Tapped, Trio

from pi_system.backends.base import Options
from pi_system.backends.crypten.party import CrypTenBackend
from pi_system.errors import UsageError
from pi_system.graph.ir import Graph
from pi_system.graph.validate import check
from pi_system.net.channel import channel_pair
from pi_system.net.meter import Meter


@pytest.fixture
def trio() -> Iterator[Callable[..., Trio]]:
    """A function from a graph (and options) to a session that is set up."""
    with ExitStack() as stack:

        def make(graph: Graph, *, ready: bool = True, **options: Any) -> Trio:
            check(graph, weights=True, error=UsageError)
            it = Trio(graph, Options(**options))
            it.meters = {role: Meter() for role in ("server", "client", "dealer")}
            for names in PAIRS:
                for role, channel in zip(names, channel_pair(names=names), strict=True):
                    peer = channel.peer
                    channel.meter = it.meters[role]
                    it.channels[role, peer] = stack.enter_context(channel)
                    it.taps[role, peer] = Tapped(channel)
            ends, backend = it.channels, CrypTenBackend()
            it.server = backend.server(
                graph, ends["server", "client"], ends["server", "dealer"], it.options
            )
            it.client = backend.client(
                graph.public(), ends["client", "server"], ends["client", "dealer"], it.options
            )
            it.dealer = backend.dealer(
                ends["dealer", "server"], ends["dealer", "client"], it.options
            )
            thread = it.start(it.dealer.run)

            def finish() -> None:
                for (role, _), channel in it.channels.items():
                    if role != "dealer":
                        channel.close()
                thread.join()

            stack.callback(finish)
            return it.setup() if ready else it

        yield make
