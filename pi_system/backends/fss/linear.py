"""Convolutions over a ring: the server's W*Z, the client's b*r' and the dealer's W'*r'.

All products are exact in Z/2^n, whoever computes them: the C kernels, or here as sums of float64
matrix products over limbs so short that no sum reaches 2^53.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import kernels, ringconv
from .program import Conv, T
from .ring import WORD, Words, near_edge, reduce, shift, signed
from .ringconv import RingConvKernel

_MANTISSA = 53


class RingConv:
    """One convolution with fixed weights.

    Args:
        op: its geometry.
        source: the input's shape (I, H, W).
        weight: words (O, I/groups, kh, kw).
        n: the ring of the result; input words need only their low ``n`` bits.
        bits: the weights lie in [-2^(bits-1), 2^(bits-1)); ``None`` for arbitrary words.
        batch: the usual number of inputs, for which the kernels choose their algorithm.
        threads: how many the kernels may use.
    """

    def __init__(
        self,
        op: Conv,
        source: tuple[int, ...],
        weight: Words,
        n: int,
        bits: int | None = None,
        *,
        batch: int = 1,
        threads: int = 1,
    ) -> None:
        self._op = op
        self._n = n
        self._bits = bits
        self._threads = threads
        self._native = kernels.native()
        self._kernel: RingConvKernel | None = None
        if self._native is not None:
            self._kernel = ringconv.prepare(
                weight=weight,
                input_shape=(source[0], source[1], source[2]),
                stride=op.stride,
                padding=op.padding,
                dilation=op.dilation,
                groups=op.groups,
                n=n,
                batch=batch,
                force=(None, self._native.instructions),
            )
        self._weight = None if self._kernel is not None else weight

    @property
    def method(self) -> str:
        """The algorithm in use."""
        return "float64 limbs" if self._kernel is None else self._kernel.algorithm

    def __call__(self, x: Words, add: Words | None = None) -> Words:
        """The convolution of (N, I, H, W) plus ``add``, new words (N, O, h, w) in Z/2^n."""
        if self._kernel is not None:
            return self._kernel(np.ascontiguousarray(x), add, threads=self._threads)
        assert self._weight is not None
        op = self._op
        weight = self._weight.reshape(op.groups, op.weight_shape[0] // op.groups, -1)
        out = to_image(op, matmul(weight, im2col(op, x), self._n, self._bits))
        return out if add is None else out + add

    def truncated(self, x: Words, add: Words, f: int, bound: int) -> tuple[Words, bool]:
        """Convolution plus ``add``, without its ``f`` lowest bits, and the zone check's finding.

        The check (see :func:`~pi_system.backends.fss.ring.near_edge`) is off where bound is 0.
        The result may take the place of ``add``.
        """
        if self._kernel is not None:
            out = add if add.flags.writeable and add.flags.c_contiguous else None
            return self._kernel.truncated(
                np.ascontiguousarray(x), np.ascontiguousarray(add), out, f=f, bound=bound,
                threads=self._threads,
            )  # fmt: skip
        v = self(x, add)
        near = bool(bound) and near_edge(v, self._n, bound)
        return shift(v, self._n, f), near


def im2col(op: Conv, x: npt.NDArray[T]) -> npt.NDArray[T]:
    """The columns (groups, I/groups * kh * kw, N * h * w) of an input (N, I, H, W)."""
    _, channels, kh, kw = op.weight_shape
    _, height, width = op.shape
    (sh, sw), (ph, pw), (dh, dw) = op.stride, op.padding, op.dilation
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    columns = np.empty((op.groups, channels, kh, kw, len(x), height, width), x.dtype)
    split = padded.reshape(len(x), op.groups, channels, *padded.shape[2:])
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (height - 1) + 1, sh)
            cols = slice(j * dw, j * dw + sw * (width - 1) + 1, sw)
            columns[:, :, i, j] = split[..., rows, cols].transpose(1, 2, 0, 3, 4)
    return columns.reshape(op.groups, channels * kh * kw, -1)


def to_image(op: Conv, rows: npt.NDArray[T]) -> npt.NDArray[T]:
    """Products (groups, O/groups, N * h * w) as an output (N, O, h, w)."""
    out, height, width = op.shape
    shaped = rows.reshape(out, -1, height, width).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(shaped)


def matmul(a: Words, b: Words, n: int, bits: int | None = None) -> Words:
    """a @ b in Z/2^n over the last two axes, through exact float64 limbs.

    Args:
        a, b: words (..., M, K) and (..., K, P).
        bits: as for :class:`RingConv`, of ``a``.
    """
    room = _MANTISSA - max(a.shape[-1] - 1, 0).bit_length()
    if bits is not None and bits <= room - 8:
        a_width, a_limbs = WORD, [signed(a, WORD).astype(np.float64)]
        b_width = min(room - bits, n)
    else:
        a_width = b_width = room // 2
        a_limbs = _limbs(a, n, a_width)
    b_limbs = _limbs(b, n, b_width)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), np.uint64)
    for i, left in enumerate(a_limbs):
        for j, right in enumerate(b_limbs):
            weight = i * a_width + j * b_width
            if weight < n:
                product = np.matmul(left, right).astype(np.int64).view(np.uint64)
                total += product << np.uint64(weight)
    return total


def _limbs(x: Words, n: int, width: int) -> list[npt.NDArray[np.float64]]:
    x = reduce(x, n)
    return [reduce(x >> np.uint64(at), width).astype(np.float64) for at in range(0, n, width)]
