"""One-time tuples: what an inference asks for, and how seeds and a correction make them.

A *tape* is the list of tuples one inference consumes, in order. It depends on shapes only and
is public. Each party expands its shares of a tuple from the 32-byte seed it has in common with
the dealer; the dealer expands both and sends party 0 the one share that makes the tuple right
(Boyle et al., "Efficient Pseudorandom Correlation Generators", 2019, sect. 1: the trivial one).

=========  =======================================  =============================
kind       shares of party 0 and 1                  relation
=========  =======================================  =============================
mul        a, b, c over Z/2^64                      c = a * b, broadcast
matmul     a, b, c over Z/2^64                      c = a @ b
conv2d     a, b, c over Z/2^64                      c = conv2d(a, b, options)
and        a, b, c as xor shares of 64 bits         c = a & b
bit        r as xor shares of 1 bit, s over Z/2^64  s = r
=========  =======================================  =============================

CrypTen knows two more, squares and wrap counts; no layer of a graph asks for the former and
only three or more parties for the latter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ...errors import ProtocolError
from ...graph.ir import Graph, Node
from ...graph.validate import infer_shape, tensor_shape
from .prg import Stream

Shape = tuple[int, ...]
Option = int | tuple[int, int]

KINDS: Final = ("mul", "matmul", "conv2d", "and", "bit")
_CONV_OPTIONS: Final = {"stride", "padding", "dilation", "groups"}
MAX_ELEMENTS: Final = 1 << 27
"""A tensor of more elements would not fit one frame."""


@dataclass(frozen=True)
class Request:
    """One tuple: its kind, the shapes of its factors and a convolution's options."""

    kind: str
    sizes: tuple[Shape, ...]
    options: tuple[tuple[str, Option], ...] = ()

    @classmethod
    def of(cls, kind: str, *sizes: Iterable[int], **options: Any) -> Request:
        pairs = ((k, tuple(v) if isinstance(v, list | tuple) else v) for k, v in options.items())
        return cls(kind, tuple(tuple(size) for size in sizes), tuple(sorted(pairs)))

    @property
    def product_size(self) -> Shape:
        """Shape of the last share.

        Raises:
            ValueError: the factors do not fit each other.
        """
        if self.kind in ("and", "bit"):
            return self.sizes[0]
        a, b = self.sizes
        if self.kind == "mul":
            return np.broadcast_shapes(a, b)
        if self.kind == "matmul":
            if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
                raise ValueError(f"no matrix product of {a} and {b}")
            return a[0], b[1]
        options: dict[str, Any] = dict(self.options)
        groups = options["groups"]
        if len(a) != 4 or len(b) != 4 or a[1] != b[1] * groups or b[0] % groups:
            raise ValueError(f"no convolution of {a} with {b}")
        shape = infer_shape("conv", {**options, "kernel": b[2:]}, (a[1:],), b[0])
        return a[0], *shape

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """The bilinear map of an arithmetic tuple, wrapping modulo 2^64."""
        if self.kind == "mul":
            return a * b
        if self.kind == "matmul":
            return a @ b
        options: dict[str, Any] = dict(self.options)
        return torch.conv2d(a, b, **options)

    def shares(self, stream: Stream, rank: int) -> list[Tensor]:
        """What party ``rank`` expands by itself: the last share is missing for party 0."""
        bits = 1 if self.kind == "bit" else 64
        shares = [stream.ring(size, bits=bits) for size in self.sizes]
        if rank == 1:
            shares.append(stream.ring(self.product_size))
        return shares

    def correction(self, first: Stream, second: Stream) -> Tensor:
        """The last share of party 0, computed by the dealer from both streams."""
        mine, theirs = self.shares(first, 0), self.shares(second, 1)
        if self.kind == "bit":
            return mine[0].bitwise_xor_(theirs[0]).sub_(theirs[1])
        if self.kind == "and":
            a, b = mine[0].bitwise_xor_(theirs[0]), mine[1].bitwise_xor_(theirs[1])
            return a.bitwise_and_(b).bitwise_xor_(theirs[2])
        a, b = mine[0].add_(theirs[0]), mine[1].add_(theirs[1])
        return self.multiply(a, b).sub_(theirs[2])

    def to_json(self) -> list[Any]:
        return [self.kind, [list(size) for size in self.sizes], dict(self.options)]

    @classmethod
    def from_json(cls, data: Any) -> Request:
        """Read and check a request that a peer sent.

        Raises:
            ProtocolError: it is malformed, or asks for tensors that do not fit.
        """
        try:
            kind, sizes, options = data
            request = cls.of(kind, *sizes, **options)
            request._check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ProtocolError(f"a malformed request for one-time material: {error}") from error
        return request

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}")
        if len(self.sizes) != (1 if self.kind == "bit" else 2):
            raise ValueError("wrong number of factors")
        if self.kind == "and" and self.sizes[0] != self.sizes[1]:
            raise ValueError("factors of different shapes")
        options = dict(self.options)
        if set(options) != (_CONV_OPTIONS if self.kind == "conv2d" else set()):
            raise ValueError(f"options {sorted(options)}")
        for name, value in options.items():
            numbers = (value,) if name == "groups" else value
            least = 0 if name == "padding" else 1
            if not isinstance(numbers, tuple) or len(numbers) != (1 if name == "groups" else 2):
                raise ValueError(f"option {name} is {value}")
            if not all(type(n) is int and least <= n <= MAX_ELEMENTS for n in numbers):
                raise ValueError(f"option {name} is {value}")
        if not all(type(n) is int and 1 <= n <= MAX_ELEMENTS for s in self.sizes for n in s):
            raise ValueError(f"shapes {self.sizes}")
        for size in self.sizes:
            if math.prod(size) > MAX_ELEMENTS:
                raise ValueError(f"a tensor of shape {size} is too large")
        if math.prod(self.product_size) > MAX_ELEMENTS:
            raise ValueError(f"a tensor of shape {self.product_size} is too large")


