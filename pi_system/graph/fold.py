"""Affine layers folded into the convolution or linear layer before them."""

from __future__ import annotations

import dataclasses

import numpy as np

from .ir import Array, Graph, Node


def fold(graph: Graph) -> Graph:
    """Fold each affine node whose only source is a conv, linear or affine node nobody else reads.

    The function is unchanged up to rounding (computed in float64). An affine node after anything
    else (pre-activation and dense networks) stays: with zero padding its shift cannot move
    into a later convolution.
    """
    nodes = {node.name: node for node in graph.nodes}
    tensors = dict(graph.tensors)
    while (pair := _foldable(nodes)) is not None:
        source, affine = pair
        scale = tensors.pop(f"{affine.name}.scale").astype(np.float64)
        shift = tensors.pop(f"{affine.name}.shift").astype(np.float64)
        roles = ("scale", "shift") if source.op == "affine" else ("weight", "bias")
        weight, bias = (f"{source.name}.{role}" for role in roles)
        old = tensors[weight]
        tensors[weight] = _float32(scale.reshape(-1, *[1] * (old.ndim - 1)) * old)
        tensors[bias] = _float32(scale * tensors[bias] + shift)
        del nodes[affine.name]
        for name, node in nodes.items():
            if affine.name in node.inputs:
                inputs = tuple(source.name if i == affine.name else i for i in node.inputs)
                nodes[name] = dataclasses.replace(node, inputs=inputs)
    return Graph(tuple(nodes.values()), tensors, graph.metadata)


def _foldable(nodes: dict[str, Node]) -> tuple[Node, Node] | None:
    readers: dict[str, int] = {}
    for node in nodes.values():
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    for node in nodes.values():
        if node.op == "affine":
            source = nodes[node.inputs[0]]
            if source.op in ("conv", "linear", "affine") and readers[source.name] == 1:
                return source, node
    return None


def _float32(value: Array) -> Array:
    return np.ascontiguousarray(value, dtype=np.float32)
