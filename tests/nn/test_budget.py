"""The stage 1 rule against its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi_system.errors import UsageError
from pi_system.nn.budget import allocate

LAYERS = st.lists(st.tuples(st.integers(1, 5000), st.floats(0.01, 1.0)), min_size=1, max_size=20)


@given(LAYERS, st.floats(0, 1))
def test_the_rule_holds_and_the_sum_is_exact(layers: list[tuple[int, float]], share: float) -> None:
    sizes, sensitivity = [n for n, _ in layers], [s for _, s in layers]
    budget = round(share * sum(sizes))
    counts = allocate(sizes, sensitivity, budget)
    assert sum(counts) == budget
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))
    # Some lambda explains all layers to within the rounding of one position each.
    open_layers = [i for i, (c, n) in enumerate(zip(counts, sizes, strict=True)) if c < n]
    lowest = max((counts[i] - 1) / sensitivity[i] for i in range(len(sizes)))
    highest = min(((counts[i] + 1) / sensitivity[i] for i in open_layers), default=float("inf"))
    assert lowest <= highest * (1 + 1e-9)


def test_published_layers_of_resnet18() -> None:
    from pi_system.models import RESNET18_SENSITIVITY

    sizes = [65536] * 5 + [32768] * 4 + [16384] * 4 + [8192] * 4
    counts = allocate(sizes, RESNET18_SENSITIVITY, 100_000)
    # CIFAR-100 at 100k: lambda is 11,077 and the last four layers are full.
    assert counts[-4:] == (8192,) * 4
    for count, eta in zip(counts[:-4], RESNET18_SENSITIVITY, strict=False):
        assert abs(count - 11_077 * eta) < 0.01 * 11_077


@pytest.mark.parametrize("budget", [-1, 11])
def test_impossible_budgets(budget: int) -> None:
    with pytest.raises(UsageError, match="outside 0 to 10"):
        allocate([4, 6], [1, 1], budget)


def test_a_sensitivity_must_be_positive() -> None:
    with pytest.raises(UsageError, match="sensitivity"):
        allocate([4, 6], [1, 0], 3)
