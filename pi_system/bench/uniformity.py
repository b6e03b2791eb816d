"""Whether values look uniform: chi-square tests with their p-values.

All take samples of one field: ``values`` (runs, positions) of ``width`` bits each. Under the
hypothesis that all bits are independent fair coins every p-value is uniform in (0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


def tail(statistic: float, degrees: int) -> float:
    """The probability of a chi-square of ``degrees`` degrees to exceed ``statistic``."""
    import torch

    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def p_values(values: Words, width: int) -> dict[str, float]:
    """The p-value of every test that the sample is large enough for.

    * ``bits``: every bit of the width, over runs and positions together: a biased mask;
    * ``places``: every bit of every position, over runs: a mask that is the same in each run, or a
      value that lies open;
    * ``planes``: the same for each bit apart, the worst of them: a bias of one bit that data of
      either sign would average out;
    * ``low``, ``high``: the histogram of the lowest and of the highest bits;
    * ``pairs``: every bit of every position against the same bit one run later: a mask used twice.
    """
    runs, positions = values.shape
    bits = _bits(values, width)
    heads = bits.sum(axis=0)
    found = {
        "bits": _coins(bits.sum(axis=(0, 1)), runs * positions),
        "places": _coins(heads.reshape(-1), runs),
        "planes": worst(_coins(heads[:, bit], runs) for bit in range(width)),
    }
    if runs > 1:
        changed = (bits[1::2] ^ bits[: runs - runs % 2 : 2]).sum(axis=0)
        found["pairs"] = _coins(changed.reshape(-1), runs // 2)
    room = int(math.log2(max(values.size / 16, 1)))
    cells = min(width, 8, room)
    if cells:
        found["low"] = _histogram(values & np.uint64((1 << cells) - 1), cells)
        found["high"] = _histogram(values >> np.uint64(width - cells), cells)
    return found


def alike(values: Words, width: int) -> float:
    """Whether any two runs, however far apart, have the same highest bits too often.

    A mask used twice covers two small values by nearly the same word. By Chernoff's bound, times
    the number of pairs.
    """
    runs, positions = values.shape
    cells = min(width, 8)
    top = (values >> np.uint64(width - cells)).astype(np.uint8)
    chance = 1 / (1 << cells)
    most = max(
        (int((top[run + 1 :] == top[run]).sum(axis=1).max()) for run in range(runs - 1)), default=0
    )
    rate = most / positions
    if rate <= chance:
        return 1.0
    distance = rate * math.log(rate / chance)
    if rate < 1:
        distance += (1 - rate) * math.log((1 - rate) / (1 - chance))
    return min(1.0, float(runs * (runs - 1) / 2 * math.exp(-positions * distance)))


EXPECTED: Final = 64
"""Least expected count of a histogram's cell, for the chi-square's tail to be right."""


class Histogram:
    """Byte by byte counts of many values of ``width`` bits, in two groups of runs."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._places = -(-width // 8)
        self._counts = np.zeros((2, self._places, 256), np.int64)

    def add(self, values: Words, group: int) -> None:
        """Count values (positions,) in group 0 or 1."""
        raw = np.ascontiguousarray(values).astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
        for place in range(self._places):
            self._counts[group, place] += np.bincount(raw[:, place], minlength=256)

    def p_values(self) -> dict[str, float]:
        """Over all values:

        * ``all bits``: every bit of the width;
        * ``bytes``: every byte, or half of it where values are few: the worst place;
        * ``groups``: whether the two groups have the same distribution, likewise.
        """
        total = int(self._counts[:, 0].sum())
        if not total:
            return {}
        both = self._counts.sum(axis=0)
        heads = (both @ _SET_BITS).reshape(-1)[: self._width]
        found = {"all bits": _coins(heads, total)}
        cells = [self._cells(place) for place in range(self._places)]
        large = [cell for cell in cells if cell.sum() >= EXPECTED * cell.shape[1]]
        if large:
            found["bytes"] = worst(_fair(cell.sum(axis=0)) for cell in large)
        split = [cell for cell in large if (cell.sum(axis=1) >= EXPECTED * cell.shape[1]).all()]
        if split:
            found["groups"] = worst(_same(cell) for cell in split)
        return found

    def _cells(self, place: int) -> npt.NDArray[np.int64]:
        """(2, cells) of one place: as many cells as there are counts for."""
        bits = min(8, self._width - 8 * place)
        counts = self._counts[:, place, : 1 << bits]
        while bits > 1 and counts.sum(axis=1).min() < EXPECTED << bits:
            bits -= 1
            counts = counts.reshape(2, -1, 2).sum(axis=2)
        return counts


def worst(p_values: Iterable[float]) -> float:
    """One p-value for several: the least, times their number."""
    values = list(p_values)
    return min(1.0, min(values) * len(values))


_SET_BITS: Final = np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(np.int64)
"""(256, 8)"""


def _fair(counts: npt.NDArray[np.int64]) -> float:
    expected = counts.sum() / counts.size
    return tail(float(((counts - expected) ** 2 / expected).sum()), counts.size - 1)


def _same(counts: npt.NDArray[np.int64]) -> float:
    """(2, cells): one distribution for both rows?"""
    share = counts.sum(axis=1, keepdims=True) / counts.sum()
    expected = share * counts.sum(axis=0)
    used = expected > 0
    statistic = ((counts - expected) ** 2)[used] / expected[used]
    return tail(float(statistic.sum()), max(int(used[0].sum()) - 1, 1))


def _bits(values: Words, width: int) -> npt.NDArray[np.uint8]:
    """(runs, positions, width)"""
    raw = np.ascontiguousarray(values).astype("<u8").view(np.uint8).reshape(*values.shape, 8)
    return np.unpackbits(raw, axis=2, bitorder="little")[:, :, :width]


def _coins(heads: npt.NDArray[np.integer], tosses: int) -> float:
    excess = 2.0 * heads.astype(np.float64) - tosses
    return tail(float((excess**2).sum() / tosses), heads.size)


def _histogram(values: Words, bits: int) -> float:
    return _fair(np.bincount(values.reshape(-1).astype(np.int64), minlength=1 << bits))
