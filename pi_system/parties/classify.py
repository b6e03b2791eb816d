"""One client session from images to a report: warm up, then inference after inference, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RefusedError
from .client import Client, ClientSettings
from .commands import MAX_LOAD
from .images import normalise
from .process import peak_memory

_PINGS = 15
_FIRST_PINGS = 3
"""Not counted: what they run is not in the processors' caches yet."""
_SLOW_MS = 5.0
"""Round trip from which on fewer pings do."""
_LOAD = 1 << 20
"""Bytes sent to measure the bandwidth, at least."""
_LOADS = 3
_LOAD_SECONDS = 0.1
"""No further load once they have taken so long together."""


@dataclass(frozen=True)
class Inference:
    """One inference on the client's clock.

    Attributes:
        images: positions of its images among those given (a padded batch repeats the last).
        online_seconds: from holding the images to holding the logits.
        offline_seconds: laying the material of this inference on all sides.
        logits: (len(images), classes); lists in :meth:`ClientReport.to_json`.
    """

    number: int
    images: tuple[int, ...]
    offline_seconds: float
    online_seconds: float
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class ClientReport:
    """What a client knows after its session; JSON-able by :meth:`to_json`.

    Attributes:
        metadata: the model's public metadata.
        setup_seconds: from the first connection to the end of the setup phase.
        round_trip_seconds: of a few empty messages.
        megabits: measured bandwidth from client to server, 10^6 bit/s.
        inferences: without warm-ups.
        facts: of the backend's session.
        meter: see :meth:`Meter.to_json`.
    """

    backend: str
    batch: int
    threads: int
    sha256: str
    metadata: dict[str, Any]
    setup_seconds: float
    round_trip_seconds: list[float]
    megabits: float
    warmup: int
    inferences: list[Inference]
    facts: dict[str, Any]
    meter: dict[str, Any]
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        for inference in data["inferences"]:
            inference["logits"] = inference["logits"].tolist()
        return data


def classify(
    settings: ClientSettings,
    images: npt.NDArray[Any],
    *,
    repeat: int = 1,
    warmup: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ClientReport:
    """Classify every image at least once, in batches, one inference after another.

    Args:
        images: (N, C, H, W) normalised float32, or uint8 (see :func:`normalise`).
        repeat: run at least so many inferences, starting over with the first image.
        warmup: inferences on the first batch before these, not reported.
        progress: called between inferences, never inside a timed region.

    Raises:
        UsageError: the images do not fit the model.
        RefusedError: the session has no dealer, and the store too little material.
        PiError: the session failed.
    """
    started = time.perf_counter()
    with Client(settings) as client:
        graph = client.model.graph
        inputs = normalise(images, graph.metadata, graph.input.shape)
        client.setup()
        setup_seconds = time.perf_counter() - started
        round_trips = _round_trips(client, settings)
        megabits = _bandwidth(client, settings, min(round_trips))
        batches = _batches(len(inputs), settings.batch)
        total = warmup + max(repeat, len(batches))
        if not settings.dealers and client.stock < total:
            raise RefusedError(
                f"there is one-time material for {client.stock} inferences in the store, not for "
                f"{total}, and no dealer to make more: prepare some with a dealer first"
            )
        inferences: list[Inference] = []
        for number in range(total):
            rows = batches[max(0, number - warmup) % len(batches)]
            padded = inputs[[*rows, *[rows[-1]] * (settings.batch - len(rows))]]
            offline_seconds, _ = _timed(partial(client.offline, 1))
            online_seconds, logits = _timed(partial(client.online, padded))
            if number >= warmup:
                values = np.asarray(logits, np.float32)[: len(rows)]
                inferences.append(Inference(number, rows, offline_seconds, online_seconds, values))
            progress(number + 1, total)
        facts = client.facts()
    return ClientReport(
        backend=settings.backend_name,
        batch=settings.batch,
        threads=settings.threads,
        sha256=client.model.sha256,
        metadata=dict(graph.metadata),
        setup_seconds=setup_seconds,
        round_trip_seconds=round_trips,
        megabits=megabits,
        warmup=warmup,
        inferences=inferences,
        facts=facts,
        meter=client.meter.to_json(),
        peak_memory=peak_memory(),
    )


def _round_trips(client: Client, settings: ClientSettings) -> list[float]:
    slow = settings.link is not None and settings.link.rtt_ms > _SLOW_MS
    first, count = (1, _PINGS // 3) if slow else (_FIRST_PINGS, _PINGS)
    return [_timed(client.ping)[0] for _ in range(first + count)][first:]


def _bandwidth(client: Client, settings: ClientSettings, round_trip: float) -> float:
    """Of loads that fill the link for several round trips, once the window is open."""
    link = settings.link
    size = _LOAD
    if link is not None:
        size = min(max(size, int(link.mbps * 500 * link.rtt_ms)), MAX_LOAD)
    client.load(size)
    loads: list[float] = []
    while len(loads) < _LOADS and sum(loads) < _LOAD_SECONDS:
        loads.append(_timed(partial(client.load, size))[0])
    return 8e-6 * size / max(statistics.median(loads) - round_trip, 1e-9)


def prepare(settings: ClientSettings, count: int) -> int:
    """Lay in one-time material for ``count`` inferences of later sessions.

    Returns:
        how many inferences there is material for then.

    Raises:
        PiError: the session failed; what was laid in before stays.
    """
    with Client(settings) as client:
        client.setup()
        return client.prepare(count)


def _batches(count: int, batch: int) -> list[tuple[int, ...]]:
    return [tuple(range(i, min(i + batch, count))) for i in range(0, count, batch)]


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result
