"""Bad sources of one-time randomness, to show that the audit notices them.

Each makes real parties misbehave on the wire; answers stay right, so that nothing but an audit
would tell. They are objects that the audit hands to its own parties: no option, file or variable
of a serving party leads here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from ...backends.fss.masks import Bundle
from ...backends.fss.prg import Stream
from ...backends.fss.public import Public
from ...backends.fss.ring import Words
from ...backends.fss.source import SYSTEM, Source

SHORT: Final = 2
"""Bits by which truncated masks fall short of their ring."""


class _Bent(Stream):
    """A stream whose words are bent before they are used."""

    def __init__(self, stream: Stream, bend: Callable[[Words], Words]) -> None:
        self._stream, self._bend = stream, bend

    def words(self, count: int) -> Words:
        return self._bend(self._stream.words(count))

    def bits(self, count: int) -> Words:
        return self._stream.bits(count)


@dataclass(frozen=True)
class _BentBundle(Bundle):
    """A bundle whose masks r' are bent, by the tensor they are for."""

    bend: Callable[[str, Words], Words]

    def stream(self, tensor: str, purpose: str) -> Stream:
        straight = super().stream(tensor, purpose)
        if purpose != "mask":
            return straight
        return _Bent(straight, lambda words: self.bend(tensor, words))


class _Reused(Source):
    """Every second inference has the seed and all masks of the one before it."""

    def __init__(self) -> None:
        self._seeds: list[bytes] = []

    def seed(self) -> bytes:
        repeated = len(self._seeds) % 2 == 1
        self._seeds.append(self._seeds[-1] if repeated else super().seed())
        return self._seeds[-1]

    def bundle(self, public: Public, seed: bytes, inference: int) -> Bundle:
        return super().bundle(public, seed, inference & ~1)


class _Biased(Source):
    """The highest bit of every gate's r is one with probability 3/4."""

    def __init__(self) -> None:
        self._public: Public | None = None

    def bundle(self, public: Public, seed: bytes, inference: int) -> Bundle:
        self._public = public
        return super().bundle(public, seed, inference)

    def private(self, seed: bytes, inference: int, tensor: str) -> Stream:
        assert self._public is not None
        top = np.uint64(self._public.plan.gates[tensor].k - 1)

        def bend(words: Words) -> Words:
            chance = (words >> np.uint64(62)) & np.uint64(1)
            return words | (chance << top)

        return _Bent(super().private(seed, inference, tensor), bend)


class _Unmasked(Source):
    """The image has no mask: Z = x."""

    def bundle(self, public: Public, seed: bytes, inference: int) -> Bundle:
        image = public.lowered.input.out

        def bend(tensor: str, words: Words) -> Words:
            return np.zeros_like(words) if tensor == image else words

        return _BentBundle(seed, public.model, inference, bend)


class _Truncated(Source):
    """Every mask r' is drawn from two bits fewer than its ring has."""

    def bundle(self, public: Public, seed: bytes, inference: int) -> Bundle:
        plan = public.plan
        rings = {name: gate.n for name, gate in plan.gates.items()}
        rings[public.lowered.input.out] = plan.input_n

        def bend(tensor: str, words: Words) -> Words:
            return words & np.uint64((1 << (rings[tensor] - SHORT)) - 1)

        return _BentBundle(seed, public.model, inference, bend)


@dataclass(frozen=True)
class Sabotage:
    """What is done, and who does it with which source."""

    does: str
    client: Callable[[], Source] = lambda: SYSTEM
    dealer: Callable[[], Source] = lambda: SYSTEM


SABOTAGES: Final = {
    "reused-mask": Sabotage(
        "every second inference repeats the client's seed and masks", _Reused, _Reused
    ),
    "biased-mask": Sabotage(
        "the dealer's r of every gate has its highest bit set three times in four", dealer=_Biased
    ),
    "unmasked-value": Sabotage("the image is sent without its mask r'", _Unmasked, _Unmasked),
    "truncated-mask": Sabotage(
        f"every r' is drawn from {SHORT} bits fewer than its ring", _Truncated, _Truncated
    ),
}
