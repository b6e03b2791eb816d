"""Fixed point against Python integers, and against plaintext."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system import models
from pi_system.errors import ParityError, UsageError
from pi_system.graph import execute, fixedpoint
from pi_system.graph.ir import Graph, Node


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 20, 30, 40, 52, 62]), st.integers(1, 9))
def test_products_are_exact_modulo_2_to_the_64(seed: int, bits: int, terms: int) -> None:
    rng = random.Random(seed)
    x = [[rng.randint(-(1 << bits), 1 << bits) for _ in range(terms)] for _ in range(3)]
    w = [[rng.randint(-(1 << bits), 1 << bits) for _ in range(terms)] for _ in range(2)]
    got = fixedpoint.exact_product(torch.tensor(x), torch.tensor(w), lambda a, b: F.linear(a, b))
    for i, row in enumerate(x):
        for j, column in enumerate(w):
            exact = sum(a * b for a, b in zip(row, column, strict=True))
            assert int(got[i, j]) == (exact + (1 << 63)) % (1 << 64) - (1 << 63)


def _one_node(op: str, shape: tuple[int, ...], **tensors: np.ndarray) -> Graph:
    attrs = {}
    if op == "conv":
        kernel = tensors["weight"].shape[2:]
        attrs = {"kernel": kernel, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        attrs["groups"] = 1
    if op in ("avgpool", "maxpool"):
        attrs = {"kernel": (2, 2), "stride": (1, 2), "padding": (1, 1)}
    nodes = (Node("x", "input", (), (2, 4, 4)), Node("y", op, ("x",), shape, attrs))
    return Graph(nodes, {f"y.{k}": v.astype(np.float32) for k, v in tensors.items()})


def test_each_operation_against_python_integers() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, 2, 4, 4)).astype(np.float32)
    x = fixedpoint.encode(images, 8)[0]
    assert [int(v) for v in x.flat] == [round(float(v) * 256) for v in images.flat]
    weight, bias = rng.normal(size=(3, 2, 4, 4)), rng.normal(size=3)
    graph = _one_node("conv", (3, 1, 1), weight=weight, bias=bias)
    got = fixedpoint.run(graph, images, fractional_bits=8)["y"]
    w = fixedpoint.encode(weight.astype(np.float32), 8)
    for i in range(3):
        total = sum(int(a) * int(b) for a, b in zip(w[i].flat, x.flat, strict=True))
        assert got[0, i, 0, 0] == total // 256 + round(float(np.float32(bias[i])) * 256)
    scale, shift = rng.normal(size=2), rng.normal(size=2)
    graph = _one_node("affine", (2, 4, 4), scale=scale, shift=shift)
    got = fixedpoint.run(graph, images, fractional_bits=8)["y"]
    s, t = (fixedpoint.encode(v.astype(np.float32), 8) for v in (scale, shift))
    assert all(
        got[0, c, i, j] == int(x[c, i, j]) * int(s[c]) // 256 + int(t[c])
        for c in range(2) for i in range(4) for j in range(4)
    )  # fmt: skip
    got = fixedpoint.run(_one_node("avgpool", (2, 5, 3)), images, fractional_bits=8)["y"]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    assert all(
        got[0, c, i, j] == int(padded[c, i : i + 2, 2 * j : 2 * j + 2].sum()) // 4
        for c in range(2) for i in range(5) for j in range(3)
    )  # fmt: skip
    graph = _one_node("maxpool", (2, 5, 3))
    got = fixedpoint.run(graph, images, fractional_bits=8)["y"]
    expected = F.max_pool2d(torch.from_numpy(x[None]).double(), 2, (1, 2), 1).numpy()
    assert (got == expected).all()


@pytest.mark.parametrize("arch", ["resnet10", "wrn22_8", "vgg16"])
def test_parity_holds_and_improves_with_precision(arch: str) -> None:
    graph = models.random_graph(arch, width=2, relus=1000)
    images = models.random_images(3, graph.input.shape)
    errors = []
    for bits in (10, 16, 22):
        parity = fixedpoint.parity(graph, images, fractional_bits=bits)
        assert [node.name for node in parity.nodes] == [node.name for node in graph]
        assert parity.nodes[0].max_abs_error <= 2.0 ** -(bits + 1)
        errors.append(parity.max_abs_error)
    assert errors[0] > 8 * errors[1] > 8 * 8 * errors[2]
    parity = fixedpoint.parity(graph, images)
    parity.require()
    assert parity.argmax_agreement == 1.0


def test_a_broken_parity_names_the_layer(graph: Graph) -> None:
    images = models.random_images(2, graph.input.shape)
    parity = fixedpoint.parity(graph, images, fractional_bits=3)
    with pytest.raises(ParityError, match=r"3 fractional bits.*exceeds that at") as caught:
        parity.require()
    assert caught.value.exit_code == 4


def test_wrong_images_and_precisions_are_refused(graph: Graph) -> None:
    images = models.random_images(2, graph.input.shape)
    for bits in (0, 25):
        with pytest.raises(UsageError, match="1 to 24"):
            fixedpoint.run(graph, images, fractional_bits=bits)
    for bad in (images[:, :2], images[0], images.astype(np.float64), images[:0]):
        with pytest.raises(UsageError, match=r"float32 \(N, 3, 32, 32\)"):
            fixedpoint.run(graph, bad)
        with pytest.raises(UsageError):
            execute.run(graph, bad)
        with pytest.raises(UsageError):
            execute.compile_plaintext(graph)(bad)
