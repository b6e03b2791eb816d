"""One-time material of one inference, as each party that keeps some holds it, and as a file.

An item file is a header and the material's arrays, little-endian words without gaps, in an order
and of shapes that follow from the public program and plan. The header says whose material it is
and for what; an SHA-256 hash covers all of it. Loading copies nothing: the arrays are views of
the bytes read.
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Final, Generic, TypeVar

import numpy as np

from ...errors import IntegrityError, RefusedError
from . import relu
from .masks import Ends
from .program import Relu
from .public import Public
from .ring import Words


@dataclass
class ServerMaterial:
    """Of one inference: h = W r' - u plus bias per linear operation, and the gates' shares."""

    h: dict[str, Words] = field(default_factory=dict)
    gates: dict[str, tuple[Words, relu.Share]] = field(default_factory=dict)


@dataclass
class ClientMaterial:
    """Of one inference: the masks of image and logits, and per gate batch a share and r'."""

    ends: Ends
    gates: dict[str, tuple[relu.Share, Words]] = field(default_factory=dict)


Item = TypeVar("Item")

_MAGIC: Final = b"pi-fss-1"
# magic, role, model, digest, pair, batch, inference, payload bytes; then the hash of these and
# of the payload. 256 bytes, so that the arrays of a file read whole are aligned.
_HEADER: Final = struct.Struct("<8s8s64s64s32sIQQ28x")
_START: Final = _HEADER.size + 32


class Codec(ABC, Generic[Item]):
    """Items of one pair to bytes and back.

    Args:
        pair: the pair's name, 32 hexadecimal digits.
    """

    role: ClassVar[str]

    def __init__(self, public: Public, pair: str) -> None:
        self._public = public
        self._pair = pair

    def encode(self, inference: int, item: Item) -> bytes:
        """The whole file."""
        arrays = [np.ascontiguousarray(array, "<u8") for array in self._arrays(item)]
        payload = b"".join(array.data for array in arrays)
        public = self._public
        texts = (self.role, public.model, public.digest, self._pair)
        raw = (text.encode() for text in texts)
        head = _HEADER.pack(_MAGIC, *raw, public.batch, inference, len(payload))
        return head + _hash(head, payload) + payload

    def decode(self, inference: int, data: bytearray) -> Item:
        """The item in a file's content.

        Raises:
            RefusedError: it is another party's, model's, plan's, batch's, pair's or inference's.
            IntegrityError: it is no item, cut short or damaged.
        """
        what = f"the material of inference {inference}"
        if len(data) < _START or data[: len(_MAGIC)] != _MAGIC:
            raise IntegrityError(f"{what} is no file of this version, or cut short")
        _, role, model, digest, pair, batch, number, size = _HEADER.unpack_from(data)
        public = self._public
        for name, there, here in (
            ("party", _text(role), self.role),
            ("model", _text(model), public.model),
            ("batch size", batch, public.batch),
            ("plan", _text(digest), public.digest),
            ("pair of client and server", _text(pair), self._pair),
            ("inference", number, inference),
        ):
            if there != here:
                raise RefusedError(f"{what} was made for another {name}: {there}, here {here}")
        view = memoryview(data)
        payload = view[_START:]
        if size != len(payload):
            raise IntegrityError(f"{what} is cut short or too long: {len(payload)} B, not {size}")
        if _hash(view[: _HEADER.size], payload) != view[_HEADER.size : _START]:
            raise IntegrityError(f"{what} is damaged: its hash does not fit")
        fields = _Fields(payload, self._public)
        item = self._item(fields)
        fields.done()
        return item

    @classmethod
    def size(cls, public: Public) -> int:
        """Bytes of every file."""
        return _START + 8 * cls._words(public)

    @classmethod
    @abstractmethod
    def _words(cls, public: Public) -> int:
        """Words of the arrays together."""

    @abstractmethod
    def _arrays(self, item: Item) -> Iterator[Words]:
        """Its arrays, in the order in which :meth:`_item` takes them."""

    @abstractmethod
    def _item(self, fields: _Fields) -> Item: ...


class ServerCodec(Codec[ServerMaterial]):
    role = "server"

    @classmethod
    def _words(cls, public: Public) -> int:
        h = sum(public.batch * op.size for op in public.lowered.convs)
        return h + sum(_gate_words(public, op) for op in public.lowered.relus)

    def _arrays(self, item: ServerMaterial) -> Iterator[Words]:
        lowered = self._public.lowered
        yield from (item.h[op.out] for op in lowered.convs)
        for op in lowered.relus:
            delta, share = item.gates[op.out]
            yield delta
            yield from _share_arrays(share)

    def _item(self, fields: _Fields) -> ServerMaterial:
        lowered, batch = self._public.lowered, self._public.batch
        h = {op.out: fields.take(batch, *op.shape) for op in lowered.convs}
        gates = {op.out: (fields.per_gate(op), fields.share(op)) for op in lowered.relus}
        return ServerMaterial(h, gates)


class ClientCodec(Codec[ClientMaterial]):
    role = "client"

    @classmethod
    def _words(cls, public: Public) -> int:
        lowered = public.lowered
        ends = lowered.input.size + math.prod(lowered.shapes[lowered.output])
        return public.batch * ends + sum(_gate_words(public, op) for op in lowered.relus)

    def _arrays(self, item: ClientMaterial) -> Iterator[Words]:
        yield item.ends.image
        yield item.ends.logits
        for op in self._public.lowered.relus:
            share, fresh = item.gates[op.out]
            yield from _share_arrays(share)
            yield fresh

    def _item(self, fields: _Fields) -> ClientMaterial:
        lowered, batch = self._public.lowered, self._public.batch
        image = fields.take(batch, *lowered.input.shape)
        ends = Ends(image, fields.take(batch, *lowered.shapes[lowered.output]))
        gates = {op.out: (fields.share(op), fields.per_gate(op)) for op in lowered.relus}
        return ClientMaterial(ends, gates)


class _Fields:
    """Cuts a payload into arrays."""

    def __init__(self, payload: memoryview, public: Public) -> None:
        self._words = np.frombuffer(payload, "<u8").astype(np.uint64, copy=False)
        self._public = public
        self._at = 0

    def take(self, *shape: int) -> Words:
        start, self._at = self._at, self._at + math.prod(shape)
        if self._at > len(self._words):
            raise IntegrityError("an item of material is smaller than its plan says")
        return self._words[start : self._at].reshape(shape)

    def per_gate(self, op: Relu) -> Words:
        return self.take(self._public.batch * len(op.kept))

    def share(self, op: Relu) -> relu.Share:
        width, count = self._public.plan.gates[op.out], self._public.batch * len(op.kept)
        root, corrections = self.take(count, 2), self.take(width.blocks, count, 2)
        return relu.Share(width, root, corrections, self.take(count), self.take(5, count))

    def done(self) -> None:
        if self._at != len(self._words):
            raise IntegrityError("an item of material is larger than its plan says")


def _gate_words(public: Public, op: Relu) -> int:
    """Of a share and one word more per gate."""
    blocks = 1 + public.plan.gates[op.out].blocks
    return public.batch * len(op.kept) * (2 * blocks + 1 + 5 + 1)


def _share_arrays(share: relu.Share) -> tuple[Words, ...]:
    return share.root, share.corrections, share.sign, share.values


def _hash(head: bytes | memoryview, payload: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(payload)
    return digest.digest()


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("ascii", "replace")
