"""The fixed-point plan: serialisation, refusals, overflow, rings, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fss_networks import Builder, images, planned, random_graph, residual
from numpy.testing import assert_array_equal

from pi_system.backends.fss import plan as plans
from pi_system.backends.fss import program, weights
from pi_system.backends.fss.plan import HIGH, Plan, Precision, calibrate
from pi_system.backends.fss.ring import near_edge, shift
from pi_system.errors import ProtocolError, UsageError
from pi_system.graph.execute import run
from pi_system.graph.ir import Graph, Node


def test_a_plan_survives_json() -> None:
    for seed in range(6):
        graph, plan = planned(random_graph(seed))
        text = json.dumps(plan.to_json())
        assert Plan.from_json(json.loads(text), program.build(graph)) == plan


def test_a_false_plan_is_refused() -> None:
    graph, plan = planned(residual())
    lowered = program.build(graph)
    gate = next(iter(plan.gates))
    conv = next(iter(plan.convs))

    def changed(path: tuple[str, ...], value: object) -> dict[str, object]:
        data = plan.to_json()
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return data

    for wrong in (
        None,
        [],
        {},
        changed(("gates", gate, "k"), 63),
        changed(("gates", gate, "k"), 8.0),
        changed(("gates", gate, "k"), True),
        changed(("gates", "other"), {"k": 8, "n": 20}),
        changed(("convs", conv, "n"), 65),
        changed(("convs", conv, "f_w"), 0),
        changed(("convs", conv, "bound"), 1 << 63),
        changed(("convs", conv, "more"), 1),
        changed(("output_k",), 0),
        changed(("error",), float("nan")),
        changed(("f_x",), "7"),
        changed(("input_limit",), 10**400),
        changed(("input_limit",), 1e300),
        changed(("retry_rate",), 10**400),
    ):
        with pytest.raises(ProtocolError):
            Plan.from_json(wrong, lowered)


def test_overflow_is_an_error_when_planning() -> None:
    graph = residual()
    with pytest.raises(UsageError, match="ring"):
        calibrate(graph, images(graph, 4), Precision(f_x=24, weight_bits=14, retry_bits=20))
    with pytest.raises(UsageError, match="images"):
        calibrate(graph, images(graph, 4)[:, :1])
    bad = images(graph, 2)
    bad[1, 0, 0, 0] = np.inf
    with pytest.raises(UsageError, match="finite"):
        calibrate(graph, bad)


def test_opened_widths_hold_the_calibrated_range() -> None:
    b = Builder(np.random.default_rng(0), (1, 1, 1))
    b.conv("image", 1, 1)
    x = b.relu("conv1", 1.1)
    b.linear(x, 1)
    graph = b.graph()
    graph.tensors["conv1.weight"][:] = 1
    graph.tensors["conv1.bias"][:] = 0
    for top, bits in ((1.0, 0), (3.99, 1), (4.0, 2), (100.0, 6)):
        plan = calibrate(graph, np.full((1, 1, 1, 1), top, np.float32), Precision(f_x=7))
        assert plan.gates[x].k >= 7 + bits + 1 + 1  # magnitude, margin, sign
        assert plan.gates[x].k <= 7 + bits + 4


def test_long_chains_of_pools_are_planned() -> None:
    """As deep as a graph may be: nothing walks it by recursion, or once per node."""
    b = Builder(np.random.default_rng(0), (1, 2, 2))
    nodes, last = list(b.nodes), "image"
    for index in range(9_000):
        attrs = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0)}
        nodes.append(Node(f"p{index}", "avgpool", (last,), (1, 2, 2), attrs))
        last = f"p{index}"
    nodes.append(Node("flat", "flatten", (last,), (4,)))
    nodes.append(Node("y", "linear", ("flat",), (2,)))
    lowered = program.build(Graph(tuple(nodes), {}))
    assert [type(op).__name__ for op in lowered.ops].count("SumPool") == 9_000


def test_empty_layers_cost_no_round_trip() -> None:
    assert program.build(residual(keep=0.0)).round_trips == 1
    assert program.build(residual(keep=1.0)).round_trips == 4


def test_rings_shrink_with_depth_within_the_retry_budget() -> None:
    graph, plan = planned(deep())
    lowered = program.build(graph)
    rings = [plan.convs[op.out].n for op in lowered.convs if plan.convs[op.out].bound]
    assert len(rings) > 4
    assert rings == sorted(rings, reverse=True)
    assert rings[0] > rings[-1]
    checked = [(op.size, plan.convs[op.out]) for op in lowered.convs if plan.convs[op.out].bound]
    total = sum(size * (2 * conv.bound + 1) * 2.0**-conv.n for size, conv in checked)
    assert plan.retry_rate == pytest.approx(total)
    assert 2.0**-11 < plan.retry_rate <= 2.0**-10


def test_an_input_is_never_in_a_smaller_ring_than_what_is_made_of_it() -> None:
    for graph in (deep(), *map(random_graph, range(12))):
        _, plan = planned(graph)
        lowered = program.build(graph)
        width = {op.out: plan.convs[op.out].n for op in lowered.convs}
        width |= {op.out: plan.gates[op.out].n for op in lowered.relus}
        width[lowered.input.out] = plan.input_n
        reach = dict.fromkeys(lowered.shapes, 0)
        for op in reversed(list(lowered.ops)):
            wanted = width.get(op.out, reach[op.out])
            assert wanted >= (0 if isinstance(op, program.Conv) else reach[op.out])
            for name in op.inputs:
                kept_only = isinstance(op, program.Relu) and op.full
                reach[name] = max(reach[name], 0 if kept_only else wanted)


def test_the_stated_error_holds_and_is_of_use() -> None:
    """Against other images than it was measured on, and not far above what happens."""
    for precision in (Precision(), HIGH):
        graph = deep()
        plan = calibrate(graph, images(graph, 64, seed=2), precision)
        lowered = program.build(graph)
        x = images(graph, 64, seed=3)
        f_w = {name: conv.f_w for name, conv in plan.convs.items()}
        private = plans._fixed_point(graph, lowered, x, plan.f_x, f_w)
        error = np.abs(private.reshape(64, -1) - run(graph, x)).max()
        assert plan.error / 8 < error <= plan.error


def test_more_precision_means_less_error() -> None:
    graph = deep()
    x = images(graph, 16)
    assert 4 * calibrate(graph, x, HIGH).error < calibrate(graph, x).error


def test_fast_weights_fit_words_at_the_points_of_the_fast_convolutions() -> None:
    graph = deep()
    lowered = program.build(graph)
    fast = calibrate(graph, images(graph, 8), Precision(weight_bits=15))
    exact = calibrate(graph, images(graph, 8), Precision(weight_bits=15, fast=False))
    lower = 0
    for op in lowered.convs:
        f_w = fast.convs[op.out].f_w
        lower += f_w < exact.convs[op.out].f_w
        if op.weight_shape[2:] == (3, 3) and op.stride == (1, 1):
            weight = np.rint(weights.reals(graph, op)[0] * 2.0**f_w)
            for row in ((1, 2, 4), (4, 2, 1), (1, 1, 1), (1, -1, 1)):
                for column in ((1, 2, 4), (4, 2, 1), (0, 0, 1)):
                    point = np.einsum("oikl,k,l->oi", weight, np.array(row), np.array(column))
                    assert np.abs(point).max() < 2**15
    assert lower > 0


def test_wider_weights_give_way_to_the_fast_rings() -> None:
    graph = deep()
    x = images(graph, 8)
    widest = [
        max(conv.n for conv in calibrate(graph, x, Precision(f_x, 15, fast=False)).convs.values())
        for f_x in range(9, 24)
    ]
    assert widest == sorted(widest)
    assert widest[-1] > 62  # two bits less were not enough
    assert widest.count(62) >= 3  # one and two bits less, and none


@pytest.mark.parametrize("n", [6, 8, 10])
def test_every_wrap_is_in_the_zone(n: int) -> None:
    """All y below the bound and all u of a small ring: shares of a truncation are off by more
    than one only where the check says so, and it says so as often as derived."""
    f, half = 2, 1 << (n - 1)
    u = np.arange(-half, half)
    for bound in (1, 3, half // 4, half // 2):
        for y in {-bound + 1, -1, 0, bound // 2, bound - 1} & set(range(1 - bound, bound)):
            v = (y - u + half) % (2 * half) - half
            words, shares = (part.astype(np.int64).view(np.uint64) for part in (v, u))
            total = (shift(words, n, f) + shift(shares, n, f)).view(np.int64)
            wrong = (total != y >> f) & (total != (y >> f) - 1)
            near = np.array([near_edge(words[i : i + 1], n, bound) for i in range(2 * half)])
            assert_array_equal(wrong, v + u != y)
            assert near[wrong].all()
            assert near.sum() == 2 * bound
            assert wrong.sum() == (y + 1 if y >= 0 else -y - 1)


def deep() -> Graph:
    """Residual blocks at shrinking sizes, a third of the ReLUs kept."""
    b = Builder(np.random.default_rng(7), (3, 16, 16))
    x = b.relu(b.conv("image", 4), 0.3)
    for channels in (4, 8, 12):
        y = b.relu(b.conv(x, channels, stride=1 if channels == 4 else 2), 0.3)
        y = b.conv(y, channels)
        if channels != 4:
            x = b.conv(x, channels, stride=2)
        x = b.relu(b.add("add", (y, x), b.shape(y)), 0.3)
    side = b.shape(x)[1]
    x = b.pool(x, "avgpool", side, side)
    b.linear(x, 5)
    return b.graph()
