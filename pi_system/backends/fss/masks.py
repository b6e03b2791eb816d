"""The client's half of every tensor: fixed by one seed before any image exists.

The client and the dealer walk the program with the same seed and so agree on the client's share
of every tensor. The walk yields what each of them has to act on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from . import program
from .plan import Plan
from .prg import KeyStream, Label, Stream
from .program import Conv, Input, Program, Relu
from .ring import Words, shift


@dataclass(frozen=True)
class Bundle:
    """Of one inference: where its masks come from and what they belong to."""

    seed: bytes
    model: str
    inference: int

    def stream(self, tensor: str, purpose: str) -> Stream:
        """The stream of one tensor and purpose; a seed never serves two inferences."""
        label: tuple[Label, ...] = (self.model, self.inference, tensor, purpose)
        return Stream(self.seed, *label)


def blinding(seed: bytes, model: str, op: Conv) -> KeyStream:
    """b of one linear operation: uniform words, in the order of :mod:`wide`."""
    return KeyStream.of(seed, model, op.out, "b")


@dataclass(frozen=True)
class LinearMasks:
    """At a linear operation: the input's share r', and the one-time words t and u."""

    op: Conv
    source: Words
    t: Words
    u: Words


@dataclass(frozen=True)
class GateMasks:
    """At a batch of gates: the inputs' share c and the results' fresh share r', both flat."""

    op: Relu
    c: Words
    fresh: Words


@dataclass(frozen=True)
class Ends:
    """The shares of the image and of the logits, (N, *shape)."""

    image: Words
    logits: Words


def walk(
    lowered: Program, plan: Plan, bundle: Bundle, batch: int
) -> Iterator[LinearMasks | GateMasks | Ends]:
    """Every linear operation and batch of gates in order of execution, then the ends."""
    shares: dict[str, Words] = {}
    last = lowered.last_reader()
    for op in lowered.ops:
        size = batch * op.size
        match op:
            case Input():
                share = image = _fresh(bundle, op.out, batch, op.shape)
            case Conv():
                planned = plan.convs[op.out]
                t = bundle.stream(op.out, "t").words(size).reshape(batch, *op.shape)
                u = bundle.stream(op.out, "u").words(size).reshape(batch, *op.shape)
                yield LinearMasks(op, shares[op.source], t, u)
                share = shift(u, planned.n, planned.f_w)
            case Relu():
                source = shares[op.source]
                fresh = bundle.stream(op.out, "mask").words(batch * len(op.kept))
                yield GateMasks(op, program.take(op, source), fresh)
                share = program.put(op, source, fresh)
            case _:
                share = program.apply_local(op, [shares[name] for name in op.inputs])
        shares[op.out] = share
        for name in {name for name in op.inputs if last[name] == op.out}:
            del shares[name]
    yield Ends(image, shares[lowered.output])


def _fresh(bundle: Bundle, tensor: str, batch: int, shape: tuple[int, ...]) -> Words:
    size = batch * int(np.prod(shape))
    return bundle.stream(tensor, "mask").words(size).reshape(batch, *shape)
