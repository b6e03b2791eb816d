"""A public graph as a flat program that all three roles follow.

Everything linear becomes one operation, :class:`Conv`; all else is local to either party's share
(:class:`Add`, :class:`Sub`, :class:`Concat`, :class:`SumPool`, :class:`Gather`,
:class:`Reshape`) or a batch of ReLU gates (:class:`Relu`). Max pooling is a tree of
max(a, b) = a + relu(b - a). Average pooling that feeds only convolutions and linear layers is a
sum whose scale goes into their weights; elsewhere it is a depthwise convolution of its own.

The program depends on the architecture and the masks alone. Tensors have one writer each; names
of inner ones contain ``#``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ...errors import UnsupportedLayer
from ...graph.ir import Graph, Node

T = TypeVar("T", np.uint64, np.float64)
Index = npt.NDArray[np.int64]
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Op:
    """Writes tensor ``out`` of ``shape`` (per image) from ``inputs``."""

    out: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def source(self) -> str:
        return self.inputs[0]

    @property
    def size(self) -> int:
        """Positions per image."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Input(Op):
    pass


@dataclass(frozen=True, eq=False)
class Conv(Op):
    """Any linear node, as a grouped convolution of ``weight_shape`` (O, I/groups, kh, kw).

    ``node`` names where the weights come from; they are divided by ``area``, the product of the
    sizes of the sum pools before.
    """

    node: str
    weight_shape: tuple[int, int, int, int]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    area: int = 1


@dataclass(frozen=True, eq=False)
class Add(Op):
    pass


@dataclass(frozen=True, eq=False)
class Sub(Op):
    pass


@dataclass(frozen=True, eq=False)
class Concat(Op):
    pass


@dataclass(frozen=True, eq=False)
class Reshape(Op):
    pass


@dataclass(frozen=True, eq=False)
class SumPool(Op):
    kernel: Pair
    stride: Pair
    padding: Pair


@dataclass(frozen=True, eq=False)
class Gather(Op):
    """out[p] = source[index[p]] over flat positions."""

    index: Index


@dataclass(frozen=True, eq=False)
class Relu(Op):
    """ReLU at the flat positions ``kept`` (sorted), the identity elsewhere."""

    kept: Index

    @property
    def full(self) -> bool:
        return len(self.kept) == self.size


@dataclass(frozen=True)
class Step:
    """Local operations, then one batch of gates: one round trip. The last step has no gates."""

    ops: tuple[Op, ...]
    gates: tuple[Relu, ...]


@dataclass(frozen=True)
class Program:
    steps: tuple[Step, ...]
    output: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def ops(self) -> Iterator[Op]:
        """All operations in order of execution."""
        for step in self.steps:
            yield from step.ops
            yield from step.gates

    @property
    def convs(self) -> tuple[Conv, ...]:
        return tuple(op for op in self.ops if isinstance(op, Conv))

    @property
    def relus(self) -> tuple[Relu, ...]:
        return tuple(op for op in self.ops if isinstance(op, Relu))

    @property
    def input(self) -> Input:
        return next(op for op in self.ops if isinstance(op, Input))

    @property
    def round_trips(self) -> int:
        """Of one inference: the image and the logits make one, every batch of gates another."""
        return sum(1 for step in self.steps if step.gates) + 1

    def overwriting(self) -> set[str]:
        """The ReLUs that may write their output over their input: nobody reads it later.

        A reshaped tensor shares memory with its input.
        """
        memory: dict[str, str] = {}
        last: dict[str, str] = {}
        for op in self.ops:
            memory[op.out] = memory[op.inputs[0]] if isinstance(op, Reshape) else op.out
            for name in op.inputs:
                last[memory[name]] = op.out
        return {op.out for op in self.relus if last[memory[op.source]] == op.out}

    def last_reader(self) -> dict[str, str]:
        """For every tensor, the ``out`` of the operation after which it is not needed."""
        last = {}
        for op in self.ops:
            for name in op.inputs:
                last[name] = op.out
        return last


def build(graph: Graph) -> Program:
    """The program of a graph; only its architecture and masks are read.

    Raises:
        UnsupportedLayer: a layer this backend has no form for.
    """
    ops = _Lowering(graph).run()
    return Program(_schedule(ops), ops[-1].out, {op.out: op.shape for op in ops})


