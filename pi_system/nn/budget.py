"""SENet's stage 1 rule: a ReLU budget divided over the layers (ICLR 2023, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from ..errors import UsageError


def allocate(sizes: Sequence[int], sensitivity: Sequence[float], budget: int) -> tuple[int, ...]:
    """r_l = min(n_l, lambda * eta_l) with lambda such that the r_l sum to ``budget`` exactly.

    Args:
        sizes: n_l, activation positions of each layer.
        sensitivity: eta_l > 0, ReLU sensitivity of each layer; only ratios matter.
        budget: ReLUs to keep, 0 to ``sum(sizes)``.

    Raises:
        UsageError: the budget is outside that range, or a sensitivity is not positive.
    """
    if not 0 <= budget <= sum(sizes):
        raise UsageError(
            f"a budget of {budget} ReLUs is outside 0 to {sum(sizes)}, all this network has"
        )
    if len(sizes) != len(sensitivity) or not all(0 < s < math.inf for s in sensitivity):
        raise UsageError("every layer needs a sensitivity above 0")
    # Layers fill up in the order of n_l / eta_l; the rest share what remains.
    eta = [Fraction(s) for s in sensitivity]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i] / eta[i])
    left, weight, level = Fraction(budget), sum(eta, Fraction()), Fraction()
    for i in order:
        level = left / weight
        if sizes[i] > level * eta[i]:
            break
        left -= sizes[i]
        weight -= eta[i]
    exact = [min(Fraction(n), level * s) for n, s in zip(sizes, eta, strict=True)]
    counts = [math.floor(e) for e in exact]
    # Largest remainders first, the later layer on a tie: it is the more sensitive one.
    spare = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], -i))
    missing = budget - sum(counts)
    while missing:
        for i in spare:
            if missing and counts[i] < sizes[i]:
                counts[i] += 1
                missing -= 1
    return tuple(counts)
