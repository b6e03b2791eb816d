"""Round trips of an inference: the longest chain of messages each of which needs the one before.

A message needs every message its sender had received before. One that goes out while another
comes in (an exchange) needs what came before both. Each link of the chain is one message in one
direction, half a round trip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from ..net.meter import Event


def longest_chain(logs: Mapping[str, Sequence[Event]]) -> int:
    """The number of messages in the longest chain.

    Args:
        logs: by party, its events in its own order; events with parties not in ``logs`` are
            left out.

    Raises:
        ValueError: the logs do not fit together: a message was received that nobody sent.
    """
    pending = {
        party: deque(event for event in log if event.peer in logs) for party, log in logs.items()
    }
    under_way: dict[tuple[str, str], deque[int]] = {}
    depth = dict.fromkeys(logs, 0)
    longest = 0
    moved = True
    while moved:
        moved = False
        for party, events in pending.items():
            while events:
                event = events[0]
                if event.direction == "sent":
                    link = under_way.setdefault((party, event.peer), deque())
                    link.append(depth[party] + 1)
                    longest = max(longest, depth[party] + 1)
                elif queue := under_way.get((event.peer, party)):
                    depth[party] = max(depth[party], queue.popleft())
                else:
                    break
                events.popleft()
                moved = True
    if any(pending.values()):
        raise ValueError("a message was received that nobody sent")
    return longest


def round_trips(logs: Mapping[str, Sequence[Event]]) -> float:
    """Half of :func:`longest_chain`."""
    return longest_chain(logs) / 2