def _schedule(ops: Sequence[Op]) -> tuple[Step, ...]:
    """Batch all gates of equal depth, each operation as early as its inputs allow."""
    depth: dict[str, int] = {}
    local: dict[int, list[Op]] = {}
    gates: dict[int, list[Relu]] = {}
    for op in ops:
        level = max((depth[name] for name in op.inputs), default=0)
        if isinstance(op, Relu):
            gates.setdefault(level, []).append(op)
            depth[op.out] = level + 1
        else:
            local.setdefault(level, []).append(op)
            depth[op.out] = level
    count = max([*local, *(level + 1 for level in gates)]) + 1
    return tuple(
        Step(tuple(local.get(level, ())), tuple(gates.get(level, ()))) for level in range(count)
    )


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops: list[Op] = []
        self.area: dict[str, int] = {}
        self.shapes = {node.name: node.shape for node in graph}
        self.readers: dict[str, list[Node]] = {node.name: [] for node in graph}
        for node in graph:
            for name in node.inputs:
                self.readers[name].append(node)
        self.feeds_linear: dict[str, bool] = {}
        for node in reversed(graph.nodes):
            readers = self.readers[node.name]
            self.feeds_linear[node.name] = bool(readers) and all(
                reader.op in ("conv", "linear")
                or (reader.op in ("flatten", "avgpool") and self.feeds_linear[reader.name])
                for reader in readers
            )

    def run(self) -> list[Op]:
        for node in self.graph:
            self.area[node.name] = self.area[node.inputs[0]] if node.inputs else 1
            getattr(self, f"_{node.op}")(node)
        needed = {self.ops[-1].out}
        kept: list[Op] = []
        for op in reversed(self.ops):
            if op.out in needed:
                kept.append(op)
                needed.update(op.inputs)
        return kept[::-1]

    def _input(self, node: Node) -> None:
        self.ops.append(Input(node.name, (), node.shape))

    def _conv(self, node: Node) -> None:
        groups = node.attrs["groups"]
        assert isinstance(groups, int)
        source = node.inputs[0]
        self._linear_op(
            Conv(
                node.name,
                node.inputs,
                node.shape,
                node=node.name,
                weight_shape=(
                    node.shape[0], self._shape(source)[0] // groups, *node.pair("kernel")
                ),
                stride=node.pair("stride"),
                padding=node.pair("padding"),
                dilation=node.pair("dilation"),
                groups=groups,
                area=self.area[source],
            )
        )  # fmt: skip

    def _linear(self, node: Node) -> None:
        source = node.inputs[0]
        (width,) = self._shape(source)
        (out,) = node.shape
        self.ops.append(Reshape(f"{node.name}#in", (source,), (width, 1, 1)))
        self._linear_op(
            Conv(
                f"{node.name}#out",
                (f"{node.name}#in",),
                (out, 1, 1),
                node.name,
                (out, width, 1, 1),
                area=self.area[source],
            )
        )
        self.ops.append(Reshape(node.name, (f"{node.name}#out",), (out,)))
        self.area[node.name] = 1

    def _affine(self, node: Node) -> None:
        channels = node.shape[0]
        shape = node.shape
        image = shape if len(shape) == 3 else (channels, 1, 1)
        source = node.inputs[0]
        if image != shape:
            self.ops.append(Reshape(f"{node.name}#in", (source,), image))
            source = f"{node.name}#in"
        out = node.name if image == shape else f"{node.name}#out"
        self._linear_op(
            Conv(out, (source,), image, node.name, (channels, 1, 1, 1), groups=channels)
        )
        if image != shape:
            self.ops.append(Reshape(node.name, (out,), shape))

    def _linear_op(self, op: Conv) -> None:
        self.ops.append(op)
        self.area[op.out] = 1

    def _add(self, node: Node) -> None:
        self.ops.append(Add(node.name, node.inputs, node.shape))

    def _concat(self, node: Node) -> None:
        self.ops.append(Concat(node.name, node.inputs, node.shape))

    def _flatten(self, node: Node) -> None:
        self.ops.append(Reshape(node.name, node.inputs, node.shape))

    def _avgpool(self, node: Node) -> None:
        kernel, stride, padding = (node.pair(key) for key in ("kernel", "stride", "padding"))
        area = kernel[0] * kernel[1]
        if self.feeds_linear[node.name]:
            self.ops.append(SumPool(node.name, node.inputs, node.shape, kernel, stride, padding))
            self.area[node.name] *= area
        else:
            channels = node.shape[0]
            weight = (channels, 1, kernel[0], kernel[1])
            self._linear_op(
                Conv(
                    node.name,
                    node.inputs,
                    node.shape,
                    node=node.name,
                    weight_shape=weight,
                    stride=stride,
                    padding=padding,
                    groups=channels,
                    area=self.area[node.inputs[0]],
                )
            )

    def _maxpool(self, node: Node) -> None:
        source = node.inputs[0]
        slots: list[tuple[str, Index | None]] = []
        for offset, index in enumerate(_windows(self._shape(source), node.shape, node)):
            name = f"{node.name}#{offset}"
            self.ops.append(Gather(name, (source,), node.shape, index))
            slots.append((name, index))
        level = 0
        while len(slots) > 1:
            merged: list[tuple[str, Index | None]] = []
            for pair, (a, b) in enumerate(zip(slots[::2], slots[1::2], strict=False)):
                merged.append((self._max(node, f"{node.name}#max{level}.{pair}", a, b), None))
            slots = merged + slots[2 * len(merged) :]
            level += 1
        self.ops.append(Reshape(node.name, (slots[0][0],), node.shape))

    def _max(
        self, node: Node, out: str, a: tuple[str, Index | None], b: tuple[str, Index | None]
    ) -> str:
        """a + relu(b - a); no gate where both are one and the same position."""
        (a_name, a_index), (b_name, b_index) = a, b
        kept = np.arange(int(np.prod(node.shape)), dtype=np.int64)
        if a_index is not None and b_index is not None:
            kept = kept[a_index != b_index]
        self.ops.append(Sub(f"{out}-", (b_name, a_name), node.shape))
        if kept.size:
            self.ops.append(Relu(f"{out}+", (f"{out}-",), node.shape, kept))
        else:
            self.ops.append(Reshape(f"{out}+", (f"{out}-",), node.shape))
        self.ops.append(Add(out, (a_name, f"{out}+"), node.shape))
        return out

    def _relu(self, node: Node) -> None:
        mask = self.graph.tensor(node, "mask")
        kept = np.flatnonzero(mask).astype(np.int64)
        if kept.size:
            self.ops.append(Relu(node.name, node.inputs, node.shape, kept))
        else:
            self.ops.append(Reshape(node.name, node.inputs, node.shape))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


