"""Recorded frames cut by the transcript's description: every frame must have its place in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ...backends.fss import program, transcript
from ...backends.fss.plan import Plan
from ...backends.fss.public import Public
from ...backends.fss.transcript import Message
from ...errors import ProtocolError, RefusedError
from ...graph import serialize
from ...net.meter import Phase
from .session import Sent

_TO_DEALER: Final = (
    Message("hello", "client", "dealer"),
    Message("hello", "server", "dealer"),
    Message("hello", "dealer", "server"),
    Message("hello", "dealer", "client"),
)
_OPENING: Final = (
    Message("hello", "client", "server"),
    Message("hello", "server", "client"),
    Message("model's hash", "server", "client"),
    Message("public model", "server", "client"),
    Message("command", "client", "server"),
)
_DONE: Final = Message("done", "server", "client")
_PING: Final = (Message("command", "client", "server"), _DONE)
_PLAN_AT: Final = 3
"""Place of the plan among the frames from server to client; the public model is before it."""


@dataclass(frozen=True)
class Seen:
    """A frame and what it is; ``place`` is its message's place in the phase's description."""

    phase: Phase
    place: int
    message: Message
    data: bytes


def read_public(frames: Sequence[Sent], batch: int) -> Public:
    """What everybody knows of a session, from the frames of its setup alone.

    Raises:
        RefusedError: it is not there.
    """
    down = [f.data for f in frames if (f.sender, f.receiver) == ("server", "client")]
    try:
        graph = serialize.from_bytes(down[_PLAN_AT - 1])
        document = json.loads(down[_PLAN_AT])
        lowered = program.build(graph)
        plan = Plan.from_json(document["plan"], lowered)
        return Public(graph, lowered, plan, document["model"], batch)
    except (IndexError, ValueError, KeyError, TypeError, ProtocolError) as error:
        raise RefusedError(f"the session did not open as described: {error}") from error


def setup(public: Public, frames: Sequence[Sent]) -> Iterator[Seen]:
    """The connections and the setup phase."""
    described = [*_TO_DEALER, *_OPENING, *transcript.setup(public), _DONE, *_PING]
    return _fit("setup", described, frames)


def offline(public: Public, frames: Sequence[Sent]) -> Iterator[Seen]:
    """Laying in material for one inference."""
    command, done = _PING
    described = [command, *_material(public), done, *_PING]
    return _fit("offline", described, frames)


def online(public: Public, frames: Sequence[Sent]) -> Iterator[Seen]:
    """One inference, and retries with the material that they needed."""
    link = ("server", "client")
    mine = [f for f in frames if f.phase == "online"]
    command = [f for f in frames if f.phase in ("setup", "probe")]
    rest = [f for f in frames if f.phase == "offline" or f.sender not in link
            or f.receiver not in link]  # fmt: skip
    yield from _fit("online", [_PING[0], *_PING], command)
    # Places of the phase's own messages are counted from here.
    described = list(transcript.online(public))
    yield from _fit("online", described, mine, first=len(_PING) + 1, many=True)
    if rest:
        yield from _fit("offline", list(_material(public)), rest, first=1, many=True)


def _material(public: Public) -> Iterator[Message]:
    yield from transcript.request()
    yield from transcript.offline(public)


def _fit(
    phase: Phase,
    described: Sequence[Message],
    frames: Sequence[Sent],
    *,
    first: int = 0,
    many: bool = False,
) -> Iterator[Seen]:
    """Frames and messages link by link.

    Args:
        first: place of the first message.
        many: the frames are of one or more times the messages.

    Raises:
        RefusedError: a frame more or less than described.
    """
    places: dict[tuple[str, str], list[tuple[int, Message]]] = {}
    for place, message in enumerate(described, first):
        places.setdefault((message.sender, message.receiver), []).append((place, message))
    found: dict[tuple[str, str], list[bytes]] = {link: [] for link in places}
    for frame in frames:
        found.setdefault((frame.sender, frame.receiver), []).append(frame.data)
    times = set()
    for link, data in found.items():
        expected = places.get(link, [])
        rounds, left = divmod(len(data), len(expected)) if expected else (0, len(data))
        times.add(rounds)
        if left or not rounds:
            raise RefusedError(
                f"{phase} phase, {link[0]} to {link[1]}: {len(data)} messages, {len(expected)} "
                "are described"
            )
        for (place, message), payload in zip(expected * rounds, data, strict=True):
            yield Seen(phase, place, message, payload)
    if len(times) != 1 or (times != {1} and not many):
        raise RefusedError(f"{phase} phase: messages come {sorted(times)} times, not once")
