"""Whether values look uniform: chi-square tests with their p-values.

All take samples of one field: ``values`` (runs, positions) of ``width`` bits each. Under the
hypothesis that all bits are independent fair coins every p-value is uniform in (0, 1).
"""

from __future__ import annotations

import math

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
    * ``low``, ``high``: the histogram of the lowest and of the highest bits;
    * ``pairs``: every bit of every position against the same bit one run later: a mask used twice.
    """
    runs, positions = values.shape
    bits = _bits(values, width)
    found = {
        "bits": _coins(bits.sum(axis=(0, 1)), runs * positions),
        "places": _coins(bits.sum(axis=0).reshape(-1), runs),
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


def _bits(values: Words, width: int) -> npt.NDArray[np.uint8]:
    """(runs, positions, width)"""
    raw = np.ascontiguousarray(values).astype("<u8").view(np.uint8).reshape(*values.shape, 8)
    return np.unpackbits(raw, axis=2, bitorder="little")[:, :, :width]


def _coins(heads: npt.NDArray[np.integer], tosses: int) -> float:
    excess = 2.0 * heads.astype(np.float64) - tosses
    return tail(float((excess**2).sum() / tosses), heads.size)


def _histogram(values: Words, bits: int) -> float:
    cells = np.bincount(values.reshape(-1).astype(np.int64), minlength=1 << bits)
    expected = values.size / cells.size
    return tail(float(((cells - expected) ** 2 / expected).sum()), cells.size - 1)
