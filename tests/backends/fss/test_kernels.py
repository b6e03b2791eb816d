"""Every kernel variant against the NumPy one, which the other tests hold against definitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.backends.fss import dpf, kernels, packing, relu, ring
from pi_system.backends.fss.linear import RingConv
from pi_system.backends.fss.program import Conv
from pi_system.backends.fss.relu import Share, Width
from pi_system.backends.fss.ring import Words
from pi_system.errors import UsageError

with kernels.using("auto") as _native:
    BUILT = _native is not None
needs_native = pytest.mark.skipif(not BUILT, reason="the C kernels were not built")
LEVELS = ("portable", "avx2", "vaes", "auto")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def words(rng: np.random.Generator, *shape: int) -> Words:
    return rng.integers(0, 2**64, shape, np.uint64)


def conv_op(
    out: int, channels: int, kernel: int, side: int, stride: int = 1, padding: int = 1,
    groups: int = 1,
) -> tuple[Conv, tuple[int, int, int]]:  # fmt: skip
    size = (side + 2 * padding - kernel) // stride + 1
    op = Conv(
        "y", ("x",), (out, size, size), "y", (out, channels // groups, kernel, kernel),
        (stride, stride), (padding, padding), groups=groups,
    )  # fmt: skip
    return op, (channels, side, side)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UsageError, match="PI_SYSTEM_KERNELS"), kernels.using("sse9"):
        pass


def test_without_native_everything_is_numpy() -> None:
    with kernels.using("numpy") as found:
        assert found is None
        assert kernels.describe() == "numpy"


@needs_native
@pytest.mark.parametrize("width", range(65))
def test_packing(width: int, level: str) -> None:
    values = words(np.random.default_rng(width), 131)
    with kernels.using("numpy"):
        expected = packing.pack(values, width)
    with kernels.using(level):
        assert packing.pack(values, width) == expected
        assert (packing.unpack(expected, 131, width) == ring.reduce(values, width)).all()


@needs_native
@pytest.mark.parametrize("bits", range(1, 62))
def test_comparison_keys_at_every_width(bits: int, level: str) -> None:
    """At alpha, beside it and at both ends, against the definition, and bit for bit as NumPy."""
    top = (1 << bits) - 1
    rng = np.random.default_rng(bits)
    alphas = {0, 1, top, top >> 1, *rng.integers(0, top, 2, np.uint64, endpoint=True).tolist()}
    pairs = [
        (alpha, x)
        for alpha in sorted(alphas)
        if alpha <= top
        for x in (alpha - 1, alpha, alpha + 1, 0, top)
        if 0 <= x <= top
    ]
    alpha, x = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    root, delta = words(rng, len(x), 2), words(rng, len(x), 2)
    results = []
    for variant in ("numpy", level):
        with kernels.using(variant):
            corrections, other = dpf.generate(alpha, bits, root, delta)
            shares = [dpf.evaluate(key, corrections, x, bits) for key in (root, other)]
        assert (shares[0] ^ shares[1] == (alpha <= x)).all()
        results.append((corrections, other, *shares))
    for expected, found in zip(*results, strict=True):
        assert (expected == found).all()


@needs_native
@pytest.mark.parametrize("bits", [1, 2, 6, 7, 8, 11, 15, 31, 61])
@pytest.mark.parametrize("count", [1, 7, 8, 16, 37])
def test_comparison_keys(bits: int, count: int, level: str) -> None:
    rng = np.random.default_rng(bits * 100 + count)
    alpha = ring.reduce(words(rng, count), bits)
    x, root, delta = words(rng, count), words(rng, count, 2), words(rng, count, 2)
    with kernels.using("numpy"):
        corrections, other = dpf.generate(alpha, bits, root, delta)
        expected = [dpf.evaluate(key, corrections, x, bits) for key in (root, other)]
    with kernels.using(level):
        made, made_other = dpf.generate(alpha, bits, root, delta)
        assert (made == corrections).all() and (made_other == other).all()
        for key, share in zip((root, other), expected, strict=True):
            assert (dpf.evaluate(key, corrections, x, bits) == share).all()


@needs_native
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 62), st.integers(1, 64), st.integers(0, 2**32), st.booleans())
def test_gate_arithmetic(k: int, n: int, seed: int, server: bool) -> None:
    rng = np.random.default_rng(seed)
    count = 13
    width, values = Width(k, n), words(rng, 5, count)
    opened, signs = ring.reduce(words(rng, count), k), words(rng, count) & np.uint64(1)
    results = []
    for variant in ("numpy", *LEVELS):
        with kernels.using(variant):
            results.append(relu.result_share(width, values, opened, signs, server=server))
    for result in results[1:]:
        assert (ring.reduce(result, n) == ring.reduce(results[0], n)).all()


CASES = [
    # outputs, channels, kernel, side, stride, padding, groups
    (16, 4, 3, 8, 1, 1, 1),
    (20, 8, 3, 9, 1, 1, 1),
    (12, 12, 3, 5, 1, 0, 1),
    (36, 16, 3, 4, 1, 1, 1),
    (4, 3, 3, 6, 1, 1, 1),
    (17, 5, 3, 7, 2, 1, 1),
    (24, 6, 1, 6, 2, 0, 1),
    (10, 40, 1, 1, 1, 0, 1),
    (8, 8, 3, 6, 1, 1, 8),
    (8, 4, 5, 7, 1, 2, 2),
    (16, 300, 3, 4, 1, 1, 1),
]


@needs_native
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [20, 26, 33, 54, 58, 64])
def test_convolutions(case: tuple[int, ...], n: int, level: str) -> None:
    op, source = conv_op(*case)
    rng = np.random.default_rng(n)
    x = words(rng, 3, *source)
    for magnitude in (1 << 15, 600, None):
        if magnitude is None:
            weight, bits = words(rng, *op.weight_shape), None
        else:
            low, high = 1 - magnitude, magnitude
            weight = rng.integers(low, high, op.weight_shape).view(np.uint64)
            weight.flat[:4] = np.array([low, high - 1, low, low]).view(np.uint64)
            bits = magnitude.bit_length()
        with kernels.using("numpy"):
            expected = ring.reduce(RingConv(op, source, weight, n, bits)(x), n)
        with kernels.using(level):
            conv = RingConv(op, source, weight, n, bits)
            assert (ring.reduce(conv(x), n) == expected).all()
            assert (ring.reduce(conv(x[:1]), n) == expected[:1]).all()


@needs_native
@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 0x7FFF800080008000, 0x8000800080008000])
@pytest.mark.parametrize("weight", [32767, -32767])
def test_no_accumulator_overflows(value: int, weight: int) -> None:
    """The largest weights against the largest digits, over a long inner product."""
    op, source = conv_op(16, 512, 3, 4)
    x = np.full((1, *source), value, np.uint64)
    w = np.full(op.weight_shape, weight).view(np.uint64)
    with kernels.using("numpy"):
        expected = RingConv(op, source, w, 64, 16)(x)
    for variant in LEVELS:
        with kernels.using(variant):
            assert (RingConv(op, source, w, 64, 16)(x) == expected).all()


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.integers(2, 64), st.integers(0, 2**32), st.data())
def test_truncation_and_zone_check(n: int, seed: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(1, n - 1))
    bound = data.draw(st.integers(0, 2 ** (n - 1) - 1))
    rng = np.random.default_rng(seed)
    op, source = conv_op(1, 1, 1, 2, padding=0)
    edge = 2 ** (n - 1) - bound
    x = words(rng, 1, *source)
    if data.draw(st.booleans()):
        x[0, 0, 0, 0] = (edge - data.draw(st.integers(0, 2))) % 2**64
    add = np.zeros((1, *op.shape), np.uint64)
    weight = np.ones(op.weight_shape, np.uint64)
    with kernels.using("numpy"):
        expected, near = RingConv(op, source, weight, n, 2).truncated(x, add.copy(), f, bound)
        assert near == (bool(bound) and ring.near_edge(x, n, bound))
    for level in LEVELS:
        with kernels.using(level):
            conv = RingConv(op, source, weight, n, 2)
            value, found = conv.truncated(x, add.copy(), f, bound)
        assert (value == expected).all() and found == near


@needs_native
@pytest.mark.parametrize("count", [1, 511, 512, 1300])
@pytest.mark.parametrize("k,n", [(2, 64), (9, 7), (13, 55)])
def test_whole_gates(count: int, k: int, n: int, level: str) -> None:
    """Every message of both parties byte for byte, at scattered positions and in parts."""
    rng = np.random.default_rng(count)
    width = Width(k, n)

    def share() -> Share:
        return Share(
            width,
            words(rng, count, 2),
            words(rng, width.blocks, count, 2),
            words(rng, count) & np.uint64(1),
            words(rng, 5, count),
        )

    server, client = share(), share()
    source, delta, mask = words(rng, 2 * count), words(rng, count), words(rng, count)
    index = np.sort(rng.choice(2 * count, count, replace=False))
    results = []
    cuts = [*range(0, count, 264), count]
    for variant in ("numpy", level):
        messages, target = [], source.copy()
        with kernels.using(variant):
            for gates in map(slice, cuts, cuts[1:]):
                opened = relu.opening(server, gates, delta, target, index)
                down, up = (relu.sign_bits(side, gates, opened) for side in (server, client))
                masked = relu.answer(client, gates, opened, up, down, mask)
                relu.closing(server, gates, opened, down, up, masked, target, index)
                messages += [opened, down, up, masked]
        results.append((*messages, ring.reduce(target, n)))
    for expected, found in zip(*results, strict=True):
        assert np.array_equal(expected, found)
