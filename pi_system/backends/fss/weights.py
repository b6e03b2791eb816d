"""The server's weights as one convolution kernel per linear operation of a program."""

from __future__ import annotations

import numpy as np

from ...graph.ir import Graph
from .program import Conv
from .ring import Floats, Words, encode


def reals(graph: Graph, op: Conv) -> tuple[Floats, Floats]:
    """Weight (O, I/groups, kh, kw), divided by the sum pools' area, and bias (O,)."""
    node = graph.node(op.node)
    out = op.weight_shape[0]
    match node.op:
        case "conv" | "linear":
            weight, bias = graph.tensor(node, "weight"), graph.tensor(node, "bias")
        case "affine":
            weight, bias = graph.tensor(node, "scale"), graph.tensor(node, "shift")
        case "avgpool":
            kh, kw = node.pair("kernel")
            weight, bias = np.full(op.weight_shape, 1 / (kh * kw)), np.zeros(out)
        case _:
            raise AssertionError(node.op)
    full = weight.astype(np.float64).reshape(op.weight_shape) / op.area
    return full, bias.astype(np.float64)


def fixed(graph: Graph, op: Conv, f_x: int, f_w: int) -> tuple[Words, Words]:
    """The same with ``f_w`` fractional bits, the bias with ``f_x + f_w``.

    The bias carries the 2^f_w - 1 that turns the sum of two truncations, each rounded down,
    into one that is right on average.
    """
    weight, bias = reals(graph, op)
    return encode(weight, f_w), encode(bias, f_x + f_w) + np.uint64((1 << f_w) - 1)
