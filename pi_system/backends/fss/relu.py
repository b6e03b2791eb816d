"""The ReLU gate on k-bit openings: what the dealer makes, and what the two parties do with it.

The parties hold x = s + c (s at the server, c at the client), |x| < 2^(k-1). The dealer knows c
and draws r in Z/2^k and a bit rho. The opened X = x + r and D = [x >= 0] + rho (mod 2) are
uniform, and relu(x) = [x >= 0] * x is linear in the dealer's shares once X and D are known:

    relu(x) = D X + (1-2D) X [rho] - D [R] - (1-2D) [rho R],   R = r - 2^k msb(r) (1 - msb(X))

R lifts X - R to x itself, but only where x >= 0: where the sign bit says otherwise everything
is multiplied by zero, so R must never be used to select a negative value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import dpf, kernels, packing
from .packing import Bytes, Reader
from .prg import Stream
from .program import Index
from .ring import WORD, Words, reduce

_ONE = np.uint64(1)
MAX_K = 62


@dataclass(frozen=True)
class Width:
    """Of one batch of gates: opened width ``k`` and the ring width ``n`` of the result."""

    k: int
    n: int

    @property
    def high(self) -> int:
        """Width of the shares of msb(r), which are used times 2^k."""
        return max(self.n - self.k, 0)

    @property
    def blocks(self) -> int:
        """Correction blocks of one comparison key."""
        return dpf.levels(self.k - 1) + 1


@dataclass(frozen=True)
class Share:
    """One party's material for a batch of gates; every array has one entry per gate.

    ``values`` (5, count): shares of r, rho, rho*r, msb(r), rho*msb(r). ``sign``: a share of
    rho + msb(r). ``root`` (count, 2) and ``corrections``: the comparison key.
    """

    width: Width
    root: Words
    corrections: Words
    sign: Words
    values: Words

    @property
    def count(self) -> int:
        return len(self.sign)


def client_share(width: Width, count: int, stream: Stream, corrections: Words) -> Share:
    """The client's share: all but the corrections comes from the seed it has with the dealer."""
    root = stream.words(2 * count).reshape(count, 2)
    values = stream.words(5 * count).reshape(5, count)
    return Share(width, root, corrections, stream.bits(count), values)


def deal(width: Width, c: Words, shared: Stream, private: Stream) -> tuple[Words, bytes]:
    """Make the material of a batch of gates.

    Args:
        c: (count,), the client's share of the gates' inputs.
        shared: the stream client and dealer have in common for this batch.
        private: the dealer's own randomness.

    Returns:
        the comparison keys' corrections, for the client, and the server's message.
    """
    count = len(c)
    k, n = width.k, width.n
    empty = np.zeros((width.blocks, count, 2), np.uint64)
    client = client_share(width, count, shared, empty)
    drawn = private.words(count)
    r, rho = reduce(drawn, k), drawn >> np.uint64(WORD - 1)
    delta = private.words(2 * count).reshape(count, 2)
    msb = r >> np.uint64(k - 1)
    corrections, root = dpf.generate(reduce(r, k - 1), k - 1, client.root, delta)
    values = np.stack([r, rho, rho * r, msb, rho * msb]) - client.values
    message = b"".join(
        [
            packing.pack(c + r, k),
            packing.pack(rho ^ msb ^ client.sign, 1),
            *(packing.pack(value, n) for value in values[:3]),
            *(packing.pack(value, width.high) for value in values[3:]),
            root.astype("<u8", copy=False).tobytes(),
            corrections.astype("<u8", copy=False).tobytes(),
        ]
    )
    return corrections, message


def read_server_share(width: Width, count: int, message: bytes) -> tuple[Words, Share]:
    """The server's side of :func:`deal`: delta = c + r, and its share.

    Raises:
        ProtocolError: the message does not have exactly this form.
    """
    reader = Reader(message)
    delta = reader.take(count, width.k)
    sign = reader.take(count, 1)
    values = np.empty((5, count), np.uint64)
    for row in range(3):
        values[row] = reader.take(count, width.n)
    for row in range(3, 5):
        values[row] = reader.take(count, width.high)
    root = _blocks(reader, count).reshape(count, 2)
    corrections = _blocks(reader, width.blocks * count).reshape(width.blocks, count, 2)
    reader.done()
    return delta, Share(width, root, corrections, sign, values)


