"""Words to bytes at an exact bit width, and back.

Value i of width w occupies bits [i*w, (i+1)*w) of the message, least significant bit first; the
last byte is filled with zeros.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import ProtocolError
from . import kernels
from .ring import WORD, Words, reduce

Bytes = npt.NDArray[np.uint8]

_LANES = 64


def size(count: int, width: int) -> int:
    """Bytes of ``count`` packed values."""
    return (count * width + 7) // 8


def pack(values: Words, width: int) -> bytes:
    """The low ``width`` bits (0 to 64) of every value, in C order."""
    flat = np.ascontiguousarray(values, np.uint64).reshape(-1)
    if width == 0:
        return b""
    if width == WORD:
        return flat.astype("<u8", copy=False).tobytes()
    native = kernels.native()
    if native is not None:
        return native.pack(flat, width)
    groups = -(-flat.size // _LANES)
    lanes = np.zeros((groups, _LANES), np.uint64)
    lanes.reshape(-1)[: flat.size] = reduce(flat, width)
    out = np.zeros((groups, width), np.uint64)
    for lane in range(_LANES):
        word, offset = divmod(lane * width, WORD)
        out[:, word] |= lanes[:, lane] << np.uint64(offset)
        if offset + width > WORD:
            out[:, word + 1] |= lanes[:, lane] >> np.uint64(WORD - offset)
    return out.astype("<u8", copy=False).tobytes()[: size(flat.size, width)]


def packed(values: Words, width: int) -> Bytes:
    """:func:`pack` as an array."""
    return np.frombuffer(pack(values, width), np.uint8)


def unpack(data: bytes | memoryview, count: int, width: int) -> Words:
    """``count`` values of ``width`` bits.

    Raises:
        ProtocolError: ``data`` has another length, or its filling bits are not zero.
    """
    check(data, count, width)
    if width == 0 or count == 0:
        return np.zeros(count, np.uint64)
    if width == WORD:
        return np.frombuffer(data, "<u8").astype(np.uint64)
    native = kernels.native()
    if native is not None:
        return native.unpack(data, count, width)
    groups = -(-count // _LANES)
    padded = np.zeros(groups * width * 8, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    words = padded.view("<u8").astype(np.uint64, copy=False).reshape(groups, width)
    lanes = np.empty((groups, _LANES), np.uint64)
    for lane in range(_LANES):
        word, offset = divmod(lane * width, WORD)
        value = words[:, word] >> np.uint64(offset)
        if offset + width > WORD:
            value = value | (words[:, word + 1] << np.uint64(WORD - offset))
        lanes[:, lane] = reduce(value, width)
    return lanes.reshape(-1)[:count].copy()


def check(data: bytes | memoryview, count: int, width: int) -> None:
    """Whether ``data`` is something :func:`pack` can make.

    Raises:
        ProtocolError: it has another length, or its filling bits are not zero.
    """
    if len(data) != size(count, width):
        raise ProtocolError(
            f"{len(data)} bytes cannot hold {count} values of {width} bits ({size(count, width)})"
        )
    spare = len(data) * 8 - count * width
    if spare and data[-1] >> (8 - spare):
        raise ProtocolError("the filling bits of a packed message are not zero")


class Reader:
    """Cuts one message into its packed fields."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def take(self, count: int, width: int) -> Words:
        """The next ``count`` values.

        Raises:
            ProtocolError: the message is too short.
        """
        return unpack(self.raw(size(count, width)), count, width)

    def raw(self, length: int) -> memoryview:
        """The next ``length`` bytes."""
        if self._at + length > len(self._data):
            raise ProtocolError("a message ends too early")
        self._at += length
        return self._data[self._at - length : self._at]

    def done(self) -> None:
        """Check that nothing is left.

        Raises:
            ProtocolError: the message is too long.
        """
        if self._at != len(self._data):
            raise ProtocolError("a message is longer than its fields")
