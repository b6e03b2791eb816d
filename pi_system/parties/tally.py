"""What a serving party has done since it started, as far as its events tell."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

from .admission import Admission
from .journal import Event

_ERRORS: Final = 10


class Tally:
    """Reads a journal's events; :meth:`to_json` is what ``pi-party status`` shows.

    Args:
        admission: tells how many sessions run and wait.
        material: inferences whose one-time material is in stock; ``None`` where none is kept.
    """

    def __init__(self, role: str, admission: Admission, material: Callable[[], int | None]) -> None:
        self._role = role
        self._admission = admission
        self._material = material
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()
        self._sessions: dict[str, dict[str, Any]] = {}
        self._errors: deque[dict[str, Any]] = deque(maxlen=_ERRORS)

    def read(self, event: Event) -> None:
        """Take note of an event."""
        name, session = str(event["event"]), str(event.get("session", ""))
        with self._lock:
            match name:
                case "session":
                    self._totals["sessions"] += 1
                    self._sessions[session] = {
                        "session": session, "peer": event["who"], "since": event["time"],
                        "inferences": 0,
                    }  # fmt: skip
                case "request":
                    phase, count = str(event["phase"]), int(event["count"])
                    if phase in ("online", "offline"):
                        done = "inferences" if phase == "online" else "material"
                        self._totals[done] += count
                    if phase == "online" and session in self._sessions:
                        self._sessions[session]["inferences"] += 1
                case "ended" | "failed" | "refused":
                    self._totals[name] += 1
                    if name != "refused":
                        self._sessions.pop(session, None)
                        self._totals["sent"] += int(event["sent"])
                        self._totals["received"] += int(event["received"])
            if "error" in event:
                keys = ("time", "event", "kind", "error", "who")
                self._errors.append({key: event[key] for key in keys if key in event})

    @property
    def stopping(self) -> bool:
        return self._admission.closed

    @property
    def running(self) -> int:
        return self._admission.running

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    def material(self) -> int | None:
        """Inferences whose one-time material is in stock."""
        return self._material()

    def to_json(self) -> dict[str, Any]:
        """State, sessions, totals, material left and the last errors."""
        admission, stock = self._admission, self._material()  # which may have to ask a database
        names = ("sessions", "ended", "failed", "refused", "inferences", "material")
        with self._lock:
            return {
                "role": self._role,
                "state": "stopping" if self.stopping else "serving",
                "uptime": round(time.monotonic() - self._started, 1),
                "running": admission.running,
                "waiting": admission.waiting,
                "limit": admission.limits.sessions,
                "stock": stock,
                "totals": {name: self._totals[name] for name in (*names, "sent", "received")},
                "peers": list(self._sessions.values()),
                "errors": list(self._errors),
            }
