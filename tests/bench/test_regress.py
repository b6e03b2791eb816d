"""Regressions: found when they are there, not found in noise, refused where nothing compares."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.bench.regress import compare, permutation_test
from pi_system.errors import UsageError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture
def result() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / "run-demo-fss.json").read_text())
    return loaded


def _slower(result: dict[str, Any], phase: str, factor: float) -> dict[str, Any]:
    changed = copy.deepcopy(result)
    latency = changed[phase]["latency_ms"]
    latency["values"] = [factor * value for value in latency["values"]]
    return changed


def _worse(before: dict[str, Any], after: dict[str, Any], **options: float) -> list[str]:
    return [change.figure for change in compare(before, after, **options) if change.worse]


def test_a_result_is_no_worse_than_itself(result: dict[str, Any]) -> None:
    changes = compare(result, result)
    assert len(changes) == 9
    assert all(change.ratio == 1 and not change.worse for change in changes)


def test_a_slowdown_is_found_and_a_speedup_is_none(result: dict[str, Any]) -> None:
    assert _worse(result, _slower(result, "online", 1.5)) == ["online.latency_ms"]
    assert _worse(result, _slower(result, "offline", 1.5)) == ["offline.latency_ms"]
    assert not _worse(_slower(result, "online", 1.5), result)
    assert not _worse(result, _slower(result, "plaintext", 3))


def test_more_bytes_and_round_trips_are_found(result: dict[str, Any]) -> None:
    changed = copy.deepcopy(result)
    changed["online"]["bytes"]["server_to_client"] *= 2
    changed["online"]["round_trips"] += 2
    assert _worse(result, changed) == ["online.bytes.server_to_client", "online.round_trips"]
    assert not _worse(result, changed, threshold=1.5)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("environment.cpu", "machines"),
        ("environment.cores", "machines"),
        ("model.sha256", "measurements"),
        ("backend", "measurements"),
        ("network.name", "measurements"),
        ("batch_size", "measurements"),
    ],
)
def test_the_unlike_are_refused_by_name(result: dict[str, Any], place: str, what: str) -> None:
    changed = copy.deepcopy(result)
    *path, key = place.split(".")
    inner = changed
    for step in path:
        inner = inner[step]
    inner[key] = "another"
    with pytest.raises(UsageError, match=f"unlike {what}: {place} is .* before, another after"):
        compare(result, changed)


@given(
    st.lists(st.integers(0, 30), min_size=3, max_size=4),
    st.lists(st.integers(0, 30), min_size=3, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_the_p_value_is_that_of_all_deals(a: list[int], b: list[int]) -> None:
    """Against the exact test: every way to choose which values are the first result's."""
    pooled = [*a, *b]
    seen = statistics.median(b) - statistics.median(a)
    hits = ways = 0
    for chosen in itertools.combinations(range(len(pooled)), len(a)):
        rest = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        ways += 1
        hits += statistics.median(rest) - statistics.median(pooled[i] for i in chosen) >= seen
    assert permutation_test(a, b) == pytest.approx(hits / ways, abs=0.02)


def test_noise_alone_is_seldom_called_a_slowdown() -> None:
    generator = np.random.default_rng(7)
    draws = generator.lognormal(0, 0.1, (100, 2, 20))
    found = sum(permutation_test(list(a), list(b)) < 0.05 for a, b in draws)
    assert found <= 12  # 5 are expected; 13 or more have a chance of 0.1 %
