"""Water-filling against its definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.errors import UsageError
from pi_system.nn.relu import LayerCount, ReLUCount
from training.allocate import allocate, fill, whole_channels

LAYERS = st.lists(
    st.tuples(st.integers(0, 500), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(LAYERS, st.floats(0, 1))
def test_exact_sum_within_the_caps(layers: list[tuple[int, float]], part: float) -> None:
    caps, weights = [c for c, _ in layers], [w for _, w in layers]
    total = round(part * sum(caps))
    result = fill(total, caps, weights)
    assert sum(result) == total
    assert all(0 <= r <= cap for r, cap in zip(result, caps, strict=True))


@settings(deadline=None)
@given(LAYERS, st.floats(0, 1))
def test_layers_that_are_not_full_are_proportional(
    layers: list[tuple[int, float]], part: float
) -> None:
    caps, weights = [c for c, _ in layers], [w for _, w in layers]
    result = fill(round(part * sum(caps)), caps, weights)
    positive = [i for i, w in enumerate(weights) if w > 1e-6]
    lowest = max(((result[i] - 1) / weights[i] for i in positive), default=0.0)
    highest = min(
        ((result[i] + 1) / weights[i] for i in positive if result[i] < caps[i]),
        default=float("inf"),
    )
    assert lowest <= highest * (1 + 1e-6) + 1e-6


@settings(deadline=None)
@given(LAYERS, st.floats(0, 1), st.integers(0, 11), st.floats(0, 1))
def test_monotone_in_the_sensitivity(
    layers: list[tuple[int, float]], part: float, index: int, more: float
) -> None:
    caps, weights = [c for c, _ in layers], [w for _, w in layers]
    index %= len(caps)
    total = round(part * sum(caps))
    before = fill(total, caps, weights)[index]
    weights[index] = min(1.0, weights[index] + more)
    assert fill(total, caps, weights)[index] >= before


def test_zero_weights_come_last() -> None:
    assert fill(5, [4, 4], [0.0, 1.0]) == [1, 4]
    assert fill(4, [4, 4], [0.0, 1.0]) == [0, 4]
    assert fill(3, [2, 4], [0.0, 0.0]) == [1, 2]


@pytest.mark.parametrize("total", [-1, 9])
def test_impossible_totals(total: int) -> None:
    with pytest.raises(UsageError, match="cannot place"):
        fill(total, [4, 4], [1.0, 1.0])


def test_bad_weights() -> None:
    with pytest.raises(UsageError, match="weight"):
        fill(1, [4, 4], [1.0, -1.0])
    with pytest.raises(UsageError, match="weight"):
        fill(1, [4, 4], [1.0])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 6), st.floats(0, 1)), min_size=1, max_size=8
    )
)
def test_whole_channels_stay_within_the_budget(layers: list[tuple[int, int, float]]) -> None:
    shapes = [(c, side, side) for c, side, _ in layers]
    budgets = [int(part * c * side * side) for c, side, part in layers]
    result = whole_channels(budgets, shapes)
    assert sum(result) <= sum(budgets)
    for value, budget, (c, side, _) in zip(result, budgets, shapes, strict=True):
        assert value % (side * side) == 0
        assert budget - side * side < value <= c * side * side


def test_allocation_by_site_name() -> None:
    count = ReLUCount((LayerCount("a", (2, 4, 4), 32, 32), LayerCount("b", (4, 2, 2), 16, 16)))
    assert allocate(count, {"b": 0.5, "a": 0.25}, 9) == {"a": 3, "b": 6}
    with pytest.raises(UsageError, match="48"):
        allocate(count, {"a": 1.0, "b": 1.0}, 49)


def test_small_shares_are_given_to_the_others() -> None:
    count = ReLUCount(tuple(LayerCount(n, (1, 10, 10), 100, 100) for n in "abc"))
    eta = {"a": 0.02, "b": 0.49, "c": 0.49}
    assert allocate(count, eta, 100) == {"a": 2, "b": 49, "c": 49}
    assert allocate(count, eta, 100, minimum=5) == {"a": 0, "b": 50, "c": 50}
    assert sum(allocate(count, eta, 202, minimum=5).values()) == 202, "the others have no room"
