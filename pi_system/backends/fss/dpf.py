"""Two keys that share the bit [alpha <= x] of a secret alpha and a public x.

A distributed point function in the half-tree form (Guo, Yang, Wang, Zhang, Xie, Lin, Liu, Hazay:
"Half-Tree", Eurocrypt 2023, section 5), ended early at leaves of 128 bits. Both parties walk
from their root block to the leaf that holds x, one hash per level:

* on alpha's path the two blocks differ by a secret ``delta`` whose lowest bit is 1, off it they
  are equal; a block's lowest bit is thus a share of "alpha is below here";
* the left child is H(s) + t*cw, the right child left + s, with t the lowest bit of s;
* the leaf, hashed under another key, is a share of the unit vector at alpha mod 128.

[alpha <= x] is the sum of the left siblings' lowest bits at right turns and of the leaf's bits
up to x mod 128 (Boyle et al., Eurocrypt 2021; Storrier et al., "Grotto", CCS 2023).

H(x) = AES(sigma(x)) + sigma(x) with sigma(a, b) = (a + b, a) is circular correlation robust for
a fixed key (Guo, Katz, Wang, Weng, Yu 2020). Blocks are two words, lowest bit in word 0; all
arrays are level-major: (levels + 1, count, 2), the leaf's correction last.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from . import kernels
from .ring import Words

LEAF_BITS = 7
TREE_KEY = hashlib.sha256(b"pi_system dpf tree").digest()[:16]
LEAF_KEY = hashlib.sha256(b"pi_system dpf leaf").digest()[:16]

_ONE = np.uint64(1)


def levels(bits: int) -> int:
    """Levels above the leaf for inputs of ``bits`` bits."""
    return max(bits - LEAF_BITS, 0)


def generate(alpha: Words, bits: int, root: Words, delta: Words) -> tuple[Words, Words]:
    """The dealer's part: correction words for both, and the second party's roots.

    Args:
        alpha: (count,), each below 2^bits.
        root: (count, 2), the first party's uniform root blocks.
        delta: (count, 2), uniform; its lowest bit is set here.

    Returns:
        corrections (levels + 1, count, 2) and the second party's roots (count, 2).
    """
    delta = delta.copy()
    delta[:, 0] |= _ONE
    native = kernels.native()
    if native is not None and native.has_aes:
        corrections = native.dpf_generate(alpha, bits, root, delta, TREE_KEY, LEAF_KEY)
        return corrections, root ^ delta
    depth = levels(bits)
    corrections = np.empty((depth + 1, len(alpha), 2), np.uint64)
    s = root
    for level in range(depth):
        right = _spread(alpha >> np.uint64(bits - 1 - level))
        first, second = _hash(TREE_KEY, s), _hash(TREE_KEY, s ^ delta)
        correction = first ^ second ^ (~right & delta)
        corrections[level] = correction
        s = first ^ (right & s) ^ (_spread(s[:, 0]) & correction)
    unit = np.zeros_like(root)
    low = alpha & np.uint64(127)
    for word in range(2):
        here = (low >> np.uint64(6)) == np.uint64(word)
        unit[:, word] = here.astype(np.uint64) << (low & np.uint64(63))
    corrections[depth] = _hash(LEAF_KEY, s) ^ _hash(LEAF_KEY, s ^ delta) ^ unit
    return corrections, root ^ delta


def evaluate(root: Words, corrections: Words, x: Words, bits: int) -> Words:
    """One party's share, 0 or 1 per input, of [alpha <= x mod 2^bits].

    Args:
        root: (count, 2), this party's roots.
        corrections: (levels + 1, count, 2).
        x: (count,).
    """
    native = kernels.native()
    if native is not None and native.has_aes:
        return native.dpf_evaluate(root, corrections, x, bits, TREE_KEY, LEAF_KEY)
    s, share = root, np.zeros(len(x), np.uint64)
    for level in range(levels(bits)):
        right = _spread(x >> np.uint64(bits - 1 - level))
        left = _hash(TREE_KEY, s) ^ (_spread(s[:, 0]) & corrections[level])
        share ^= right[:, 0] & left[:, 0]
        s = left ^ (right & s)
    leaf = _hash(LEAF_KEY, s) ^ (_spread(s[:, 0]) & corrections[-1])
    low = x & np.uint64(127 if bits >= LEAF_BITS else (1 << bits) - 1)
    upper = low >> np.uint64(6)
    prefix = (np.uint64(2) << (low & np.uint64(63))) - _ONE
    within = (prefix | (np.uint64(0) - upper)) & leaf[:, 0]
    within ^= prefix & (np.uint64(0) - upper) & leaf[:, 1]
    for half in (32, 16, 8, 4, 2, 1):
        within = within ^ (within >> np.uint64(half))
    result: Words = (share ^ within) & _ONE
    return result


def _spread(bit: Words) -> Words:
    """All ones where the lowest bit is set, else zero, as a column over a block."""
    return (np.uint64(0) - (bit & _ONE))[:, None]


def _hash(key: bytes, blocks: Words) -> Words:
    mixed = np.empty((len(blocks), 2), "<u8")
    mixed[:, 0] = blocks[:, 0] ^ blocks[:, 1]
    mixed[:, 1] = blocks[:, 0]
    cipher = Cipher(AES(key), ECB()).encryptor()
    out = np.frombuffer(cipher.update(mixed.tobytes()), "<u8").reshape(-1, 2)
    return (out ^ mixed).astype(np.uint64, copy=False)
