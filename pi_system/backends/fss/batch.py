"""One batch of gates between server and client: what is sent when.

The batch is cut into parts, so that both parties compute while messages are under way. Of every
part there are three:

    server -> client   X
    server -> client   the server's bits, after X of the next part
    client -> server   the client's bits, and its masked results

Each party evaluates its keys between the first two, both at the same time. The server sends all
of its messages before it takes the first answer, so that the whole batch is one round trip; what
the client answers meanwhile, the channel takes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from ...net.channel import Channel
from ...net.framing import HEADER
from ...net.meter import Clock
from . import packing, relu
from .packing import Bytes
from .program import Index, Relu
from .ring import Words

Fields = list[tuple[int, int]]
"""Of a message: how many values of how many bits, one after another."""

PART: Final = 8192
"""Gates in a part, at most; a multiple of 8."""


class Piece(NamedTuple):
    """Those gates of a layer that go into one part; they begin at a multiple of 8."""

    op: Relu
    gates: slice

    @property
    def length(self) -> int:
        return int(self.gates.stop - self.gates.start)


def parts(gates: Sequence[Relu], batch: int) -> list[tuple[Piece, ...]]:
    """The parts of a batch of gates, for ``batch`` images."""
    found: list[list[Piece]] = []
    room = 0
    for op in gates:
        start, total = 0, batch * len(op.kept)
        while start < total:
            if not room:
                found.append([])
                room = PART
            stop = min(start + room, total)
            found[-1].append(Piece(op, slice(start, stop)))
            room -= -(-(stop - start) // 8) * 8
            start = stop
    return [tuple(part) for part in found]


class ServerBatch:
    """The server's side of one batch.

    Args:
        material: per layer, delta and the server's share.
        sources: per layer, the server's share of its input, contiguous.
        positions: per layer, the flat positions of its gates in that, ``None`` for all.
        targets: per layer, where to write its share of the output; contiguous.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Piece, ...]],
        material: Mapping[str, tuple[Words, relu.Share]],
        sources: Mapping[str, Words],
        positions: Mapping[str, Index | None],
        targets: Mapping[str, Words],
        client: Channel,
        clock: Clock,
    ) -> None:
        self._parts = parts
        self._material = material
        self._sources = sources
        self._positions = positions
        self._targets = targets
        self._client = client
        self._clock = clock
        self._opened: dict[int, list[Bytes]] = {}
        self._bits: dict[int, list[Bytes]] = {}

    def run(self) -> None:
        """Everything from the first X to the last result.

        Raises:
            ProtocolError: an answer does not have exactly its form.
        """
        answers = [self._answer(part) for part in self._parts]
        with self._client.reading_ahead(sum(map(_size, answers)) + HEADER.size * len(answers)):
            self._open(0)
            for part in range(len(self._parts)):
                if part + 1 < len(self._parts):
                    self._open(part + 1)
                self._sign(part)
        for part, fields in enumerate(answers):
            self._close(part, fields)

    def _answer(self, part: tuple[Piece, ...]) -> Fields:
        widths = ((piece, self._material[piece.op.out][1].width.n) for piece in part)
        return [field for piece, n in widths for field in ((piece.length, 1), (piece.length, n))]

    def _open(self, part: int) -> None:
        opened = []
        for op, gates in self._parts[part]:
            delta, share = self._material[op.out]
            source, index = self._sources[op.out], self._positions[op.out]
            opened.append(relu.opening(share, gates, delta, source, index))
        self._opened[part] = opened
        self._send(opened)

    def _sign(self, part: int) -> None:
        bits = [
            relu.sign_bits(self._material[op.out][1], gates, opened)
            for (op, gates), opened in zip(self._parts[part], self._opened[part], strict=True)
        ]
        self._bits[part] = bits
        self._send(bits)

    def _close(self, part: int, fields: Fields) -> None:
        self._clock.lap("gates")
        answers = _receive(self._client, fields)
        self._clock.lap("wait")
        opened, bits = self._opened.pop(part), self._bits.pop(part)
        for i, (op, gates) in enumerate(self._parts[part]):
            theirs, masked = answers[2 * i : 2 * i + 2]
            relu.closing(
                self._material[op.out][1], gates, opened[i], bits[i], theirs, masked,
                self._targets[op.out], self._positions[op.out],
            )  # fmt: skip

    def _send(self, fields: Sequence[Bytes]) -> None:
        self._clock.lap("gates")
        _send(self._client, fields)
        self._clock.lap("wait")


def answer(
    parts: Sequence[tuple[Piece, ...]],
    material: Mapping[str, tuple[relu.Share, Words]],
    server: Channel,
    clock: Clock,
) -> None:
    """The client's side of one batch.

    Args:
        material: per layer, the client's share and r', its fresh share of the result.

    Raises:
        ProtocolError: a message does not have exactly its form.
    """

    def receive(part: tuple[Piece, ...], width: int | None = None) -> list[Bytes]:
        fields = [(piece.length, width or material[piece.op.out][0].width.k) for piece in part]
        values = _receive(server, fields)
        clock.lap("wait")
        return values

    def pieces(part: tuple[Piece, ...]) -> Iterator[tuple[relu.Share, slice, Words]]:
        for op, gates in part:
            share, mask = material[op.out]
            yield share, gates, mask

    following = receive(parts[0])
    for i, part in enumerate(parts):
        opened = following
        if i + 1 < len(parts):
            following = receive(parts[i + 1])
        mine = [
            relu.sign_bits(share, gates, x)
            for (share, gates, _), x in zip(pieces(part), opened, strict=True)
        ]
        clock.lap("gates")
        theirs = receive(part, 1)
        fields = []
        for (share, gates, mask), x, own, other in zip(
            pieces(part), opened, mine, theirs, strict=True
        ):
            fields += [own, relu.answer(share, gates, x, own, other, mask)]
        clock.lap("gates")
        _send(server, fields)
        clock.lap("wait")


def _send(channel: Channel, fields: Sequence[Bytes]) -> None:
    """One message of several fields."""
    channel.send(fields[0].data if len(fields) == 1 else b"".join(f.data for f in fields))


def _size(fields: Fields) -> int:
    return sum(packing.size(count, width) for count, width in fields)


def _receive(channel: Channel, fields: Fields) -> list[Bytes]:
    """One message of packed fields.

    Raises:
        ProtocolError: it does not have exactly this form.
    """
    data = np.empty(_size(fields), np.uint8)
    channel.recv_into(data)
    found, at = [], 0
    for count, width in fields:
        size = packing.size(count, width)
        field = data[at : at + size]
        packing.check(field.data, count, width)
        found.append(field)
        at += size
    return found
