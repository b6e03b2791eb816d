"""Signs of life: a party that has nothing to say says so, and one that says nothing is lost.

A peer that computes for a minute and a peer that hangs look the same to who waits for its next
message. So each side of a session sends a beat, four bytes, on every channel on which it has sent
nothing for :data:`EVERY` seconds, from a thread of its own that neither the party's work nor its
waits hold up; and a wait ends once nothing at all has come for :data:`LIFE` seconds. A beat is no
message: it is in no count of bytes and no record, and does not prolong the wait for a message.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Final

from ..errors import BusyError
from .channel import Channel

EVERY: Final = 2.0
"""Seconds after its last byte that a party gives a sign of life; part of the protocol."""
LIFE: Final = 8.0
"""Seconds without any, after which a peer is lost."""
_LOOKS: Final = 4
"""Looks at every channel within the time between two beats."""


class Heartbeat:
    """Beats on one session's channels from :meth:`keep` until the block ends.

    Args:
        every: seconds between signs of life of this side.
        life: seconds to wait for one of the other side.
    """

    def __init__(self, *, every: float = EVERY, life: float = LIFE) -> None:
        self._every = every
        self._life = life
        self._channels: list[Channel] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, channel: Channel) -> None:
        """Give signs of life on a channel and expect them, once its peer is known to.

        Raises:
            BusyError: the system gives no more threads.
        """
        channel.life = self._life
        self._channels.append(channel)
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
            try:
                thread.start()
            except RuntimeError as error:
                raise BusyError(f"no thread for a session: {error}") from error
            self._thread = thread

    def _run(self) -> None:
        while not self._over.wait(self._every / _LOOKS):
            for channel in tuple(self._channels):
                channel.beat(self._every)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