Tape = tuple[Request, ...]


def of_graph(graph: Graph, batch: int) -> Tape:
    """The tape of one inference on ``batch`` images, from the public graph.

    It follows what CrypTen asks for in :mod:`.layers`, whose every request is checked against it.
    """
    requests: list[Request] = []
    for node in graph.nodes[1:]:
        inputs = tuple(graph.node(name).shape for name in node.inputs)
        source, shape = (batch, *inputs[0]), (batch, *node.shape)
        match node.op:
            case "conv":
                weight = tensor_shape(node, "weight", inputs)
                options = {k: v for k, v in node.attrs.items() if k in _CONV_OPTIONS}
                requests.append(Request.of("conv2d", source, weight, **options))
            case "linear":
                requests.append(Request.of("matmul", source, (inputs[0][0], node.shape[0])))
            case "affine":
                channels = (node.shape[0], *(1 for _ in node.shape[1:]))
                requests.append(Request.of("mul", shape, channels))
            case "relu":
                kept = graph.kept(node)
                if kept:
                    full = kept == math.prod(node.shape)
                    requests += _relu(shape if full else (batch, kept))
            case "maxpool":
                for stacked in maximum_shapes(node, source):
                    requests += _relu(stacked)
    return tuple(requests)


def maximum_shapes(node: Node, source: Shape) -> Iterator[Shape]:
    """What max pooling of ``source`` (N, C, H, W) compares at once, level by level.

    Columns first, then rows: the pooled axis comes second, the images last (see
    :class:`.layers.MaxPool`).
    """
    batch, channels, *plane = source
    for axis in (1, 0):
        kernel, stride, padding = (node.pair(k)[axis] for k in ("kernel", "stride", "padding"))
        other = plane[1 - axis] + (2 * node.pair("padding")[0] if axis == 1 else 0)
        plane[axis] = (plane[axis] + 2 * padding - kernel) // stride + 1
        while kernel > 1:
            tail = (channels, other, batch) if axis == 1 else (channels, batch, other)
            yield (kernel // 2, plane[axis], *tail)
            kernel -= kernel // 2


def _relu(shape: Shape) -> list[Request]:
    """Sum of two shares in xor form (a carry tree of 6 levels), its sign, and a product."""
    levels = [Request.of("and", (2, 1, *shape), (2, 1, *shape))] * 6
    return [
        Request.of("and", (1, *shape), (1, *shape)),
        *levels,
        Request.of("bit", shape),
        Request.of("mul", shape, shape),
    ]


def to_json(tape: Tape) -> list[Any]:
    return [request.to_json() for request in tape]


def from_json(data: Any) -> Tape:
    """Read a tape that a peer sent.

    Raises:
        ProtocolError: it is malformed.
    """
    if not isinstance(data, list):
        raise ProtocolError("a malformed list of one-time material")
    return tuple(Request.from_json(item) for item in data)


def sha256(tape: Tape) -> str:
    return hashlib.sha256(json.dumps(to_json(tape), sort_keys=True).encode()).hexdigest()


def field(message: Any, name: str, kind: type) -> Any:
    """Entry ``name`` of a control message.

    Raises:
        ProtocolError: it is missing or not of type ``kind``.
    """
    value = message.get(name) if isinstance(message, Mapping) else None
    if type(value) is not kind:
        raise ProtocolError(f"a control message without a valid {name!r}")
    return value
