"""Grouped, strided, dilated, padded convolutions and their exact results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from pi_system.backends.fss.program import Conv
from pi_system.backends.fss.ring import Words


@dataclass(frozen=True)
class Case:
    op: Conv
    source: tuple[int, int, int]
    x: Words
    weight: Words
    add: Words | None
    n: int


def exact(case: Case) -> Words:
    """By the definition, in Python integers, reduced to [0, 2^n)."""
    op = case.op
    (sh, sw), (ph, pw), (dh, dw) = op.stride, op.padding, op.dilation
    out, inner, kh, kw = op.weight_shape
    x = np.pad(case.x, ((0, 0), (0, 0), (ph, ph), (pw, pw))).astype(object)
    weight = case.weight.astype(object)
    total = np.zeros((len(x), *op.shape), object)
    for o in range(out):
        first = o // (out // op.groups) * inner
        for c in range(inner):
            for i in range(kh):
                for j in range(kw):
                    rows = slice(i * dh, i * dh + sh * (op.shape[1] - 1) + 1, sh)
                    columns = slice(j * dw, j * dw + sw * (op.shape[2] - 1) + 1, sw)
                    total[:, o] += weight[o, c, i, j] * x[:, first + c, rows, columns]
    if case.add is not None:
        total = total + case.add.astype(object)
    return np.asarray(total % (1 << case.n), np.uint64)


@st.composite
def cases(draw: st.DrawFn, largest: int = 20) -> Case:
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    out, inner = draw(st.integers(1, largest)), draw(st.integers(1, 4))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * 2))
    stride = draw(st.tuples(*[st.integers(1, 2)] * 2))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 2))
    sides = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 7))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    height, width = (
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, d, k, s in zip(sides, padding, dilation, kernel, stride, strict=True)
    )
    op = Conv(
        "y", ("x",), (out * groups, height, width), "y", (out * groups, inner, *kernel),
        stride, padding, dilation, groups,
    )  # fmt: skip
    source = (inner * groups, sides[0], sides[1])
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch = draw(st.integers(1, 3))

    def words(*shape: int) -> Words:
        kind = draw(st.sampled_from(("uniform", "ones", "top")))
        fill = {"ones": 2**64 - 1, "top": 2**63}.get(kind)
        if fill is not None:
            return np.full(shape, fill, np.uint64)
        return rng.integers(0, 2**64, shape, np.uint64)

    add = words(batch, *op.shape) if draw(st.booleans()) else None
    return Case(
        op, source, words(batch, *source), words(*op.weight_shape), add, draw(st.integers(1, 64))
    )