def _windows(source: tuple[int, ...], out: tuple[int, ...], node: Node) -> list[Index]:
    """Per offset of a pooling window, the flat source position of every output position.

    An offset in the padding repeats the window's first real position.
    """
    channels, height, width = source
    _, out_h, out_w = out
    (kh, kw), (sh, sw), (ph, pw) = (node.pair(key) for key in ("kernel", "stride", "padding"))
    flat = np.full((channels, height + 2 * ph + sh + kh, width + 2 * pw + sw + kw), -1, np.int64)
    positions = np.arange(channels * height * width).reshape(source)
    flat[:, ph : ph + height, pw : pw + width] = positions
    stack = np.stack(
        [
            flat[:, i : i + sh * out_h : sh, j : j + sw * out_w : sw].reshape(-1)
            for i in range(kh)
            for j in range(kw)
        ]
    )
    if (stack.max(axis=0) < 0).any():
        raise UnsupportedLayer(f"{node.name}: a pooling window lies wholly in the padding")
    first = stack[(stack >= 0).argmax(axis=0), np.arange(stack.shape[1])]
    return list(np.where(stack < 0, first, stack))


def apply_local(op: Op, inputs: Sequence[npt.NDArray[T]]) -> npt.NDArray[T]:
    """The value of an operation that is linear and local to a share, on a batch (N, *shape).

    The result may be a view of an input.
    """
    first = inputs[0]
    match op:
        case Add():
            total = first + inputs[1]
            for other in inputs[2:]:
                total += other
            return total
        case Sub():
            return first - inputs[1]
        case Concat():
            return np.concatenate(inputs, axis=1)
        case Reshape():
            return first.reshape(len(first), *op.shape)
        case Gather():
            return first.reshape(len(first), -1)[:, op.index].reshape(len(first), *op.shape)
        case SumPool():
            return _sum_pool(op, first)
    raise AssertionError(f"{type(op).__name__} is not local")


def take(op: Relu, x: npt.NDArray[T]) -> npt.NDArray[T]:
    """The values at a batch's gates, image after image: (N * gates,)."""
    if op.full:
        return x.reshape(-1)
    return x.reshape(len(x), -1)[:, op.kept].reshape(-1)


def positions(op: Relu, batch: int) -> Index | None:
    """The flat positions of :func:`take` in the whole batch's tensor; ``None`` for all."""
    if op.full:
        return None
    starts = np.arange(batch, dtype=np.int64) * op.size
    return (starts[:, None] + op.kept).reshape(-1)


def put(op: Relu, x: npt.NDArray[T], results: npt.NDArray[T]) -> npt.NDArray[T]:
    """``x`` with ``results`` in the places of :func:`take`."""
    if op.full:
        return results.reshape(x.shape)
    out = x.reshape(len(x), -1).copy()
    out[:, op.kept] = results.reshape(len(x), -1)
    return out.reshape(x.shape)


def _sum_pool(op: SumPool, x: npt.NDArray[T]) -> npt.NDArray[T]:
    _, height, width = op.shape
    (kh, kw), (sh, sw), (ph, pw) = op.kernel, op.stride, op.padding
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    total = np.zeros((len(x), *op.shape), x.dtype)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i, i + sh * (height - 1) + 1, sh)
            total += padded[:, :, rows, j : j + sw * (width - 1) + 1 : sw]
    return total
