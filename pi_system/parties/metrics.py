"""``/metrics`` for Prometheus, ``/healthz`` for supervisors and ``/status`` for people.

Plain HTTP without authentication: for loopback, or a network of operators only. It tells counts,
times and who connected, nothing of what a session carries.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ..errors import UsageError
from .address import Address
from .journal import Event
from .tally import Tally

_BUCKETS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PATIENCE: Final = 5.0
"""Seconds that one who asks may take."""


class Metrics:
    """Counts a journal's events for Prometheus."""

    def __init__(self, tally: Tally) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._inferences = Counter("pi_inferences", "Inferences answered.", registry=registry)
        self._material = Counter(
            "pi_material", "Inferences whose material was made.", registry=registry
        )
        self._sessions = Counter("pi_sessions", "Sessions over.", ["outcome"], registry=registry)
        self._refusals = Counter("pi_refusals", "Sessions not begun.", ["kind"], registry=registry)
        self._seconds = Histogram(
            "pi_request_seconds",
            "Time of a request.",
            ["phase"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._bytes = Counter(
            "pi_bytes", "Bytes of requests, all peers.", ["phase", "direction"], registry=registry
        )
        gauge = Gauge("pi_sessions_running", "Sessions that run.", registry=registry)
        gauge.set_function(lambda: tally.running)
        gauge = Gauge("pi_sessions_waiting", "Sessions that wait for a place.", registry=registry)
        gauge.set_function(lambda: tally.waiting)
        if tally.material() is not None:
            gauge = Gauge(
                "pi_material_left", "Inferences whose material is in stock.", registry=registry
            )
            gauge.set_function(lambda: _number(tally.material()))

    def read(self, event: Event) -> None:
        """Count an event."""
        match event["event"]:
            case "request":
                phase = str(event["phase"])
                if phase == "online":
                    self._inferences.inc()
                elif phase == "offline":
                    self._material.inc(float(event["count"]))
                if "ms" in event:
                    self._seconds.labels(phase).observe(float(event["ms"]) / 1000)
                for direction in ("sent", "received"):
                    if direction in event:
                        self._bytes.labels(phase, direction).inc(float(event[direction]))
            case "ended" | "failed" as outcome:
                self._sessions.labels(outcome).inc()
            case "refused":
                self._refusals.labels(str(event["kind"])).inc()

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


def _number(value: int | None) -> float:
    return math.nan if value is None else value


@contextlib.contextmanager
def serving(at: Address, tally: Tally, metrics: Metrics) -> Iterator[Address]:
    """Answer on ``at`` until the block ends; yields the address, where the port was 0.

    Raises:
        UsageError: the address cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE

        def do_GET(self) -> None:
            found = pages.get(self.path.partition("?")[0])
            code, kind, body = (404, "text/plain", b"no such page\n") if not found else found()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    def health() -> tuple[int, str, bytes]:
        if tally.stopping:
            return 503, "text/plain", b"stopping\n"
        return 200, "text/plain", b"serving\n"

    pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {
        "/metrics": lambda: (200, CONTENT_TYPE_LATEST, metrics.text()),
        "/healthz": health,
        "/status": lambda: (200, "application/json", json.dumps(tally.to_json()).encode()),
    }

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Whoever asked has gone."""

    try:
        server = Server(at, Handler)
    except OSError as error:
        raise UsageError(f"cannot serve metrics on {at}: {error.strerror or error}") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True, name="metrics")
    thread.start()
    try:
        yield Address(*server.server_address[:2])  # type: ignore[arg-type]
    finally:
        server.shutdown()
        server.server_close()
