"""Every frame counted: which phase, inference and layer it belongs to, and its bytes.

One :class:`Meter` serves all channels of a party, so that its log is in the party's own order of
sending and receiving. The longest chain of dependent messages (``bench/rounds.py``) is read from
the logs of the parties put together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple

Phase = Literal["setup", "offline", "online", "probe"]
"""A probe measures the link and is no part of the protocol."""
Direction = Literal["sent", "received"]
Work = Literal["linear", "gates", "local", "wait"]
"""What a party's time goes into: linear layers, gates, all else it computes, its peer."""

PHASES: Final[tuple[Phase, ...]] = ("setup", "offline", "online", "probe")
LOGGED: Final = 64
"""Inferences whose frames are logged; later ones count in the totals alone, so that a session
of any length needs no more memory than a short one."""


class Event(NamedTuple):
    """One frame. ``bytes`` is what the socket carried, framing included.

    ``inference`` counts from 0 and is -1 in the setup phase; ``layer`` is "" outside layers.
    """

    phase: Phase
    inference: int
    layer: str
    peer: str
    direction: Direction
    bytes: int


class Labels(NamedTuple):
    """What a frame is counted under."""

    phase: Phase
    inference: int
    layer: str


class Meter:
    """The labels in force, the log of frames and the seconds by layer and by kind of work.

    Frames before any :meth:`in_phase` count as setup. With ``log`` false only the byte totals
    are kept, so that a server may run for months.
    """

    def __init__(self, *, log: bool = True) -> None:
        self.labels: Labels = Labels("setup", -1, "")
        self.events: list[Event] = []
        self.totals: dict[tuple[Phase, str, Direction], int] = {}
        self.seconds: dict[Labels, float] = {}
        self.work: dict[tuple[Phase, int, Work], float] = {}
        self._log = log

    def frame(self, peer: str, direction: Direction, size: int) -> None:
        """Count one frame of ``size`` bytes under the labels in force."""
        labels = self.labels
        key = (labels.phase, peer, direction)
        self.totals[key] = self.totals.get(key, 0) + size
        if self._log and labels.inference < LOGGED:
            self.events.append(Event(*labels, peer, direction, size))

    def spend(self, kind: Work, seconds: float) -> None:
        """Add to the time of one kind of work in the phase and inference in force."""
        if self._log and self.labels.inference < LOGGED:
            key = (self.labels.phase, self.labels.inference, kind)
            self.work[key] = self.work.get(key, 0.0) + seconds

    def move_last(self, phase: Phase, inference: int = -1) -> None:
        """Count the latest frame under another phase.

        For the receiver of a command, who learns from the frame which phase it opens.
        """
        if not self._log:
            return
        last = self.events[-1]
        self.totals[last.phase, last.peer, last.direction] -= last.bytes
        key = (phase, last.peer, last.direction)
        self.totals[key] = self.totals.get(key, 0) + last.bytes
        if inference < LOGGED:
            self.events[-1] = last._replace(phase=phase, inference=inference)
        else:
            self.events.pop()

    @contextmanager
    def in_phase(self, phase: Phase, inference: int = -1) -> Iterator[None]:
        """Count frames under ``phase`` (and ``inference``) until the block ends."""
        with self._labelled(Labels(phase, inference, "")):
            yield

    @contextmanager
    def in_layer(self, layer: str) -> Iterator[None]:
        """Count frames under ``layer``, and its seconds (waiting included)."""
        with self._labelled(self.labels._replace(layer=layer)):
            yield

    @contextmanager
    def _labelled(self, labels: Labels) -> Iterator[None]:
        before, self.labels = self.labels, labels
        started = time.perf_counter()
        try:
            yield
        finally:
            self.labels = before
            if self._log and labels.inference < LOGGED:
                spent = time.perf_counter() - started
                self.seconds[labels] = self.seconds.get(labels, 0.0) + spent

    def total(self, phase: Phase, peer: str, direction: Direction) -> int:
        """Bytes so far in one phase, to or from one peer."""
        return self.totals.get((phase, peer, direction), 0)

    def moved(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        sent, received = (
            sum(size for (_, _, way), size in self.totals.items() if way == direction)
            for direction in ("sent", "received")
        )
        return sent, received

    def take_over(self, other: Meter, peer: str) -> None:
        """Count what ``other`` has counted, as of ``peer``."""
        for (phase, _, direction), size in other.totals.items():
            key = (phase, peer, direction)
            self.totals[key] = self.totals.get(key, 0) + size
        self.events += [event._replace(peer=peer) for event in other.events]

    def to_json(self) -> dict[str, Any]:
        """The log as JSON-able data, read back by :func:`events_from_json`."""
        return {
            "events": [list(event) for event in self.events],
            "seconds": [[*labels, seconds] for labels, seconds in self.seconds.items()],
            "work": [[*key, seconds] for key, seconds in self.work.items()],
        }


def events_from_json(data: dict[str, Any]) -> list[Event]:
    """The events of :meth:`Meter.to_json`."""
    return [Event(*row) for row in data["events"]]


def seconds_from_json(data: dict[str, Any]) -> dict[Labels, float]:
    """The seconds per layer of :meth:`Meter.to_json`."""
    return {Labels(*row[:-1]): row[-1] for row in data["seconds"]}


def work_from_json(data: dict[str, Any]) -> dict[tuple[Phase, int, Work], float]:
    """The seconds per phase, inference and kind of work of :meth:`Meter.to_json`."""
    return {(row[0], row[1], row[2]): row[3] for row in data["work"]}


class Clock:
    """Gives every moment between its laps to one kind of work."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._last = time.perf_counter()

    def lap(self, kind: Work) -> None:
        """The time since the last lap, or the clock's start, went into ``kind``."""
        now = time.perf_counter()
        self._meter.spend(kind, now - self._last)
        self._last = now
