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


@pytest.mark.parametrize("width", [1, 5, 13, 64])
def test_histograms_of_fair_bits_pass(width: int) -> None:
    rng = np.random.default_rng(width)
    low: dict[str, list[float]] = {}
    for _ in range(60):
        histogram = uniformity.Histogram(width)
        for group in (0, 1):
            values = rng.integers(0, 2**64, 30_000, np.uint64) >> np.uint64(64 - width)
            histogram.add(values, group)
        for name, p in histogram.p_values().items():
            low.setdefault(name, []).append(p)
    assert set(low) == {"all bits", "bytes", "groups"}
    for name, found in low.items():
        assert min(found) > 1e-6, name
        assert np.mean(found) > 0.3, name


def test_histograms_of_unfair_bits_fail() -> None:
    rng = np.random.default_rng(0)
    fair = rng.integers(0, 2**13, 30_000, np.uint64)
    top = np.uint64(1 << 12)
    biased = fair | np.where(rng.random(fair.shape) < 0.1, top, np.uint64(0))
    triangular = fair & rng.integers(0, 2**13, 30_000, np.uint64)
    parity = fair & ~np.uint64(1) | (fair >> np.uint64(3) & np.uint64(1))

    def failed(first: uniformity.Words, second: uniformity.Words) -> set[str]:
        histogram = uniformity.Histogram(13)
        histogram.add(first, 0)
        histogram.add(second, 1)
        return {name for name, p in histogram.p_values().items() if p < 1e-9}

    assert failed(fair, rng.integers(0, 2**13, 30_000, np.uint64)) == set()
    assert failed(biased, biased) == {"all bits", "bytes"}
    assert failed(triangular, triangular) == {"all bits", "bytes"}
    assert failed(parity, parity) == {"bytes"}
    assert "groups" in failed(fair, biased)
    # Biases that cancel over the two groups: only their difference tells.
    assert "groups" in failed(fair | top, fair & ~top)
    assert "all bits" not in failed(fair | top, fair & ~top)


def test_masks_that_come_again_are_alike() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 2**10, (20, 64), np.uint64)
    masks = rng.integers(0, 2**48, (20, 64), np.uint64)
    assert uniformity.alike(small + masks & np.uint64(2**48 - 1), 48) > 1e-3
    masks[17] = masks[3]
    assert uniformity.alike(small + masks & np.uint64(2**48 - 1), 48) < 1e-9
    assert uniformity.alike(masks[:1], 48) == 1.0


def test_a_bias_that_changes_sign_with_the_position_is_seen_bit_by_bit() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**16, (16, 512), np.uint64)
    signs = rng.integers(0, 2, 512, np.uint64)
    bit = (rng.random(values.shape) < 0.75).astype(np.uint64) ^ signs
    values = values & ~np.uint64(1 << 9) | bit << np.uint64(9)
    found = uniformity.p_values(values, 16)
    assert found["planes"] < 1e-12 and found["bits"] > 1e-6
