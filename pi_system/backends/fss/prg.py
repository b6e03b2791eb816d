"""Pseudo-random streams: a seed and a label give an independent AES-128-CTR key stream.

The stream's key is BLAKE2b, keyed with the seed, of the label; labels are length-prefixed, so no
two differ only in where one part ends.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from .ring import Words

SEED_BYTES = 16
Label = str | int | bytes


def fresh_seed() -> bytes:
    """A new seed from the operating system."""
    return os.urandom(SEED_BYTES)


def derive(seed: bytes, *label: Label) -> bytes:
    """The 16-byte key that belongs to ``label`` under ``seed``."""
    assert len(seed) == SEED_BYTES
    digest = hashlib.blake2b(key=seed, digest_size=SEED_BYTES, person=b"pi_system fss 1")
    for part in label:
        raw = part if isinstance(part, bytes) else str(part).encode()
        kind = {bytes: b"b", str: b"s", int: b"i"}[type(part)]
        digest.update(kind + len(raw).to_bytes(4, "little") + raw)
    return digest.digest()


class Stream:
    """Words of one key stream, in order; each is handed out once."""

    def __init__(self, seed: bytes, *label: Label) -> None:
        self._cipher = Cipher(AES(derive(seed, *label)), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> Words:
        """The next ``count`` words, uniform on Z/2^64."""
        raw = self._cipher.update(bytes(8 * count))
        return np.frombuffer(raw, "<u8").astype(np.uint64, copy=False)

    def bits(self, count: int) -> Words:
        """The next ``count`` bits, one per word."""
        raw = self.words(-(-count // 64)).astype("<u8", copy=False).view(np.uint8)
        return np.unpackbits(raw, count=count, bitorder="little").astype(np.uint64)
