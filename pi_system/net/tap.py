"""A record of the frames a party sent and received, payloads and all: for audits and tests.

A tape holds what the meter counts. It keeps every byte in memory and makes a copy of secrets, so
no party attaches one while it serves.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from .channel import Channel
from .meter import Direction, Phase


class Frame(NamedTuple):
    """One frame; the labels are those of :class:`~pi_system.net.meter.Event`."""

    phase: Phase
    inference: int
    layer: str
    peer: str
    direction: Direction
    data: bytes


class Tape:
    """The frames of all channels it is attached to, in the party's own order."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def attach(self, *channels: Channel) -> None:
        """Record every frame of these channels from here on."""
        for channel in channels:
            channel.tap = partial(self._note, channel)

    def received(self, peer: str) -> list[bytes]:
        """The payloads that came from ``peer``, in order."""
        return [f.data for f in self.frames if (f.peer, f.direction) == (peer, "received")]

    def _note(self, channel: Channel, direction: Direction, payload: memoryview) -> None:
        self.frames.append(Frame(*channel.meter.labels, channel.peer, direction, bytes(payload)))
