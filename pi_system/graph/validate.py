"""Shape inference and the check of a graph that came from a file or a peer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from ..errors import PiError
from .ir import TENSORS, Attribute, Graph, Node

MAX_NODES: Final = 10_000
MAX_ELEMENTS: Final = 1 << 26
"""Positions of all nodes together, with what padding and the windows of max pools add."""
MAX_WEIGHTS: Final = 1 << 28
MAX_WORK: Final = 1 << 40
"""Multiplications and additions per image; VGG-16 at 224 x 224 has 2^34."""
_MAX_ATTRIBUTE: Final = 1 << 16
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")

_PAIRS: Final[Mapping[str, tuple[str, ...]]] = {
    "conv": ("kernel", "stride", "padding", "dilation"),
    "avgpool": ("kernel", "stride", "padding"),
    "maxpool": ("kernel", "stride", "padding"),
}


def infer_shape(
    op: str, attrs: Mapping[str, Attribute], inputs: tuple[tuple[int, ...], ...], channels: int
) -> tuple[int, ...]:
    """Shape of a node's output per image.

    Args:
        inputs: the shapes of its inputs.
        channels: outputs of a conv or linear node; not used by the others.

    Raises:
        ValueError: the inputs do not fit the node.
    """
    first = inputs[0]
    if op in ("conv", "avgpool", "maxpool"):
        if len(first) != 3:
            raise ValueError(f"needs an input of shape (C, H, W), got {first}")
        kernel, stride, padding = (attrs[k] for k in ("kernel", "stride", "padding"))
        dilation = attrs.get("dilation", (1, 1))
        assert isinstance(kernel, tuple) and isinstance(stride, tuple)
        assert isinstance(padding, tuple) and isinstance(dilation, tuple)
        size = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(first[1:], kernel, stride, padding, dilation, strict=True)
        )
        if min(size) < 1:
            raise ValueError(f"kernel {kernel} is larger than the padded input {first}")
        return (channels if op == "conv" else first[0], *size)
    if op == "linear":
        if len(first) != 1:
            raise ValueError(f"needs a flat input, got {first}")
        return (channels,)
    if op == "flatten":
        return (int(np.prod(first)),)
    if op == "add":
        if len(set(inputs)) != 1:
            raise ValueError(f"adds inputs of different shapes {', '.join(map(str, inputs))}")
        return first
    if op == "concat":
        if len({shape[1:] for shape in inputs}) != 1:
            raise ValueError(f"joins inputs of unlike shapes {', '.join(map(str, inputs))}")
        return (sum(shape[0] for shape in inputs), *first[1:])
    return first


def tensor_shape(node: Node, role: str, inputs: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The only shape tensor ``role`` of ``node`` can have."""
    if role == "mask":
        return node.shape
    if role != "weight":
        return (node.shape[0],)
    if node.op == "linear":
        return node.shape[0], inputs[0][0]
    groups = node.attrs["groups"]
    assert isinstance(groups, int)
    return node.shape[0], inputs[0][0] // groups, *node.pair("kernel")


def check(graph: Graph, *, weights: bool, error: type[PiError]) -> None:
    """Refuse a graph that is not exactly what the exporter writes.

    Args:
        weights: whether it must hold all tensors, or (a public graph) the masks only.
        error: what to raise.
    """
    if not 1 <= len(graph.nodes) <= MAX_NODES:
        raise error(f"the graph has {len(graph.nodes)} nodes, allowed are 1 to {MAX_NODES}")
    shapes: dict[str, tuple[int, ...]] = {}
    elements = weighed = work = 0
    read: set[str] = set()
    expected: dict[str, tuple[int, ...]] = {}
    for index, node in enumerate(graph.nodes):
        try:
            _check_node(node, index, shapes)
            cost = _cost(node, tuple(shapes[name] for name in node.inputs))
            elements, weighed, work = elements + cost[0], weighed + cost[1], work + cost[2]
            if elements > MAX_ELEMENTS or weighed > MAX_WEIGHTS or work > MAX_WORK:
                raise ValueError("with this node the network is too large")
            for role in TENSORS[node.op]:
                if weights or role == "mask":
                    inputs = tuple(shapes[name] for name in node.inputs)
                    expected[f"{node.name}.{role}"] = tensor_shape(node, role, inputs)
        except ValueError as problem:
            raise error(f"node {node.name[:80]!r} ({node.op}): {problem}") from problem
        shapes[node.name] = node.shape
        read.update(node.inputs)
    unread = [node.name for node in graph.nodes[:-1] if node.name not in read]
    if unread:
        raise error(f"node {unread[0]!r} is read by nobody")
    if set(expected) != set(graph.tensors):
        odd = sorted(set(expected) ^ set(graph.tensors))[0]
        raise error(f"tensor {odd[:80]!r} is {'missing' if odd in expected else 'not expected'}")
    for name, shape in expected.items():
        value = graph.tensors[name]
        dtype = np.bool_ if name.endswith(".mask") else np.float32
        if value.dtype != dtype or value.shape != shape:
            raise error(
                f"tensor {name!r} is {value.dtype} {value.shape}, expected "
                f"{np.dtype(dtype)} {shape}"
            )
        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise error(f"tensor {name!r} holds a value that is not finite")


