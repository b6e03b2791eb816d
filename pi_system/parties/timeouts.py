"""How long a party waits for what."""

from __future__ import annotations

from dataclasses import dataclass

from ..net.channel import DEFAULT_TIMEOUT
from ..net.heartbeat import EVERY, LIFE, Heartbeat


@dataclass(frozen=True)
class Timeouts:
    """Seconds.

    A peer that dies closes its connection and is noticed at once; these are for one that is
    silent, or never comes. A session's ``life`` is the shortest patience in ``prepare`` and
    ``idle``: those two are for a peer that gives signs of life and nothing else.

    Attributes:
        step: a peer's silence in the handshake and the online phase; also the time to connect.
        prepare: its silence in the setup and offline phases, where it may compute for long.
        idle: a client's silence between commands, at the server and the dealer.
        hello: silence of someone who connected and has not yet said hello.
        life: time without any sign of life of a peer in a session.
        beat: time between this party's own.
    """

    step: float = DEFAULT_TIMEOUT
    prepare: float = 120.0
    idle: float = 600.0
    hello: float = 2.0
    life: float = LIFE
    beat: float = EVERY

    def heartbeat(self) -> Heartbeat:
        """For one session."""
        return Heartbeat(every=self.beat, life=self.life)
