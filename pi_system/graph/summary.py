"""What a graph is, as rows and records for people and programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .ir import Graph


@dataclass(frozen=True)
class ReLULayer:
    """One ReLU layer: shape per image, positions, and how many of them keep their ReLU."""

    name: str
    shape: tuple[int, ...]
    total: int
    kept: int


def relu_layers(graph: Graph) -> tuple[ReLULayer, ...]:
    """The ReLU layers in the order of execution."""
    return tuple(
        ReLULayer(node.name, node.shape, int(np.prod(node.shape)), graph.kept(node))
        for node in graph.relus
    )


def describe(graph: Graph) -> dict[str, Any]:
    """Name, hash, layers and both counts of ReLUs, JSON-able.

    ``relu_*`` counts every ReLU layer (SENet's convention), ``relu_*_without_stem`` leaves the
    first one out (SNL's).
    """
    layers = relu_layers(graph)
    return {
        "name": graph.metadata.get("name", ""),
        "dataset": graph.metadata.get("dataset", ""),
        "sha256": graph.sha256(),
        "input_shape": list(graph.input.shape),
        "classes": graph.output.shape[0],
        "parameters": sum(int(v.size) for v in graph.tensors.values() if v.dtype != np.bool_),
        "relu_total": graph.relu_total,
        "relu_kept": graph.relu_kept,
        "relu_total_without_stem": sum(layer.total for layer in layers[1:]),
        "relu_kept_without_stem": sum(layer.kept for layer in layers[1:]),
        "layers": [
            {
                "name": node.name,
                "op": node.op,
                "inputs": list(node.inputs),
                "shape": list(node.shape),
                "relu_total": int(np.prod(node.shape)) if node.op == "relu" else 0,
                "relu_kept": graph.kept(node) if node.op == "relu" else 0,
            }
            for node in graph
        ],
    }