def read_corrections(width: Width, count: int, message: bytes) -> Words:
    """The client's side of :func:`deal`.

    Raises:
        ProtocolError: the message does not have exactly this form.
    """
    reader = Reader(message)
    corrections = _blocks(reader, width.blocks * count).reshape(width.blocks, count, 2)
    reader.done()
    return corrections


def opening(share: Share, gates: slice, delta: Words, source: Words, index: Index | None) -> Bytes:
    """The server's first step: X of some gates, packed.

    Args:
        gates: which ones; they begin at a multiple of 8.
        delta: c + r of all the batch.
        source: the server's share of the tensor, contiguous.
        index: flat positions of all the batch's gates in it, ``None`` for all there are.
    """
    native = kernels.native()
    if native is not None and native.has_aes:
        return native.gate_open(share, gates, delta, source, index)
    s = source.reshape(-1)[gates if index is None else index[gates]]
    return packing.packed(s + delta[gates], share.width.k)


def sign_bits(share: Share, gates: slice, opened: Bytes) -> Bytes:
    """This party's bits, packed; the two parties' bits and msb(X) add up to D."""
    native = kernels.native()
    if native is not None and native.has_aes:
        return native.gate_sign(share, gates, opened)
    k = share.width.k
    x = packing.unpack(opened.data, gates.stop - gates.start, k)
    bits = dpf.evaluate(share.root[gates], share.corrections[:, gates], x, k - 1)
    return packing.packed(bits ^ share.sign[gates], 1)


def answer(
    share: Share, gates: slice, opened: Bytes, mine: Bytes, theirs: Bytes, mask: Words
) -> Bytes:
    """The client's last step: its share of the results less ``mask``, packed.

    Args:
        mask: r' of all the batch, fresh and uniform.
    """
    native = kernels.native()
    if native is not None and native.has_aes:
        return native.gate_answer(share, gates, opened, mine, theirs, mask)
    result = _results(share, gates, opened, mine ^ theirs, server=False)
    return packing.packed(result - mask[gates], share.width.n)


def closing(
    share: Share,
    gates: slice,
    opened: Bytes,
    mine: Bytes,
    theirs: Bytes,
    masked: Bytes,
    target: Words,
    index: Index | None,
) -> None:
    """The server's last step: write its shares relu(x) - r' to the gates' places in ``target``.

    ``target`` is contiguous and may be the source.
    """
    native = kernels.native()
    if native is not None and native.has_aes:
        native.gate_close(share, gates, opened, mine, theirs, masked, target, index)
        return
    result = _results(share, gates, opened, mine ^ theirs, server=True)
    result += packing.unpack(masked.data, len(result), share.width.n)
    target.reshape(-1)[gates if index is None else index[gates]] = result


def result_share(
    width: Width, values: Words, opened: Words, signs: Words, *, server: bool
) -> Words:
    """One party's share of relu(x) in Z/2^n.

    Args:
        values: as in :class:`Share`.
        opened: X, reduced to k bits.
        signs: the sum (mod 2) of both parties' bits.
    """
    k = width.k
    native = kernels.native()
    if native is not None:
        return native.relu_combine(opened, signs, values, k, width.high > 0, server)
    top = opened >> np.uint64(k - 1)
    flag = signs ^ top
    factor = _ONE - (flag + flag)
    r, rho, rho_r, msb, rho_msb = values
    if width.high:
        lift = (_ONE - top) << np.uint64(k)
        r = r - lift * msb
        rho_r = rho_r - lift * rho_msb
    result = factor * (opened * rho - rho_r) - flag * r
    return np.asarray(result + flag * opened if server else result, np.uint64)


def _results(share: Share, gates: slice, opened: Bytes, bits: Bytes, *, server: bool) -> Words:
    count = gates.stop - gates.start
    x = packing.unpack(opened.data, count, share.width.k)
    signs = packing.unpack(bits.data, count, 1)
    values = np.ascontiguousarray(share.values[:, gates])
    return result_share(share.width, values, x, signs, server=server)


def _blocks(reader: Reader, count: int) -> Words:
    return np.frombuffer(reader.raw(16 * count), "<u8").astype(np.uint64)
