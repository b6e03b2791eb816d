"""Pseudo-random streams: a seed and a label give an independent AES-128-CTR key stream.

The stream's key is BLAKE2b, keyed with the seed, of the label; labels are length-prefixed, so no
two differ only in where one part ends.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import Self

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


@dataclass(frozen=True)
class KeyStream:
    """A key stream that is kept as its 16-byte key and expanded where it is needed."""

    key: bytes = field(repr=False)

    @classmethod
    def of(cls, seed: bytes, *label: Label) -> Self:
        return cls(derive(seed, *label))

    def open(self) -> Stream:
        """Its words from the first one on."""
        return Stream(self)


class Stream:
    """Words of one key stream, in order; each is handed out once."""

    def __init__(self, source: bytes | KeyStream, *label: Label) -> None:
        key = source.key if isinstance(source, KeyStream) else derive(source, *label)
        self._cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> Words:
        """The next ``count`` words, uniform on Z/2^64."""
        out = np.zeros(count, "<u8")
        raw = out.view(np.uint8).data
        self._cipher.update_into(raw, raw)
        return out.astype(np.uint64, copy=False)

    def bits(self, count: int) -> Words:
        """The next ``count`` bits, one per word."""
        raw = self.words(-(-count // 64)).astype("<u8", copy=False).view(np.uint8)
        return np.unpackbits(raw, count=count, bitorder="little").astype(np.uint64)
