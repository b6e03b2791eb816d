"""What a serving party says of itself: events, one line each on stderr.

An event has a name and fields of the names in :data:`FIELDS`, numbers and short texts only.
Nothing else can be written: no array, no bytes, and so no share, key, pixel or logit. Texts of
errors are those of :mod:`pi_system.errors`, one printable line; of an error that nobody foresaw
only its type and place are written, as its text could hold anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from ..errors import PiError

Scalar = str | int | float
Event = dict[str, Scalar]
Format = Literal["json", "text", "none"]

FIELDS: Final = frozenset(
    {
        "time", "level", "role", "event", "session", "request", "ms", "who", "error", "kind",
        "model", "backend", "batch", "count", "inferences", "sent", "received", "sessions",
        "waiting", "listen", "seconds", "phase", "dealer",
    }
)  # fmt: skip
_LONGEST: Final = 500


class Journal:
    """Hands every event of one party to its readers: a log, counters, a status page."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._readers: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    def add(self, reader: Callable[[Event], None]) -> None:
        """Call ``reader`` with every event from now on, one at a time."""
        self._readers.append(reader)

    def write(self, event: str, *, level: str = "info", **fields: Scalar | None) -> None:
        """Something happened.

        Raises:
            TypeError: a field that no log may hold.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: Event = {"time": now, "level": level, "role": self.role, "event": event}
        for name, value in fields.items():
            if name not in FIELDS or type(value) not in (str, int, float, type(None)):
                raise TypeError(f"no field {name} of {type(value).__name__} in a log")
            if value is not None:
                line[name] = value[:_LONGEST] if isinstance(value, str) else value
        with self._lock:
            for reader in self._readers:
                reader(line)

    def fail(self, event: str, error: BaseException, **fields: Scalar | None) -> None:
        """Something went wrong."""
        known = isinstance(error, PiError)
        self.write(
            event,
            level="warning" if known else "error",
            kind=type(error).__name__,
            error=str(error) if known else f"unexpected, at {_place(error)}",
            **fields,
        )

    def take_warnings(self) -> None:
        """Write what this package says by :mod:`logging` as events."""
        logger = logging.getLogger("pi_system")
        logger.addHandler(_Handler(self))
        logger.propagate = False


class _Handler(logging.Handler):
    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.write("warning", level="warning", error=record.getMessage())


def milliseconds(seconds: float) -> float:
    """To the microsecond."""
    return round(1000 * seconds, 3)


def printer(format_: Format) -> Callable[[Event], None]:
    """Writes events to stderr: one JSON object a line, or words for people.

    What cannot be written (a full disk, a reader that has gone) is lost: a party serves on.
    """
    render = json.dumps if format_ == "json" else _words

    def show(event: Event) -> None:
        # One write, so that lines of several threads and processes stay whole.
        with contextlib.suppress(OSError):
            sys.stderr.write(render(event) + "\n")
            sys.stderr.flush()

    return show


def _words(event: Event) -> str:
    rest = {key: value for key, value in event.items() if key not in ("time", "level", "event")}
    words = [f"{key}={value}" if key != "error" else str(value) for key, value in rest.items()]
    return " ".join([str(event["time"]), str(event["event"]), *words])


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
