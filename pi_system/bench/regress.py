"""Is the second of two results of one measurement worse than the first?

Latencies are compared by their raw values: a slowdown counts when the medians differ by more
than ``threshold`` and a permutation test finds a difference this large in fewer than ``level``
of the ways to deal the values out to the two results. Bytes and round trips are exact, so any
growth beyond ``threshold`` counts. Results of unlike machines or measurements are refused.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from .schema import SCHEMA_VERSION

LEVEL: Final = 0.01
THRESHOLD: Final = 0.05
_DEALS: Final = 20_000

_MACHINE: Final = ("cpu", "cpu_flags", "cores", "cores_usable", "machine", "kernels")
_MEASUREMENT: Final = (
    "model.sha256",
    "backend",
    "batch_size",
    "threads_per_party",
    "network.name",
)
_PLAINTEXT: Final = "plaintext.latency_ms"
_LATENCIES: Final = ("online.latency_ms", "offline.latency_ms", _PLAINTEXT)
_COUNTS: Final = (
    "online.bytes.client_to_server",
    "online.bytes.server_to_client",
    "offline.bytes.dealer_to_server",
    "offline.bytes.dealer_to_client",
    "offline.bytes.client_to_server",
    "online.round_trips",
)


@dataclass(frozen=True)
class Change:
    """One figure before and after.

    Attributes:
        before, after: medians of a latency in milliseconds, or a count.
        ratio: after / before.
        p: how often chance alone gives a difference this large; None for counts.
        worse: whether it counts as a regression.
    """

    figure: str
    before: float
    after: float
    ratio: float
    p: float | None
    worse: bool


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    threshold: float = THRESHOLD,
    level: float = LEVEL,
) -> list[Change]:
    """Every figure of two results of ``pi-bench run``.

    Plaintext's latency is among them, for the reader, but never counts: it tells a slower
    machine from slower code.

    Raises:
        UsageError: the results are not of like machines and the same measurement.
    """
    _check_alike(before, after)
    changes = []
    for figure in _LATENCIES:
        a, b = (_values(result, figure) for result in (before, after))
        ratio = statistics.median(b) / statistics.median(a)
        p = permutation_test(a, b)
        worse = figure != _PLAINTEXT and ratio > 1 + threshold and p < level
        changes.append(Change(figure, statistics.median(a), statistics.median(b), ratio, p, worse))
    for figure in _COUNTS:
        x, y = (float(_get(result, figure)) for result in (before, after))
        ratio = y / x if x else (1.0 if x == y else float("inf"))
        changes.append(Change(figure, x, y, ratio, None, ratio > 1 + threshold))
    return changes


def read(path: Path) -> dict[str, Any]:
    """A result of ``pi-bench run --format json``.

    Raises:
        UsageError: the file holds no such thing.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or "online" not in data:
        raise UsageError(
            f"{path} is no result of pi-bench run --format json, schema version {SCHEMA_VERSION}"
        )
    return dict(data)


def print_changes(console: Console, changes: Sequence[Change]) -> None:
    """The changes as a table."""
    table = Table(title="Before and after")
    for column in ("figure", "before", "after", "ratio", "chance", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for change in changes:
        table.add_row(
            change.figure,
            f"{change.before:,.6g}",
            f"{change.after:,.6g}",
            f"{change.ratio:.3f}",
            "" if change.p is None else f"{change.p:.2g}",
            "[red]WORSE[/red]" if change.worse else "",
        )
    console.print(table)


def permutation_test(a: Sequence[float], b: Sequence[float]) -> float:
    """How often values dealt out by chance put the second median this far above the first.

    One-sided; (hits + 1) / (deals + 1), so never zero (Phipson and Smyth 2010).
    """
    pooled = np.array([*a, *b], np.float64)
    seen = np.median(b) - np.median(a)
    generator = np.random.default_rng(0)  # of a statistical test, not of a protocol
    deals = generator.permuted(np.broadcast_to(pooled, (_DEALS, len(pooled))), axis=1)
    differences = np.median(deals[:, len(a) :], axis=1) - np.median(deals[:, : len(a)], axis=1)
    hits = int((differences >= seen - 1e-12).sum())
    return (hits + 1) / (_DEALS + 1)


def _check_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for place in (*(f"environment.{key}" for key in _MACHINE), *_MEASUREMENT):
        a, b = _get(before, place), _get(after, place)
        if a != b:
            what = "machines" if place.startswith("environment") else "measurements"
            raise UsageError(
                f"the results are of unlike {what}: {place} is {_brief(a)} before, "
                f"{_brief(b)} after"
            )


def _values(result: Mapping[str, Any], figure: str) -> list[float]:
    values = _get(result, f"{figure}.values")
    if not isinstance(values, list) or not values:
        raise UsageError(f"a result has no values of {figure}")
    return [float(value) for value in values]


def _get(result: Mapping[str, Any], place: str) -> Any:
    value: Any = result
    for key in place.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
