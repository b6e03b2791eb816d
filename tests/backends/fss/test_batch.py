"""How a batch of gates is cut into parts, and which ReLUs may overwrite their input."""

from __future__ import annotations

import numpy as np
import pytest
from fss_networks import Builder
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.backends.fss import batch, program
from pi_system.backends.fss.program import Relu


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 3))
def test_parts_hold_every_gate_once_in_order(kept: list[int], images: int) -> None:
    gates = [Relu(f"relu{i}", ("x",), (count,), np.arange(count)) for i, count in enumerate(kept)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "PART", 64)
        parts = batch.parts(gates, images)
    pieces = [piece for part in parts for piece in part]
    for op, count in zip(gates, kept, strict=True):
        own = [piece.gates for piece in pieces if piece.op is op]
        assert [index for cut in own for index in range(cut.start, cut.stop)] == list(
            range(images * count)
        )
        assert all(cut.start % 8 == 0 for cut in own)
    assert [piece.op for piece in pieces] == sorted((p.op for p in pieces), key=gates.index)
    assert all(0 < sum(piece.length for piece in part) <= 64 for part in parts)


def test_a_relu_overwrites_only_what_nobody_reads_later() -> None:
    b = Builder(np.random.default_rng(0))
    x = b.conv("image", 4)
    alone = b.relu(x, 0.5)
    y = b.conv(alone, 4)
    shared = b.relu(y, 0.5)
    z = b.add("add", (b.conv(shared, 4), y), b.shape(y))
    size = (int(np.prod(b.shape(z))),)
    view, other = (b.add("flatten", (z,), size) for _ in range(2))
    total = b.add("add", (b.relu(view, 0.5), other), size)
    b.linear(total, 5)
    assert program.build(b.graph()).overwriting() == {alone}
