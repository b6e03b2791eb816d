"""From the intermediate form to a ``crypten.nn.Graph``, built directly and not through ONNX."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...errors import UnsupportedLayer
from ...graph.ir import TENSORS, Graph, Node
from ...graph.validate import tensor_shape
from . import layers


def build(
    graph: Graph,
    *,
    label: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> layers.LabelledGraph:
    """The CrypTen modules of ``graph``, not yet encrypted.

    A public graph has no weights and gets zeros of the right shapes in their place, which is all
    that a party needs who is not the source of the encryption.

    Args:
        label: a context around every layer, given its name.

    Raises:
        UnsupportedLayer: a layer this backend cannot run.
    """
    result = layers.LabelledGraph(graph.input.name, graph.output.name, label)
    for node in graph.nodes[1:]:
        result.add_module(node.name, _layer(graph, node), list(node.inputs))
    result.eval()
    return result


def _parameters(graph: Graph, node: Node) -> dict[str, Tensor]:
    if node.op == "relu":
        return {}
    inputs = tuple(graph.node(name).shape for name in node.inputs)
    return {
        role: torch.tensor(graph.tensor(node, role))
        if f"{node.name}.{role}" in graph.tensors
        else torch.zeros(tensor_shape(node, role, inputs))
        for role in TENSORS[node.op]
    }


def _layer(graph: Graph, node: Node) -> layers.Layer:
    weights = _parameters(graph, node)
    match node.op:
        case "conv":
            groups = node.attrs["groups"]
            assert isinstance(groups, int)
            return layers.Conv(
                weights["weight"],
                weights["bias"].reshape(-1, 1, 1),
                stride=node.pair("stride"),
                padding=node.pair("padding"),
                dilation=node.pair("dilation"),
                groups=groups,
            )
        case "linear":
            return layers.Linear(weight=weights["weight"].t().contiguous(), bias=weights["bias"])
        case "affine":
            channels = (-1, *(1 for _ in node.shape[1:]))
            return layers.Affine(**{k: v.reshape(channels) for k, v in weights.items()})
        case "relu":
            return layers.MaskedRelu(torch.tensor(graph.tensor(node, "mask")))
        case "avgpool" | "maxpool":
            kind = layers.AvgPool if node.op == "avgpool" else layers.MaxPool
            return kind(
                kernel=node.pair("kernel"),
                stride=node.pair("stride"),
                padding=node.pair("padding"),
            )
        case "add":
            return layers.Add()
        case "concat":
            return layers.Concat()
        case "flatten":
            return layers.Flatten()
    raise UnsupportedLayer(f"layer {node.name}: the crypten backend has no {node.op!r}")
