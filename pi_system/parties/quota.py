"""How much one-time material one client may ask of a dealer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..errors import BusyError

HOUR: Final = 3600.0


class Quota:
    """At most ``limit`` inferences for one client within any hour, over all its sessions.

    Args:
        limit: ``None`` for no limit.
        clock: for tests.
    """

    def __init__(self, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: dict[str, deque[tuple[float, int]]] = {}

    def take(self, who: str, count: int) -> None:
        """Count ``count`` inferences for the client ``who``.

        Raises:
            BusyError: they are more than are left; none is counted.
        """
        if self._limit is None:
            return
        with self._lock:
            now = self._clock()
            for name, taken in list(self._taken.items()):
                while taken and taken[0][0] <= now - HOUR:
                    taken.popleft()
                if not taken:
                    del self._taken[name]
            mine = self._taken.get(who, deque())
            left = self._limit - sum(number for _, number in mine)
            if count > left:
                raise BusyError(
                    f"material of {count} inferences is over the quota: {left} of "
                    f"{self._limit} an hour are left for this client"
                )
            mine.append((now, count))
            self._taken[who] = mine
