"""The graph in fixed point, as a backend computes it, and its distance from plaintext.

A value v is the integer round(v * 2^f), modulo 2^64; a product has 2f fractional bits and is
brought back by an arithmetic shift. A two-party truncation differs from that shift by at most one
unit in the last place, so this is the error of the number format alone, without a protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ParityError, UsageError
from . import execute
from .ir import Graph, Node

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

FRACTIONAL_BITS: Final = 16
TOLERANCE: Final = 0.005
_EXACT: Final = float(2**53)


@dataclass(frozen=True)
class NodeParity:
    """One node: largest plaintext value and largest difference from it, over all images."""

    name: str
    op: str
    max_abs_value: float
    max_abs_error: float


@dataclass(frozen=True)
class Parity:
    """Plaintext (float32) against fixed point; ``argmax_agreement`` is a fraction of 1."""

    fractional_bits: int
    images: int
    nodes: tuple[NodeParity, ...]
    argmax_agreement: float
    max_abs_error: float

    def require(self, tolerance: float = TOLERANCE) -> None:
        """Fail if a logit is further off than ``tolerance`` times the largest logit.

        Raises:
            ParityError: naming the node where the error jumps.
        """
        limit = tolerance * max(1.0, self.nodes[-1].max_abs_value)
        if self.max_abs_error > limit:
            worst = next(n for n in self.nodes if n.max_abs_error > limit)
            raise ParityError(
                f"{self.fractional_bits} fractional bits put the logits up to "
                f"{self.max_abs_error:.3g} off, allowed is {limit:.3g}; the error first exceeds "
                f"that at {worst.name}"
            )


def parity(graph: Graph, images: Floats, *, fractional_bits: int = FRACTIONAL_BITS) -> Parity:
    """Compare every node of the graph in fixed point with float32, on images (N, C, H, W).

    Raises:
        UsageError: the images do not fit, or ``fractional_bits`` is outside 1 to 24.
    """
    plain = execute.run(graph, images, all_edges=True)
    fixed = run(graph, images, fractional_bits=fractional_bits)
    unit = 2.0**-fractional_bits
    nodes = tuple(
        NodeParity(
            node.name,
            node.op,
            float(np.abs(plain[node.name]).max()),
            float(np.abs(fixed[node.name] * unit - plain[node.name]).max()),
        )
        for node in graph
    )
    name = graph.output.name
    agree = fixed[name].argmax(axis=1) == plain[name].argmax(axis=1)
    return Parity(fractional_bits, len(images), nodes, float(agree.mean()), nodes[-1].max_abs_error)


def run(
    graph: Graph, images: Floats, *, fractional_bits: int = FRACTIONAL_BITS
) -> dict[str, Integers]:
    """The integers (N, *shape) of every node by name, with ``fractional_bits`` each.

    Raises:
        UsageError: as :func:`parity`.
    """
    if not 1 <= fractional_bits <= 24:
        raise UsageError(f"fractional bits must be 1 to 24, got {fractional_bits}")
    execute.check_images(graph, images)
    values = {graph.input.name: torch.from_numpy(encode(images, fractional_bits))}
    with torch.inference_mode():
        for node in graph.nodes[1:]:
            inputs = [values[name] for name in node.inputs]
            values[node.name] = _STEPS[node.op](graph, node, inputs, fractional_bits)
    return {name: value.numpy() for name, value in values.items()}


def encode(values: npt.NDArray[Any], fractional_bits: int) -> Integers:
    """round(v * 2^fractional_bits), halves to even."""
    scaled = np.rint(values.astype(np.float64) * 2.0**fractional_bits)
    return scaled.astype(np.int64)


def _encoded(graph: Graph, node: Node, role: str, bits: int) -> Tensor:
    return torch.from_numpy(encode(graph.tensor(node, role), bits))


def exact_product(x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """An int64 convolution or matrix product, modulo 2^64, by exact float64 ones.

    Torch has no fast integer convolution. Integers below 2^53 are exact in float64, so the
    operands are cut into limbs so small that no partial sum can reach that.

    Args:
        product: bilinear in float64, summing at most ``weight[0].numel()`` terms.
    """
    terms = max(weight[0].numel(), 1)
    bits = (53 - (terms - 1).bit_length()) // 2
    if _bound(x) * _bound(weight) * terms < _EXACT:
        return product(x.double(), weight.double()).long()
    total: Tensor | None = None
    for i, a in enumerate(_limbs(x, bits)):
        for j, b in enumerate(_limbs(weight, bits)):
            if (i + j) * bits >= 64:
                continue
            part = product(a, b).long() << ((i + j) * bits)
            total = part if total is None else total + part
    assert total is not None
    return total


def _bound(value: Tensor) -> float:
    return float(value.double().abs().max())


def _limbs(value: Tensor, bits: int) -> list[Tensor]:
    """Signed base 2^bits digits of an int64 tensor, least significant first."""
    limbs: list[Tensor] = []
    while True:
        high = value >> bits
        if bool((value.abs() < 1 << bits).all()) or len(limbs) * bits >= 64:
            return [*limbs, value.double()]
        limbs.append((value - (high << bits)).double())
        value = high


def _conv(graph: Graph, node: Node, inputs: list[Tensor], bits: int) -> Tensor:
    weight = _encoded(graph, node, "weight", bits)
    bias = _encoded(graph, node, "bias", bits)
    stride, padding, dilation = node.pair("stride"), node.pair("padding"), node.pair("dilation")
    groups = node.attrs["groups"]
    assert isinstance(groups, int)
    total = exact_product(
        inputs[0], weight, lambda x, w: F.conv2d(x, w, None, stride, padding, dilation, groups)
    )
    return (total >> bits) + bias[:, None, None]


def _linear(graph: Graph, node: Node, inputs: list[Tensor], bits: int) -> Tensor:
    weight = _encoded(graph, node, "weight", bits)
    total = exact_product(inputs[0], weight, lambda x, w: F.linear(x, w))
    return (total >> bits) + _encoded(graph, node, "bias", bits)


def _affine(graph: Graph, node: Node, inputs: list[Tensor], bits: int) -> Tensor:
    per_channel = (-1, *[1] * (len(node.shape) - 1))
    scale = _encoded(graph, node, "scale", bits).reshape(per_channel)
    shift = _encoded(graph, node, "shift", bits).reshape(per_channel)
    return ((inputs[0] * scale) >> bits) + shift


def _add(graph: Graph, node: Node, inputs: list[Tensor], bits: int) -> Tensor:
    total = inputs[0]
    for value in inputs[1:]:
        total = total + value
    return total


def _avgpool(graph: Graph, node: Node, inputs: list[Tensor], bits: int) -> Tensor:
    kernel, stride, padding = (node.pair(key) for key in ("kernel", "stride", "padding"))
    count = kernel[0] * kernel[1]
    channels = node.shape[0]
    ones = torch.ones(channels, 1, *kernel, dtype=torch.int64)
    total = exact_product(
        inputs[0],
        ones,
        lambda x, w: F.conv2d(x, w, None, stride, padding, groups=channels),
    )
    return torch.div(total, count, rounding_mode="floor")


def _maxpool(graph: Graph, node: Node, inputs: list[Tensor], bits: int) -> Tensor:
    kernel, stride, padding = (node.pair(key) for key in ("kernel", "stride", "padding"))
    pad = (padding[1], padding[1], padding[0], padding[0])
    x = F.pad(inputs[0], pad, value=torch.iinfo(torch.int64).min)
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    return windows.amax(dim=(4, 5))


def _relu(graph: Graph, node: Node, inputs: list[Tensor], bits: int) -> Tensor:
    mask = torch.from_numpy(graph.tensor(node, "mask"))
    return inputs[0].masked_fill((inputs[0] < 0) & mask, 0)


_STEPS: Final[Mapping[str, Callable[[Graph, Node, list[Tensor], int], Tensor]]] = {
    "conv": _conv,
    "linear": _linear,
    "affine": _affine,
    "add": _add,
    "concat": lambda graph, node, inputs, bits: torch.cat(inputs, dim=1),
    "avgpool": _avgpool,
    "maxpool": _maxpool,
    "flatten": lambda graph, node, inputs, bits: inputs[0].flatten(1),
    "relu": _relu,
}
