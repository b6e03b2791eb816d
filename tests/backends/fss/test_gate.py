"""The comparison key against its definition, and the ReLU gate on whole rings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.backends.fss import dpf, packing, relu
from pi_system.backends.fss.packing import Bytes
from pi_system.backends.fss.prg import Stream, fresh_seed
from pi_system.backends.fss.relu import Width
from pi_system.backends.fss.ring import Words, reduce, signed
from pi_system.errors import ProtocolError


def random_words(*shape: int) -> Words:
    return Stream(fresh_seed(), "test").words(int(np.prod(shape))).reshape(shape)


def compare(alpha: Words, x: Words, bits: int) -> Words:
    root, delta = random_words(len(x), 2), random_words(len(x), 2)
    corrections, other = dpf.generate(alpha, bits, root, delta)
    assert corrections.shape == (dpf.levels(bits) + 1, len(x), 2)
    first = dpf.evaluate(root, corrections, x, bits)
    second = dpf.evaluate(other, corrections, x, bits)
    assert set(np.unique(first)) <= {0, 1}
    return first ^ second


@pytest.mark.parametrize("bits", range(1, 62))
def test_comparison_at_every_width(bits: int) -> None:
    top = (1 << bits) - 1
    rng = np.random.default_rng(bits)
    alphas = [0, 1, top, top >> 1, *(int(a) for a in rng.integers(0, top + 1, 4, np.uint64))]
    pairs = [
        (alpha, x)
        for alpha in map(lambda a: a & top, alphas)
        for x in (
            alpha,
            alpha - 1,
            alpha + 1,
            0,
            top,
            int(rng.integers(0, top + 1, None, np.uint64)),
        )
        if 0 <= x <= top
    ]
    alpha, x = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    assert (compare(alpha, x, bits) == (alpha <= x)).all()


@pytest.mark.parametrize("bits", [1, 3, 6, 7, 8, 9])
def test_comparison_everywhere(bits: int) -> None:
    side = np.arange(1 << bits, dtype=np.uint64)
    if bits == 9:
        side = side[::3]
    alpha, x = (a.reshape(-1) for a in np.meshgrid(side, side))
    assert (compare(alpha, x, bits) == (alpha <= x)).all()


def test_one_key_alone_looks_random() -> None:
    """Evaluated alone, a key is a fair coin at every x, whatever alpha is."""
    count = 4000
    for alpha in (0, 255):
        root, delta = random_words(count, 2), random_words(count, 2)
        corrections, other = dpf.generate(np.full(count, alpha, np.uint64), 9, root, delta)
        for key in (root, other):
            for x in (0, 255, 256, 511):
                share = dpf.evaluate(key, corrections, np.full(count, x, np.uint64), 9)
                assert abs(share.mean() - 0.5) < 0.05  # 6 sigma


def run_gate(width: Width, s: Words, c: Words, fresh: Words) -> tuple[Words, list[int]]:
    """Both parties' parts with real messages; the result and the messages' sizes."""
    shared, count = fresh_seed(), len(s)
    corrections, message = relu.deal(
        width, c, Stream(shared, "gate"), Stream(fresh_seed(), "dealer")
    )
    delta, at_server = relu.read_server_share(width, count, message)
    at_client = relu.client_share(
        width, count, Stream(shared, "gate"),
        relu.read_corrections(width, count, corrections.tobytes()),
    )  # fmt: skip
    z, *messages = between(at_server, at_client, delta, s, fresh)
    return reduce(z + fresh, width.n), [len(m) for m in messages]


def between(
    at_server: relu.Share, at_client: relu.Share, delta: Words, s: Words, fresh: Words
) -> tuple[Words, Bytes, Bytes, Bytes, Bytes]:
    """What the server has at the end, and the messages: X, bits down, bits up, masked results."""
    gates, z = slice(0, len(s)), np.empty_like(s)
    opened = relu.opening(at_server, gates, delta, s, None)
    down = relu.sign_bits(at_server, gates, opened)
    up = relu.sign_bits(at_client, gates, opened)
    masked = relu.answer(at_client, gates, opened, up, down, fresh)
    relu.closing(at_server, gates, opened, down, up, masked, z, None)
    return z, opened, down, up, masked


@pytest.mark.parametrize(
    "k,n", [(2, 2), (2, 3), (3, 2), (4, 9), (7, 16), (9, 8), (9, 64), (11, 22)]
)
def test_gate_on_the_whole_ring(k: int, n: int) -> None:
    x = np.arange(-(1 << k - 1), 1 << k - 1).repeat(8)
    c, fresh = random_words(len(x)), random_words(len(x))
    width = Width(k, n)
    result, sizes = run_gate(width, x.view(np.uint64) - c, c, fresh)
    assert (result == reduce(np.maximum(x, 0).view(np.uint64), n)).all()
    assert sizes == [packing.size(len(x), bits) for bits in (k, 1, 1, n)]


class Drawn:
    """A dealer's stream whose first words are these: r in the low bits, rho on top."""

    def __init__(self, words: Words) -> None:
        self._words: Words | None = words
        self._rest = Stream(fresh_seed(), "rest")

    def words(self, count: int) -> Words:
        made, self._words = self._words, None
        return self._rest.words(count) if made is None else made


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 13, 64])
def test_gate_for_every_value_and_every_mask(k: int, n: int) -> None:
    """All x, all r and both rho, so that no case is left to chance."""
    side = np.arange(1 << k, dtype=np.uint64)
    x, r, rho = (a.reshape(-1) for a in np.meshgrid(side, side, np.arange(2, dtype=np.uint64)))
    count, width, shared = x.size, Width(k, n), fresh_seed()
    c, fresh = random_words(count), random_words(count)
    drawn = Drawn(rho << np.uint64(63) | (random_words(count) & ~np.uint64(1 << 63)) >> np.uint64(k)
                  << np.uint64(k) | r)  # fmt: skip
    corrections, message = relu.deal(width, c, Stream(shared, "gate"), drawn)  # type: ignore[arg-type]
    delta, at_server = relu.read_server_share(width, count, message)
    assert (delta == reduce(c + r, k)).all()
    at_client = relu.client_share(width, count, Stream(shared, "gate"), corrections)
    z, opened, *_ = between(at_server, at_client, delta, x - c, fresh)
    assert (packing.unpack(opened.data, count, k) == reduce(x + r, k)).all()
    expected = np.maximum(signed(x, k), 0).view(np.uint64)
    assert (reduce(z + fresh, n) == reduce(expected, n)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 62), st.integers(2, 64), st.data())
