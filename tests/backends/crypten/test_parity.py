"""Private answers equal plaintext's, layer by layer and end to end."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from crypten_trio import Builder, Trio, images

from pi_system.graph import execute
from pi_system.graph.ir import Graph

Make = Callable[..., Trio]

UNIT = 2.0**-16


def every_kind() -> Graph:
    """All layer kinds with odd strides, paddings, dilations and groups, and values read twice."""
    b = Builder((3, 9, 8))
    first = b.relu(b.conv(4))
    b.conv(4, padding=(2, 2), dilation=(2, 2), groups=2)
    b.affine()
    total = b.add("add", b.last, first, first)
    largest = b.pool("maxpool", total, kernel=(3, 2), stride=(2, 2), padding=(1, 0))
    mean = b.pool("avgpool", total, kernel=(3, 2), stride=(2, 2), padding=(1, 0))
    b.relu(b.add("concat", largest, mean, largest), keep=0.3)
    b.relu(keep=0.0)
    b.conv(12, groups=12, kernel=(3, 1), padding=(1, 0), stride=(2, 1))
    b.add("add", b.last, b.last)
    b.linear(6)
    b.relu()
    b.affine()
    b.linear(3)
    return b.graph()


def random_graph(seed: int) -> Graph:
    rng = random.Random(seed)
    b = Builder((rng.choice([1, 3]), 6, 7), seed)
    for _ in range(rng.randint(2, 4)):
        before = b.last
        channels = before.shape[0]
        match rng.choice(["conv", "residual", "concat", "depthwise", "pool", "affine"]):
            case "conv":
                b.conv(rng.choice([2, 4]), stride=rng.choice([(1, 1), (2, 1)]))
            case "residual":
                b.conv(channels, b.affine())
                b.add("add", b.last, before)
            case "concat":
                b.add("concat", b.conv(2), before)
            case "depthwise":
                b.conv(2 * channels, groups=channels, kernel=(1, 3), padding=(0, 1))
            case "pool" if before.shape[1] > 3 and before.shape[2] > 3:
                b.pool(rng.choice(["maxpool", "avgpool"]), kernel=(2, 2), stride=(2, 1))
            case _:
                b.affine()
        b.relu(keep=rng.choice([0.0, 0.2, 1.0]))
    b.linear(4)
    return b.graph()


def test_every_kind_of_layer_in_a_batch_and_in_part_of_one(trio: Make) -> None:
    graph = every_kind()
    session = trio(graph, batch=3)
    x = images(graph, 3)
    expected = execute.run(graph, x)
    np.testing.assert_allclose(session.infer(x), expected, atol=100 * UNIT)
    few = session.infer(x[:2])
    assert few.shape == (2, 3) and few.dtype == np.float32
    np.testing.assert_allclose(few, expected[:2], atol=100 * UNIT)


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs(trio: Make, seed: int) -> None:
    graph = random_graph(seed)
    x = images(graph, seed=seed)
    expected = execute.run(graph, x)
    limit = 200 * UNIT * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(trio(graph).infer(x), expected, atol=limit)


def test_a_relu_is_exact_on_what_it_is_given(trio: Make) -> None:
    """Comparison and selection add no error; only the layers around it round."""
    b = Builder((1, 8, 8))
    node = b.affine()
    b.put(node, "scale", np.ones(1, np.float32))
    b.put(node, "shift", np.zeros(1, np.float32))
    b.relu()
    b.add("flatten")
    graph = b.graph()
    x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    x.flat[:4] = 0, UNIT, -UNIT, -1
    result = trio(graph).infer(x)
    expected = np.maximum(np.round(x.reshape(1, -1).astype(np.float64) / UNIT) * UNIT, 0)
    assert np.abs(result - expected).max() <= UNIT
