"""Arithmetic in Z/2^n, and reals as fixed-point ring elements.

A ring element is held in a 64-bit word. Words are reduced lazily: two words stand for the same
element of Z/2^n when their low n bits agree, and sums and products of words are right in every
ring with n <= 64. Only packing, shifting and comparing reduce.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

WORD = 64


def ones(n: int) -> np.uint64:
    """The word with its low ``n`` bits set, 0 <= n <= 64."""
    return np.uint64((1 << n) - 1)


def reduce(x: Words, n: int) -> Words:
    """The representative in [0, 2^n)."""
    return x & ones(n)


def signed(x: Words, n: int) -> npt.NDArray[np.int64]:
    """The representative in [-2^(n-1), 2^(n-1))."""
    spare = np.uint64(WORD - n)
    return (x << spare).view(np.int64) >> np.int64(WORD - n)


def shift(x: Words, n: int, f: int) -> Words:
    """Drop ``f`` fractional bits of the signed representative, rounding down."""
    return (signed(x, n) >> np.int64(f)).view(np.uint64)


def encode(x: npt.ArrayLike, f: int) -> Words:
    """Reals to words with ``f`` fractional bits, to the nearest."""
    scaled = np.rint(np.asarray(x, np.float64) * 2.0**f)
    return np.ascontiguousarray(scaled.astype(np.int64)).view(np.uint64)


def decode(x: Words, n: int, f: int) -> Floats:
    """Elements of Z/2^n to reals."""
    return signed(x, n).astype(np.float64) * 2.0**-f


def near_edge(v: Words, n: int, bound: int) -> bool:
    """Whether any signed representative lies within ``bound`` of +-2^(n-1) (the zone check)."""
    edge = 1 << (n - 1)
    if bound >= edge:
        return True
    return bool((reduce(v - np.uint64(edge - bound), n) < np.uint64(2 * bound)).any())
