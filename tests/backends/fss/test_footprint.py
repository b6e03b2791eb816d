"""What an inference costs, computed, against what three sessions send and keep."""

from __future__ import annotations

import pytest
from fss_networks import Sessions, images, planned, random_graph

from pi_system.backends.base import Options
from pi_system.backends.fss import footprint
from pi_system.backends.fss.material import ClientCodec, ServerCodec
from pi_system.backends.fss.plan import Precision
from pi_system.net.framing import HEADER

RARE = Precision(retry_bits=30)


@pytest.mark.parametrize("seed", range(8))
def test_bytes_and_items_of_random_graphs(seed: int) -> None:
    graph, _ = planned(random_graph(seed), RARE)
    batch = 1 + seed % 3
    public = footprint.public(graph, "default", batch)
    cost = footprint.footprint(public)
    with Sessions(graph, Options(batch=batch)) as sessions:
        for tape in sessions.tapes.values():
            tape.frames.clear()
        sessions.offline(1)
        ours, theirs = sessions.client._claimed._items, sessions.server._claimed._items
        assert len(ClientCodec(public, "0" * 32).encode(0, ours[0])) == cost.material["client"]
        assert len(ServerCodec(public, "0" * 32).encode(0, theirs[0])) == cost.material["server"]
        assert sent(sessions) == cost.offline
        sessions.online(images(graph, batch))
        assert sent(sessions) == cost.online


def sent(sessions: Sessions) -> dict[tuple[str, str], int]:
    """Bytes by sender and receiver since the last call, as received."""
    found: dict[tuple[str, str], int] = {}
    for role, tape in sessions.tapes.items():
        for frame in tape.frames:
            if frame.direction == "received":
                link = frame.peer, role
                found[link] = found.get(link, 0) + HEADER.size + len(frame.data)
        tape.frames.clear()
    return found