def test_gate_at_every_width(k: int, n: int, data: st.DataObject) -> None:
    half = 1 << k - 1
    values = data.draw(st.lists(st.integers(-half, half - 1), min_size=1, max_size=9))
    x = np.array([0, -1, half - 1, -half, *values], np.int64)
    c, fresh = random_words(len(x)), random_words(len(x))
    result, _ = run_gate(Width(k, n), x.view(np.uint64) - c, c, fresh)
    assert (result == reduce(np.maximum(x, 0).view(np.uint64), n)).all()


def test_gate_reads_only_k_bits_of_its_input() -> None:
    """Truncated shares are right modulo 2^(n - f_w) only; what lies above must not matter."""
    x = np.arange(-128, 128)
    c = random_words(256)
    s = x.view(np.uint64) - c + (random_words(256) << np.uint64(8))
    result, _ = run_gate(Width(8, 20), s, c, random_words(256))
    assert (signed(result, 20) == np.maximum(x, 0)).all()


def test_material_of_another_size_is_refused() -> None:
    width = Width(9, 20)
    _, message = relu.deal(
        width, random_words(5), Stream(fresh_seed(), "gate"), Stream(fresh_seed(), "dealer")
    )
    for wrong in (message[:-1], message + b"\0", b""):
        with pytest.raises(ProtocolError):
            relu.read_server_share(width, 5, wrong)
        with pytest.raises(ProtocolError):
            relu.read_corrections(width, 5, wrong)


def test_openings_are_uniform() -> None:
    """X and the client's reply do not depend on x: chi-square over a fixed input."""
    k, count = 4, 16000
    for value in (-8, 0, 7):
        x = np.full(count, value).view(np.uint64)
        c, shared = random_words(count), fresh_seed()
        corrections, message = relu.deal(
            Width(k, 4), c, Stream(shared, "gate"), Stream(fresh_seed(), "dealer")
        )
        delta, at_server = relu.read_server_share(Width(k, 4), count, message)
        at_client = relu.client_share(Width(k, 4), count, Stream(shared, "gate"), corrections)
        gates = slice(0, count)
        message = relu.opening(at_server, gates, delta, x - c, None)
        mine, theirs = (relu.sign_bits(side, gates, message) for side in (at_server, at_client))
        fields = relu.answer(at_client, gates, message, theirs, mine, random_words(count))
        opened, masked = (packing.unpack(m.data, count, k) for m in (message, fields))
        mine, theirs = (packing.unpack(m.data, count, 1) for m in (mine, theirs))
        d = mine ^ theirs ^ (opened >> np.uint64(k - 1))
        cells = np.bincount(((opened << np.uint64(1)) | d).astype(np.int64), minlength=32)
        assert ((cells - count / 32) ** 2 / (count / 32)).sum() < 75  # 31 degrees, p = 2e-5
        cells = np.bincount(masked.astype(np.int64), minlength=16)
        assert ((cells - count / 16) ** 2 / (count / 16)).sum() < 50  # 15 degrees, p = 1e-5
