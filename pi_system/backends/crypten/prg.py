"""A stream of ring elements from AES-256 in counter mode (NIST SP 800-38A, 6.5)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Final

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

KEY_BYTES: Final = 32


def fresh_key() -> bytes:
    """A key from the operating system."""
    return os.urandom(KEY_BYTES)


class Stream:
    """The elements of Z/2^64 that ``key`` yields in stream number ``index``.

    Streams of one key and different indices never overlap (below 2^68 bytes each). Equal keys
    and indices yield equal elements on every machine.
    """

    def __init__(self, key: bytes, index: int = 0) -> None:
        assert len(key) == KEY_BYTES
        counter = index.to_bytes(8, "big") + bytes(8)
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def ring(self, size: Sequence[int], *, bits: int = 64) -> Tensor:
        """The next elements, uniform over ``bits`` bits, as an int64 tensor on the CPU."""
        count = math.prod(size)
        if count == 0:
            return torch.empty(tuple(size), dtype=torch.int64)
        buffer = bytearray(8 * count)
        self._cipher.update_into(buffer, buffer)
        elements = torch.frombuffer(buffer, dtype=torch.int64).reshape(tuple(size))
        return elements if bits == 64 else elements.bitwise_and_((1 << bits) - 1)
