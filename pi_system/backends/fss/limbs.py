"""Convolutions over a ring on a torch device, exact in float64.

Words are cut into limbs so short that no sum of products of limbs reaches 2^53, the bound being
taken over all that is summed: the kernel's area times the channels of a group. Every partial sum
is then an integer that float64 holds exactly, in whatever order a device adds. cuDNN is left out:
its fast algorithms compute in other ways than by such sums.

The same code runs on the CPU, which is how it is tested. It imports torch and is itself imported
only for a device that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from ...errors import UsageError
from .linear import RingConv
from .program import Conv
from .ring import WORD, Words, signed

_MANTISSA: Final = 53


def find(name: str) -> torch.device:
    """The device ``cuda``, ``cuda:N`` or ``torch:cpu``.

    Raises:
        UsageError: no such device, or not on this machine.
    """
    if name == "torch:cpu":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type != "cuda":
        raise UsageError(f"no device {name!r}: the fss backend runs on cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        built = "finds no CUDA device" if torch.version.cuda else "was built without CUDA"
        raise UsageError(f"device {name!r}: the installed torch {built}; use --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


class TorchConv(RingConv):
    """One convolution with fixed weights, on ``device``; arguments as for the base class."""

    def __init__(
        self,
        op: Conv,
        source: tuple[int, ...],
        weight: Words,
        n: int,
        bits: int | None = None,
        *,
        device: torch.device,
    ) -> None:
        self._op = op
        self._n = n
        self._bits = bits
        self._native = self._kernel = self._weight = None
        self._device = device
        self._x_width, limbs = _cut(op, weight, n, bits)
        self._limbs = [
            (at, torch.from_numpy(limb.astype(np.float64)).to(device)) for at, limb in limbs
        ]

    @property
    def method(self) -> str:
        return f"float64 limbs on {self._device.type}"

    def __call__(self, x: Words, add: Words | None = None) -> Words:
        op = self._op
        words = torch.from_numpy(np.ascontiguousarray(x).view(np.int64)).to(self._device)
        total = torch.zeros((len(x), *op.shape), dtype=torch.int64, device=self._device)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=False):
            for x_at, limb in self._input_limbs(words):
                for w_at, weight in self._limbs:
                    if x_at + w_at < self._n:
                        sums = torch.nn.functional.conv2d(
                            limb, weight, None, op.stride, op.padding, op.dilation, op.groups
                        )
                        total += sums.to(torch.int64) << (x_at + w_at)
        out: Words = total.cpu().numpy().view(np.uint64)
        return out if add is None else out + add

    def _input_limbs(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        for at in range(0, self._n, self._x_width):
            mask = (1 << min(self._x_width, self._n - at)) - 1
            yield at, ((x >> at) & mask).to(torch.float64)


def _cut(
    op: Conv, weight: Words, n: int, bits: int | None
) -> tuple[int, list[tuple[int, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]]]:
    """The width of the input's limbs, and the weights' signed limbs with their places.

    With ``terms`` products in a sum, inputs in [0, 2^a) and weights in [-2^(b-1), 2^(b-1)] the
    sum stays below terms * 2^(a + b - 1) <= 2^53.
    """
    _, channels, kh, kw = op.weight_shape
    terms = channels * kh * kw
    room = _MANTISSA - (terms - 1).bit_length() + 1
    if bits is not None and bits <= room - 8:
        return min(room - bits, n, WORD - 1), [(0, signed(weight, WORD))]
    width = max(room // 2, 1)
    assert room >= 2, "a sum of 2^52 products"
    limbs = []
    rest = signed(weight, n)
    for at in range(0, n, width):
        if at + width >= n:
            limbs.append((at, rest))
        else:
            low = signed(rest.view(np.uint64), width)
            limbs.append((at, low))
            rest = (rest - low) >> np.int64(width)
    return room - width, limbs
