"""The one intermediate form between a PyTorch network and any backend.

A :class:`Graph` is a list of nodes in order of execution and a table of NumPy tensors. It
imports no torch, so that a client or dealer can read an architecture without it.

Node kinds, their attributes and tensors (shapes are per image, without the batch axis; kernel,
stride, padding and dilation are (int, int), groups is an int):

=========  =========================================  ======================================
op         attributes                                 tensors
=========  =========================================  ======================================
input
conv       kernel, stride, padding, dilation, groups  weight (O, I/groups, kh, kw), bias (O,)
linear                                                weight (O, I), bias (O,)
affine     y = scale * x + shift                      scale (C,), shift (C,)
add        two or more inputs of one shape
concat     inputs joined along axis 0 (channels)
avgpool    kernel, stride, padding; zeros count       (adaptive and global pooling become this)
maxpool    kernel, stride, padding
flatten
relu                                                  mask, bool, the node's shape
=========  =========================================  ======================================

Tensor ``weight`` of node ``conv1`` is stored as ``conv1.weight``; all are float32 but masks.
The channels of ``affine`` are the first axis of its shape, (C, H, W) or (C,).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Attribute = int | tuple[int, ...]

TENSORS: Final[Mapping[str, tuple[str, ...]]] = {
    "input": (),
    "conv": ("weight", "bias"),
    "linear": ("weight", "bias"),
    "affine": ("scale", "shift"),
    "add": (),
    "concat": (),
    "avgpool": (),
    "maxpool": (),
    "flatten": (),
    "relu": ("mask",),
}


@dataclass(frozen=True)
class Node:
    """One layer: its name, kind, inputs by name and output shape per image."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    attrs: Mapping[str, Attribute] = field(default_factory=dict)

    def pair(self, key: str) -> tuple[int, int]:
        """A two-sided attribute such as ``stride``: (height, width)."""
        value = self.attrs[key]
        assert isinstance(value, tuple) and len(value) == 2
        return value[0], value[1]


@dataclass(frozen=True)
class Graph:
    """Nodes in order of execution; the first is the input, the last the output (logits).

    ``metadata`` is JSON: name, dataset, classes, mean, std and what the exporter knows.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Array]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for node in self.nodes:
            if node.op not in TENSORS:
                raise ValueError(f"node {node.name}: unknown kind {node.op!r}")
            if node.name in seen or not set(node.inputs) <= seen:
                raise ValueError(f"node {node.name}: repeated, or its inputs do not come first")
            seen.add(node.name)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each node; a node that reads a value twice is listed once."""
        return {
            node.name: tuple(reader for reader in self.nodes if node.name in reader.inputs)
            for node in self.nodes
        }

    @property
    def input(self) -> Node:
        return self.nodes[0]

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def tensor(self, node: Node, role: str) -> Array:
        return self.tensors[f"{node.name}.{role}"]

    @property
    def relus(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.op == "relu")

    def kept(self, node: Node) -> int:
        """ReLUs kept at a relu node, per image."""
        return int(self.tensor(node, "mask").sum())

    @property
    def relu_kept(self) -> int:
        return sum(self.kept(node) for node in self.relus)

    @property
    def relu_total(self) -> int:
        return sum(int(np.prod(node.shape)) for node in self.relus)

    def public(self) -> Graph:
        """What everyone may know: the architecture and the mask positions, no weights."""
        masks = {f"{n.name}.mask": self.tensor(n, "mask") for n in self.relus}
        return dataclasses.replace(self, tensors=masks)

    def header(self) -> dict[str, Any]:
        """Nodes and metadata as JSON-able data."""
        return {
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "inputs": list(node.inputs),
                    "shape": list(node.shape),
                    "attrs": {
                        key: list(value) if isinstance(value, tuple) else value
                        for key, value in node.attrs.items()
                    },
                }
                for node in self.nodes
            ],
            "metadata": dict(self.metadata),
        }

    def sha256(self) -> str:
        """Hash of everything: nodes, metadata and tensors."""
        digest = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            value = np.ascontiguousarray(self.tensors[name])
            digest.update(f"\n{name} {value.dtype.str} {value.shape}\n".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()
