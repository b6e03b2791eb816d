"""Convolutions whose weights fill their ring: the client's b*r' and the dealer's W'*r'.

Nothing is prepared, and the client's b is never in memory: ``native/wide.c`` expands its key
stream anew for every product, a panel of output channels at a time, in about the time that
reading it from memory would take. Without the C kernels b exists for one operation at a time.

Weights in *panel order* are (groups, panels, I/groups, kh, kw, 16): output channels in panels of
16, the last one of a group filled up with words that are drawn and not used.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import numpy as np

from . import kernels
from .linear import RingConv
from .prg import KeyStream
from .program import Conv
from .ring import Words

LANES: Final = 16


def panel_shape(op: Conv) -> tuple[int, ...]:
    """The shape of an operation's weights in panel order."""
    out, channels, kh, kw = op.weight_shape
    return (op.groups, -(-(out // op.groups) // LANES), channels, kh, kw, LANES)


def to_panels(op: Conv, weight: Words) -> Words:
    """Weights (O, I/groups, kh, kw) in panel order, contiguous, filled up with zeros."""
    groups, panels, *taps, _ = panel_shape(op)
    out = op.weight_shape[0] // groups
    result = np.zeros(panel_shape(op), np.uint64)
    split = weight.reshape(groups, out, *taps)
    for panel in range(panels):
        part = split[:, panel * LANES : (panel + 1) * LANES]
        result[:, panel, ..., : part.shape[1]] = np.moveaxis(part, 1, -1)
    return result


def from_panels(op: Conv, words: Words) -> Words:
    """The other way round: (O, I/groups, kh, kw)."""
    groups, panels, *taps, _ = panel_shape(op)
    split = np.moveaxis(words.reshape(panel_shape(op)), -1, 2)
    flat = split.reshape(groups, panels * LANES, *taps)
    return flat[:, : op.weight_shape[0] // groups].reshape(op.weight_shape)


class WideConv:
    """One convolution in Z/2^n.

    Args:
        op: its geometry.
        source: the input's shape (I, H, W).
        weight: words in panel order, or the key stream that gives them.
    """

    def __init__(
        self, op: Conv, source: tuple[int, ...], weight: Words | KeyStream, n: int
    ) -> None:
        assert isinstance(weight, KeyStream) or weight.shape == panel_shape(op)
        self._op = op
        self._source = source
        self._weight = weight
        self._n = n
        self._geometry = np.array(
            [
                *source, op.shape[0], *op.weight_shape[2:], *op.stride, *op.padding,
                *op.dilation, op.groups, *op.shape[1:],
            ],
            np.int32,
        )  # fmt: skip

    def __call__(self, x: Words, add: Words | None = None) -> Words:
        """The convolution of (N, I, H, W) plus ``add``, new words (N, O, h, w) in Z/2^n."""
        op, native = self._op, kernels.native()
        if native is None:
            weight = from_panels(op, self._words())
            return RingConv(op, self._source, weight, self._n)(x, add)
        library = _library(native.code)
        isa = None if native.instructions is None else native.instructions.encode()
        key = words = None
        if isinstance(self._weight, KeyStream) and library.pi_wide_expands(isa):
            key = self._weight.key
        else:
            words = self._words()
        x = np.ascontiguousarray(x)
        assert x.shape == (len(x), *self._source) and x.dtype == np.uint64
        out = np.empty((len(x), *op.shape), np.uint64)
        if add is not None:
            add = np.ascontiguousarray(add)
            assert add.shape == out.shape and add.dtype == np.uint64
        if library.pi_wide_run(
            self._geometry.ctypes.data, isa, None if words is None else words.ctypes.data, key,
            x.ctypes.data, None if add is None else add.ctypes.data, out.ctypes.data, len(x),
        ):  # fmt: skip
            raise MemoryError("no memory for a convolution")
        return out

    def _words(self) -> Words:
        if isinstance(self._weight, KeyStream):
            size = int(np.prod(panel_shape(self._op)))
            return self._weight.open().words(size).reshape(panel_shape(self._op))
        return self._weight


@functools.cache
def _library(library: ctypes.CDLL) -> Any:
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    library.pi_wide_expands.restype, library.pi_wide_expands.argtypes = number, [text]
    library.pi_wide_run.restype = number
    library.pi_wide_run.argtypes = [
        pointer, text, pointer, text, pointer, pointer, pointer, number,
    ]  # fmt: skip
    return library
