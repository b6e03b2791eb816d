"""The fixed-point plan: serialisation, refusals, overflow."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fss_networks import Builder, images, planned, random_graph, residual

from pi_system.backends.fss import program
from pi_system.backends.fss.plan import Plan, Precision, calibrate
from pi_system.errors import ProtocolError, UsageError
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
