"""Exact top-k, the random start, Hamming distance, distillation loss, the search itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.errors import UsageError
from training.losses import distillation
from training.masks import hamming, random_mask, top, top_channels


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_top_keeps_exactly_k_largest(values: list[int], draw: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    count = draw.draw(st.integers(0, len(values)))
    mask = top(scores, count)
    assert int(mask.sum()) == count
    if 0 < count < len(values):
        assert scores[mask].min() >= scores[~mask].max()


def test_ties_go_to_the_earlier_position() -> None:
    assert top(torch.zeros(2, 2, 2), 3).flatten().tolist() == [True] * 3 + [False] * 5
    assert not top(torch.zeros(4), 0).any()
    assert top(torch.zeros(4), 4).all()
    with pytest.raises(UsageError, match="cannot keep"):
        top(torch.zeros(4), 5)


def test_channels_are_kept_whole() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1).expand(3, 2, 2)
    mask = top_channels(scores, 8)
    assert mask.flatten(1).all(1).tolist() == [False, True, True]
    assert int(mask.sum()) == 8
    with pytest.raises(UsageError, match="whole number"):
        top_channels(scores, 7)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_random_masks_have_the_exact_count(channels: int, side: int, draw: st.DataObject) -> None:
    count = draw.draw(st.integers(0, channels * side * side))
    generator = torch.Generator().manual_seed(0)
    mask = random_mask((channels, side, side), count, "pixel", generator)
    assert int(mask.sum()) == count
    per_pixel = mask.flatten(1).sum(0)
    mixed = (per_pixel != 0) & (per_pixel != channels)
    assert int(mixed.sum()) == (count % channels != 0), "the same over the channels but for one"
    whole = count // (side * side) * side * side
    mask = random_mask((channels, side, side), whole, "channel", generator)
    assert int(mask.sum()) == whole


def test_hamming_is_the_part_that_differs() -> None:
    old = {"a": torch.tensor([True, False]), "b": torch.tensor([True, True])}
    new = {"a": torch.tensor([True, True]), "b": torch.tensor([True, True])}
    assert hamming(old, new) == 0.25
    assert hamming(old, old) == 0


def test_distillation_loss() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(distillation(logits, logits, 4.0)) == pytest.approx(0, abs=1e-5)
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    p = math.exp(1) / (1 + math.exp(1))
    expected = 16 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert float(distillation(student, teacher, 4.0)) == pytest.approx(expected, rel=1e-5)
