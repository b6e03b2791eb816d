"""How many sessions run at once, who waits, and who is told to come later."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import BusyError

STOPPING = "it is shutting down"
ENDING = 0.5
"""Seconds that a client at its limit waits for an earlier session of its own to end."""


@dataclass(frozen=True)
class Limits:
    """What a serving party takes on.

    Attributes:
        sessions: that run at once.
        queue: that wait for a place, beyond these.
        per_client: of one client, running and waiting.
        patience: seconds in the queue; less than the peers', who are silent meanwhile.
    """

    sessions: int = 8
    queue: int = 16
    per_client: int = 4
    patience: float = 2.5


class Admission:
    """Gives out the places for sessions, in the order of coming."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._change = threading.Condition()
        self._running = 0
        self._queue: list[object] = []
        self._clients: Counter[str] = Counter()
        self._closed = False

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed

    def close(self) -> None:
        """Let nobody in any more; who waits is told so."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    @contextlib.contextmanager
    def place(self, who: str) -> Iterator[None]:
        """A place for a session of the client ``who`` until the block ends.

        Raises:
            BusyError: there is none, and none came free in time.
        """
        with self._change:
            self._enter(who)
        try:
            yield
        finally:
            with self._change:
                self._running -= 1
                self._leave(who)

    def _enter(self, who: str) -> None:
        limits = self.limits
        if self._closed:
            raise BusyError(STOPPING)
        # Its last session may just be ending: the client has left, this side has not noticed.
        if not self._change.wait_for(
            lambda: self._closed or self._clients[who] < limits.per_client, ENDING
        ):
            raise BusyError(f"{limits.per_client} sessions of this client are the most at a time")
        if self._closed:
            raise BusyError(STOPPING)
        if self._running >= limits.sessions and len(self._queue) >= limits.queue:
            raise BusyError(f"{limits.sessions} sessions run and {len(self._queue)} wait already")
        self._clients[who] += 1
        ticket = object()
        self._queue.append(ticket)
        deadline = time.monotonic() + limits.patience
        try:
            while self._queue[0] is not ticket or self._running >= limits.sessions:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BusyError(
                        f"{limits.sessions} sessions run, and none ended within "
                        f"{limits.patience:g} s"
                    )
                self._change.wait(left)
                if self._closed:
                    raise BusyError(STOPPING)
        except BaseException:
            self._queue.remove(ticket)
            self._leave(who)
            raise
        self._queue.remove(ticket)
        self._running += 1
        self._change.notify_all()

    def _leave(self, who: str) -> None:
        self._clients[who] -= 1
        if not self._clients[who]:
            del self._clients[who]
        self._change.notify_all()
