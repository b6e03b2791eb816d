"""Ring arithmetic, packing and products against Python integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.backends.fss import kernels, linear, packing, ring
from pi_system.backends.fss.linear import RingConv
from pi_system.backends.fss.program import Conv
from pi_system.backends.fss.ring import Words
from pi_system.errors import ProtocolError

WORD = st.integers(0, 2**64 - 1)


def words(values: Any) -> Words:
    return np.array(values, np.uint64)


@given(WORD, st.integers(1, 64))
def test_signed_representative(value: int, n: int) -> None:
    expected = value % 2**n
    expected -= 2**n if expected >= 2 ** (n - 1) else 0
    assert int(ring.signed(words([value]), n)[0]) == expected


@given(WORD, st.integers(2, 64), st.data())
def test_shift_rounds_down(value: int, n: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, n - 1))
    expected = value % 2**n
    expected -= 2**n if expected >= 2 ** (n - 1) else 0
    assert int(ring.shift(words([value]), n, f).view(np.int64)[0]) == expected >> f


@given(st.lists(WORD, min_size=1, max_size=4), st.integers(4, 64), st.data())
def test_near_edge(values: list[int], n: int, data: st.DataObject) -> None:
    bound = data.draw(st.integers(1, 2 ** (n - 2)))
    edge = data.draw(st.integers(-3, 3))
    values = [*values, 2 ** (n - 1) - bound + edge]

    def near(value: int) -> bool:
        value %= 2**n
        value -= 2**n if value >= 2 ** (n - 1) else 0
        return value >= 2 ** (n - 1) - bound or value < -(2 ** (n - 1)) + bound

    for value in values:
        assert ring.near_edge(words([value]), n, bound) == near(value)
    assert ring.near_edge(words(values), n, bound) == any(map(near, values))


@given(st.integers(0, 64), st.lists(WORD, max_size=150))
def test_packing_is_the_bits_in_order(width: int, values: list[int]) -> None:
    number = sum((value % 2**width) << (i * width) for i, value in enumerate(values))
    for level in ("numpy", "portable", "auto"):
        with kernels.using(level):
            data = packing.pack(words(values), width)
            assert data == number.to_bytes(packing.size(len(values), width), "little")
            back = packing.unpack(data, len(values), width)
        assert back.tolist() == [value % 2**width for value in values]


def test_unpacking_refuses_what_packing_cannot_make() -> None:
    with pytest.raises(ProtocolError):
        packing.unpack(b"123", 2, 9)
    packing.unpack(b"\xff\xff\x03", 2, 9)
    with pytest.raises(ProtocolError):
        packing.unpack(b"\xff\xff\x04", 2, 9)
    reader = packing.Reader(b"ab")
    with pytest.raises(ProtocolError):
        reader.take(3, 8)
    reader.take(1, 8)
    with pytest.raises(ProtocolError):
        reader.done()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(2, 64),
    st.integers(0, 2**32),
)  # fmt: skip
def test_matrix_products(m: int, k: int, p: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2**64, (m, k), np.uint64)
    b = rng.integers(0, 2**64, (k, p), np.uint64)
    exact = (a.astype(object) @ b.astype(object)) % 2**n
    assert (ring.reduce(linear.matmul(a, b, n), n) == exact.astype(np.uint64)).all()
    small = rng.integers(-(2**15), 2**15, (m, k)).view(np.uint64)
    exact = (small.view(np.int64).astype(object) @ b.astype(object)) % 2**n
    assert (ring.reduce(linear.matmul(small, b, n, 16), n) == exact.astype(np.uint64)).all()


def test_matrix_products_at_the_limit_of_a_float64() -> None:
    k = 4608
    for a, bits in ((2**64 - 1, None), (2**63, None), (2**15 - 1, 16), (-(2**15) % 2**64, 16)):
        for b in (2**64 - 1, 2**63, 2**48 - 1):
            left, right = np.full((1, k), a, np.uint64), np.full((k, 1), b, np.uint64)
            exact = a * b * k % 2**64
            assert int(linear.matmul(left, right, 64, bits)[0, 0]) == exact


def naive_conv(op: Conv, x: Words, w: Words, n: int) -> Words:
    """The definition, in Python integers."""
    out, per_group, kh, kw = op.weight_shape
    _, height, width = op.shape
    result = np.zeros((len(x), *op.shape), object)
    per_out = out // op.groups
    for image, o, i, j in np.ndindex(len(x), out, height, width):
        total = 0
        for c, a, b in np.ndindex(per_group, kh, kw):
            y = i * op.stride[0] - op.padding[0] + a * op.dilation[0]
            z = j * op.stride[1] - op.padding[1] + b * op.dilation[1]
            if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                channel = o // per_out * per_group + c
                total += int(x[image, channel, y, z]) * int(w[o, c, a, b])
        result[image, o, i, j] = total % 2**n
    return result.astype(np.uint64)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ring_convolutions(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, per_group, per_out = draw(1, 3), draw(1, 3), draw(1, 3)
    kernel, stride = (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2))
    padding, dilation = (draw(0, 1), draw(0, 1)), (draw(1, 2), draw(1, 2))
    extra, n, batch = (draw(0, 4), draw(0, 4)), draw(8, 64), draw(1, 2)
    sides = tuple(d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, extra, strict=True))
    size = tuple(
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(sides, padding, dilation, kernel, stride, strict=True)
    )
    op = Conv(
        "y", ("x",), (groups * per_out, *size), "y", (groups * per_out, per_group, *kernel),
        stride, padding, dilation, groups,
    )  # fmt: skip
    rng = np.random.default_rng(draw(0, 2**32))
    x = rng.integers(0, 2**64, (batch, groups * per_group, *sides), np.uint64)
    wide = rng.integers(0, 2**64, op.weight_shape, np.uint64)
    small = rng.integers(-(2**15) + 1, 2**15, op.weight_shape).view(np.uint64)
    for weight, bits in ((wide, None), (small, 16)):
        expected = naive_conv(op, x, weight, n)
        conv = RingConv(op, x.shape[1:], weight, n, bits)
        assert (ring.reduce(conv(x), n) == expected).all()
