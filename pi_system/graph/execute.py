"""Plaintext execution of a graph by torch: the reference, and the baseline that bench times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .ir import Graph, Node

Floats = npt.NDArray[np.float32]
Step = Callable[[list[Tensor]], Tensor]


@overload
def run(graph: Graph, images: Floats, *, all_edges: Literal[False] = ...) -> Floats: ...
@overload
def run(graph: Graph, images: Floats, *, all_edges: Literal[True]) -> dict[str, Floats]: ...
def run(graph: Graph, images: Floats, *, all_edges: bool = False) -> Floats | dict[str, Floats]:
    """Logits (N, classes) of normalised images (N, C, H, W), in float32.

    Args:
        all_edges: return the output (N, *shape) of every node by name instead.

    Raises:
        UsageError: the images do not fit the graph.
    """
    check_images(graph, images)
    values: dict[str, Tensor] = {graph.input.name: torch.from_numpy(np.ascontiguousarray(images))}
    with torch.inference_mode():
        for node in graph.nodes[1:]:
            values[node.name] = step(graph, node, channels_last=False)(
                [values[name] for name in node.inputs]
            )
    if all_edges:
        return {name: value.numpy() for name, value in values.items()}
    return values[graph.output.name].numpy()


def compile_plaintext(
    graph: Graph, *, channels_last: bool = True, threads: int = 1
) -> Callable[[Floats], Floats]:
    """A function from images (N, C, H, W) to logits with all preparation done beforehand.

    Weights are laid out once, values are freed after their last reader, and each masked ReLU is
    one ``maximum`` with a floor that is 0 where a ReLU is kept and -inf elsewhere.

    Args:
        threads: torch's thread count, set for the whole process at every call.
    """
    memory = torch.channels_last if channels_last else torch.contiguous_format
    slots = {node.name: i for i, node in enumerate(graph.nodes)}
    last = {name: slots[node.name] for node in graph.nodes for name in node.inputs}
    plan: list[tuple[Step, list[int], list[int]]] = []
    for node in graph.nodes[1:]:
        dead = [slots[n] for n in set(node.inputs) if last[n] == slots[node.name]]
        action = step(graph, node, channels_last=channels_last)
        plan.append((action, [slots[n] for n in node.inputs], dead))

    def call(images: Floats) -> Floats:
        check_images(graph, images)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            values: list[Tensor | None] = [None] * len(slots)
            values[0] = torch.from_numpy(np.ascontiguousarray(images)).contiguous(
                memory_format=memory
            )
            for index, (action, sources, dead) in enumerate(plan, start=1):
                inputs: list[Tensor] = []
                for slot in sources:
                    value = values[slot]
                    assert value is not None
                    inputs.append(value)
                values[index] = action(inputs)
                for slot in dead:
                    values[slot] = None
            logits = values[-1]
            assert logits is not None
            return logits.numpy()

    return call


def check_images(graph: Graph, images: Floats) -> None:
    """Refuse images that are not float32 (N, *the graph's input shape).

    Raises:
        UsageError: with both shapes.
    """
    expected = graph.input.shape
    if images.dtype != np.float32 or images.shape[1:] != expected or not images.shape[0]:
        raise UsageError(
            f"images must be float32 (N, {', '.join(map(str, expected))}), "
            f"got {images.dtype} {images.shape}"
        )


def step(graph: Graph, node: Node, *, channels_last: bool = False) -> Step:
    """One node as a function from its inputs to its output, in the type of its tensors."""
    return _STEPS[node.op](graph, node, channels_last)


def _tensor(graph: Graph, node: Node, role: str) -> Tensor:
    return torch.from_numpy(graph.tensor(node, role))


def _conv(graph: Graph, node: Node, channels_last: bool) -> Step:
    weight, bias = _tensor(graph, node, "weight"), _tensor(graph, node, "bias")
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    stride, padding, dilation = node.pair("stride"), node.pair("padding"), node.pair("dilation")
    groups = node.attrs["groups"]
    assert isinstance(groups, int)
    return lambda x: F.conv2d(x[0], weight, bias, stride, padding, dilation, groups)


def _linear(graph: Graph, node: Node, channels_last: bool) -> Step:
    weight, bias = _tensor(graph, node, "weight"), _tensor(graph, node, "bias")
    return lambda x: F.linear(x[0], weight, bias)


def _affine(graph: Graph, node: Node, channels_last: bool) -> Step:
    per_channel = (-1, *[1] * (len(node.shape) - 1))
    scale = _tensor(graph, node, "scale").reshape(per_channel)
    shift = _tensor(graph, node, "shift").reshape(per_channel)
    return lambda x: torch.addcmul(shift, x[0], scale)


def _add(graph: Graph, node: Node, channels_last: bool) -> Step:
    def add(x: list[Tensor]) -> Tensor:
        total = x[0] + x[1]
        for value in x[2:]:
            total += value
        return total

    return add


def _avgpool(graph: Graph, node: Node, channels_last: bool) -> Step:
    kernel, stride, padding = (node.pair(key) for key in ("kernel", "stride", "padding"))
    return lambda x: F.avg_pool2d(x[0], kernel, stride, padding)


def _maxpool(graph: Graph, node: Node, channels_last: bool) -> Step:
    kernel, stride, padding = (node.pair(key) for key in ("kernel", "stride", "padding"))
    return lambda x: F.max_pool2d(x[0], kernel, stride, padding)


def _relu(graph: Graph, node: Node, channels_last: bool) -> Step:
    mask = _tensor(graph, node, "mask")
    if bool(mask.all()):
        return lambda x: torch.relu(x[0])
    if not bool(mask.any()):
        return lambda x: x[0]
    floor = torch.zeros(1, *mask.shape).masked_fill_(~mask, -torch.inf)
    if channels_last and floor.dim() == 4:
        floor = floor.contiguous(memory_format=torch.channels_last)
    return lambda x: torch.maximum(x[0], floor)


_STEPS: Mapping[str, Callable[[Graph, Node, bool], Step]] = {
    "conv": _conv,
    "linear": _linear,
    "affine": _affine,
    "add": _add,
    "concat": lambda graph, node, channels_last: lambda x: torch.cat(x, dim=1),
    "avgpool": _avgpool,
    "maxpool": _maxpool,
    "flatten": lambda graph, node, channels_last: lambda x: x[0].flatten(1),
    "relu": _relu,
}
