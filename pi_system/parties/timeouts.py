"""How long a party waits for what."""

from __future__ import annotations

from dataclasses import dataclass

from ..net.channel import DEFAULT_TIMEOUT


@dataclass(frozen=True)
class Timeouts:
    """Seconds.

    A peer that dies closes its connection and is noticed at once; these are for one that is
    silent, or never comes.

    Attributes:
        step: a peer's silence in the handshake and the online phase; also the time to connect.
        prepare: its silence in the setup and offline phases, where it may compute for long.
        idle: a client's silence between commands, at the server and the dealer.
        hello: silence of someone who connected and has not yet said hello.
    """

    step: float = DEFAULT_TIMEOUT
    prepare: float = 120.0
    idle: float = 600.0
    hello: float = 2.0