def _cost(node: Node, inputs: tuple[tuple[int, ...], ...]) -> tuple[int, int, int]:
    """Elements held, weights and operations of a node, before anything is allocated for it."""
    size = math.prod(node.shape)
    if node.op == "linear":
        return size, size * inputs[0][0], size * inputs[0][0]
    if node.op not in _PAIRS:
        return size, 0, size * len(inputs)
    channels, *sides = inputs[0]
    window = math.prod(node.pair("kernel"))
    if node.op == "maxpool":
        return size * (1 + window), 0, size * window
    padded = channels * math.prod(
        side + 2 * p for side, p in zip(sides, node.pair("padding"), strict=True)
    )
    if node.op == "avgpool":
        return size + padded, channels * window, size * window
    groups = node.attrs["groups"]
    assert isinstance(groups, int)
    reach = channels // groups * window
    return size + padded, node.shape[0] * reach, size * reach


def _check_node(node: Node, index: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not _NAME.fullmatch(node.name):
        raise ValueError("not a name")
    if (node.op == "input") != (index == 0):
        raise ValueError("the first node and no other is the input")
    if not 1 <= len(node.shape) <= 3 or len(node.shape) == 2 or min(node.shape) < 1:
        raise ValueError(f"shape {node.shape} is neither (C, H, W) nor (C,)")
    if max(node.shape) > MAX_ELEMENTS or int(np.prod(node.shape, dtype=object)) > MAX_ELEMENTS:
        raise ValueError(f"shape {node.shape} is too large")
    count = len(node.inputs)
    if node.op == "input":
        if count or node.attrs:
            raise ValueError("the input has no inputs or attributes")
        return
    if count < 2 if node.op in ("add", "concat") else count != 1:
        raise ValueError(f"has {count} inputs")
    _check_attributes(node)
    inputs = tuple(shapes[name] for name in node.inputs)
    if node.op == "conv":
        groups = node.attrs["groups"]
        assert isinstance(groups, int)
        if len(inputs[0]) != 3 or inputs[0][0] % groups or node.shape[0] % groups:
            raise ValueError(f"{groups} groups do not divide the channels")
    shape = infer_shape(node.op, node.attrs, inputs, node.shape[0])
    if shape != node.shape:
        raise ValueError(f"states shape {node.shape}, its inputs give {shape}")


def _check_attributes(node: Node) -> None:
    pairs = _PAIRS.get(node.op, ())
    wanted = {*pairs, "groups"} if node.op == "conv" else set(pairs)
    if set(node.attrs) != wanted:
        raise ValueError(f"attributes {sorted(node.attrs)}, expected {sorted(wanted)}")
    for key in pairs:
        value = node.attrs[key]
        if not isinstance(value, tuple) or len(value) != 2:
            raise ValueError(f"attribute {key} is not a pair")
        least = 0 if key == "padding" else 1
        if any(not least <= v <= _MAX_ATTRIBUTE for v in value):
            raise ValueError(f"attribute {key} is {value}")
        if node.op != "conv" and key == "padding":
            kernel = node.pair("kernel")
            if any(2 * p > k for p, k in zip(value, kernel, strict=True)):
                raise ValueError("padding is more than half the kernel")
    if node.op == "conv":
        groups = node.attrs["groups"]
        if not isinstance(groups, int) or not 1 <= groups <= _MAX_ATTRIBUTE:
            raise ValueError(f"attribute groups is {groups}")
