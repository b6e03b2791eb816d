"""What recorded values amount to: counts and samples of every field, repeats, values in the clear.

Memory is a few hundred values per field and inference, whatever the model's size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ...backends.fss import packing, ring, weights
from ...backends.fss.public import RETRY, Public
from ...backends.fss.ring import Words
from ...backends.fss.transcript import Field, Message
from ...errors import ProtocolError, RefusedError
from ...graph.ir import Graph
from .. import uniformity
from .cut import Seen

SAMPLED: Final = 512
"""Values of a field that are followed one by one through all inferences."""
WHOLE: Final = 96
"""Bits from which on a field never comes twice by chance."""
FIXED, VARIED = 0, 1
"""The two groups of inferences: with one image, and with different ones."""


@dataclass(frozen=True)
class Column:
    """One field of one message of the protocol, in all inferences."""

    phase: str
    place: int
    message: Message
    field: Field


@dataclass
class FieldTally:
    """What has been seen of a column."""

    histogram: uniformity.Histogram
    columns: npt.NDArray[np.intp]
    samples: tuple[list[Words], list[Words]] = field(default_factory=lambda: ([], []))
    whole: Counter[bytes] = field(default_factory=Counter)
    frames: int = 0

    @classmethod
    def of(cls, described: Field) -> FieldTally:
        """Pairs of neighbouring values are sampled: two words are one block of a key."""
        draw = np.random.default_rng(described.count)  # of a statistical test
        pairs = -(-described.count // 2)
        chosen = draw.permutation(pairs)[: SAMPLED // 2]
        columns = np.sort(np.concatenate([2 * chosen, 2 * chosen + 1]))
        return cls(uniformity.Histogram(described.width), columns[columns < described.count])

    def add(self, values: Words, group: int, bits: int) -> None:
        self.frames += 1
        self.histogram.add(values, group)
        self.samples[group].append(values[self.columns])
        if bits >= WHOLE:
            self.whole[hashlib.blake2b(values.tobytes(), digest_size=16).digest()] += 1

    @property
    def repeats(self) -> int:
        """How often the whole field came again."""
        return sum(count - 1 for count in self.whole.values())

    def p_values(self, width: int) -> Iterator[tuple[str, float]]:
        yield from self.histogram.p_values().items()
        for name, rows in zip(("one image", "many images"), self.samples, strict=True):
            if len(rows) > 1:
                found = uniformity.p_values(np.stack(rows), width)
                for test in ("places", "planes", "pairs"):
                    yield f"{test}, {name}", found[test]
        rows = self.samples[FIXED] + self.samples[VARIED]
        if len(rows) > 1:
            yield "alike", uniformity.alike(np.stack(rows), width)


@dataclass
class Tally:
    """All columns, and what must never come twice or lie open."""

    public: Public
    fields: dict[Column, FieldTally] = field(default_factory=dict)
    documents: Counter[tuple[str, Message]] = field(default_factory=Counter)
    sizes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    seeds: Counter[bytes] = field(default_factory=Counter)
    blocks: Counter[bytes] = field(default_factory=Counter)
    items: Counter[bytes] = field(default_factory=Counter)
    answered: Counter[bytes] = field(default_factory=Counter)
    retries: int = 0
    clear: Counter[tuple[str, str, Message]] = field(default_factory=Counter)
    _session: int = -1
    _needles: dict[str, list[bytes]] = field(default_factory=dict)
    _searched: int = 0

    def __post_init__(self) -> None:
        self._derived = _Derived(self.public)

    @property
    def searched(self) -> int:
        """Frames searched for values in the clear."""
        return self._searched

    def begin(self, secrets: dict[str, list[bytes]]) -> None:
        """Another session, or other secrets in this one: what must not be found in any frame."""
        self._needles = secrets

    def next_session(self) -> None:
        self._session += 1

    def add(self, seen: Iterable[Seen], group: int) -> None:
        """The frames of one step.

        Raises:
            RefusedError: one does not have its described form.
        """
        for one in seen:
            message = one.message
            self.sizes[one.phase, message.sender, message.receiver] += len(one.data)
            self._search(one)
            try:
                values = message.split(one.data)
            except ProtocolError as error:
                raise RefusedError(
                    f"{message.kind} from {message.sender} to {message.receiver} does not have "
                    f"its described form: {error}"
                ) from error
            if not message.fields:
                self.documents[one.phase, message] += 1
            self._one_time(one, values)
            retried = one.phase == "online" and (values.get("status", _OK) == RETRY).any()
            self.retries += int(retried)
            for described in message.fields:
                if retried and described.cover:
                    continue  # zeros in place of an answer
                self._count(Column(one.phase, one.place, message, described),
                            values[described.name], group)  # fmt: skip
            self._derived.add(message, values)
        for column, words in self._derived.columns():
            self._count(column, words, group)

    def _count(self, column: Column, values: Words, group: int) -> None:
        described = column.field
        bits = described.count * described.width
        if not bits:
            return
        if column not in self.fields:
            self.fields[column] = FieldTally.of(described)
        self.fields[column].add(values, group, bits)

    def _one_time(self, one: Seen, values: dict[str, Words]) -> None:
        message = one.message
        for name, words in values.items():
            if "seed" in name:
                self.seeds[words.astype(np.uint8).tobytes()] += 1
            elif name in ("root", "corrections") and message.receiver == "server":
                # Two words make a block; the client's copy of the corrections is the same.
                for block in words.reshape(-1, 2)[: SAMPLED // 2]:
                    self.blocks[block.tobytes()] += 1
            elif name == "inference":
                item = bytes([self._session]) + words.astype(np.uint8).tobytes()
                (self.answered if one.phase == "online" else self.items)[item] += 1

    def _search(self, one: Seen) -> None:
        self._searched += 1
        for what, needles in self._needles.items():
            if any(needle in one.data for needle in needles):
                self.clear[what, one.phase, one.message] += 1


_OK: Final = np.zeros(1, np.uint64)
_WORK: Final = "worked out"


class _Derived:
    """What parties work out of several fields of an inference, which must look uniform too.

    By the formulas of docs/protocol.md and not by the code under audit.
    """

    def __init__(self, public: Public) -> None:
        self._public = public
        self._kept = {op.out: public.batch * len(op.kept) for op in public.lowered.relus}
        self._parts: dict[tuple[str, str], list[Words]] = {}
        self._shares: dict[str, list[dict[str, Words]]] = {}

    def add(self, message: Message, values: dict[str, Words]) -> None:
        if message.kind == "gates" and message.receiver == "server":
            self._shares.setdefault(message.layer, []).append(values)
        for name, words in values.items():
            kind, _, op = name.partition(" ")
            if name in ("e", "g"):
                self._parts.setdefault((name, message.layer), []).append(words)
            elif kind in ("X", "sign", "Z") and op:
                self._parts.setdefault((f"{kind} of {message.sender}", op), []).append(words)

    def columns(self) -> Iterator[tuple[Column, Words]]:
        """Of all that was added since the last call.

        At the server h = e + g of every layer and, after every gate, Z; at both sides
        D = [x >= 0] + rho. Where an inference was retried there are several of each.
        """
        parts, self._parts = self._parts, {}
        for place, (kind, name) in enumerate(parts):
            if kind == "e":
                n = self._public.plan.convs[name].n
                made = Field("h", len(parts[kind, name][0]), n, "u")
                column = Column("offline", place, Message(_WORK, "dealer", "server", name), made)
                for e, g in zip(parts["e", name], parts["g", name], strict=True):
                    yield column, ring.reduce(e + g, n)
            elif kind == "X of server":
                count = self._kept[name]
                pieces = (("X", "server"), ("sign", "server"), ("sign", "client"), ("Z", "client"))
                x, mine, theirs, masked = (
                    np.concatenate(parts[f"{what} of {role}", name]).reshape(-1, count)
                    for what, role in pieces
                )
                for row in range(len(x)):
                    yield from self._gates(
                        place, name, x[row], mine[row] ^ theirs[row], masked[row]
                    )

    def _gates(
        self, place: int, name: str, x: Words, signs: Words, masked: Words
    ) -> Iterator[tuple[Column, Words]]:
        width = self._public.plan.gates[name]
        one, k = np.uint64(1), np.uint64(width.k)
        top = x >> (k - one)
        d = signs ^ top
        both = Message(_WORK, "client", "server", name)
        yield Column("online", place, both, Field("D", len(x), 1, "rho")), d
        share = self._shares[name].pop(0)
        lift = (one - top) << k
        r = share["[r]"] - lift * share["[msb]"]
        rho_r = share["[rho r]"] - lift * share["[rho msb]"]
        result = d * (x - r) + (one - d - d) * (x * share["[rho]"] - rho_r)
        z = Field("next Z", len(x), width.n, "r'")
        yield Column("online", place, both, z), ring.reduce(result + masked, width.n)


def image_needles(public: Public, images: npt.NDArray[np.float32]) -> list[bytes]:
    """How an image might lie open in a frame."""
    return _needles(images, public.plan.f_x, public.plan.input_n)


def weight_needles(public: Public, graph: Graph) -> list[bytes]:
    """The same of the first layer's weights."""
    op = public.lowered.convs[0]
    planned = public.plan.convs[op.out]
    weight, _ = weights.reals(graph, op)
    return _needles(weight, planned.f_w, planned.n)


def _needles(values: npt.NDArray[np.floating], f: int, n: int) -> list[bytes]:
    """Eight values in a row as floats, integers or packed; none if no eight tell anything."""
    flat = values.reshape(-1)
    rows = flat[: flat.size - flat.size % 8].reshape(-1, 8)[:512]
    if not len(rows):
        return []
    telling = [len(set(row.tolist()) - {0.0}) for row in rows]
    best = int(np.argmax(telling))
    if telling[best] < 4:
        return []
    fixed = ring.encode(rows[best], f)
    made = [rows[best].astype(kind).tobytes() for kind in ("<f4", "<f8")]
    made += [fixed.view(np.int64).astype(kind).tobytes() for kind in ("<i2", "<i4", "<i8")]
    return [*made, packing.pack(fixed, n)]
