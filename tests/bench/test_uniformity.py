"""The uniformity tests against known tails, fair bits and every kind of unfair ones."""

from __future__ import annotations

import numpy as np
import pytest

from pi_system.bench import uniformity


@pytest.mark.parametrize(
    ("statistic", "degrees", "expected"),
    [(3.841459, 1, 0.05), (18.307038, 10, 0.05), (330.519744, 255, 0.001), (0.0, 4, 1.0)],
)
def test_tails_of_the_tables(statistic: float, degrees: int, expected: float) -> None:
    assert uniformity.tail(statistic, degrees) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("width", [1, 5, 13, 64])
@pytest.mark.parametrize("shape", [(40, 7), (101, 30)])
def test_fair_bits_pass(width: int, shape: tuple[int, int]) -> None:
    """The p-values of many samples are spread evenly, and none is tiny."""
    rng = np.random.default_rng(width)
    low: dict[str, list[float]] = {}
    for _ in range(60):
        values = rng.integers(0, 2**64, shape, np.uint64) >> np.uint64(64 - width)
        for name, p in uniformity.p_values(values, width).items():
            low.setdefault(name, []).append(p)
    for name, found in low.items():
        assert min(found) > 1e-6, name
        assert 0.2 < np.mean(found) < 0.8, name


def test_unfair_bits_fail() -> None:
    rng = np.random.default_rng(0)
    fair = rng.integers(0, 2**12, (200, 20), np.uint64)
    fixed = np.repeat(fair[:1], 200, axis=0)
    halves = np.repeat(fair[::2], 2, axis=0)
    biased = fair | (rng.random(fair.shape) < 0.3).astype(np.uint64) << np.uint64(11)
    short = fair & np.uint64(2**11 - 1)
    skewed = np.minimum(fair, rng.integers(0, 2**12, fair.shape, np.uint64))
    for name, values, tests in (
        ("the same in every run", fixed, {"places", "pairs"}),
        ("every value twice", halves, {"pairs"}),
        ("a biased top bit", biased, {"bits", "high"}),
        ("a bit too short", short, {"bits", "places", "high"}),
        ("small values more often", skewed, {"bits", "high"}),
    ):
        found = uniformity.p_values(values, 12)
        assert tests <= {test for test, p in found.items() if p < 1e-12}, name
