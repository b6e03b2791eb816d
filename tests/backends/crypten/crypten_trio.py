"""Three parties in three threads over socket pairs, everything they send kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi_system.backends.base import Options
from pi_system.graph.ir import Graph, Node
from pi_system.graph.validate import infer_shape
from pi_system.net.channel import Channel
from pi_system.net.meter import Event, Meter

Array = np.ndarray[Any, Any]
PAIRS = (("server", "client"), ("server", "dealer"), ("client", "dealer"))


class Tapped:
    """A channel that keeps the payload of every frame it sends and receives."""

    def __init__(self, channel: Channel) -> None:
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        send, receive = channel._open_frame, channel._count

        def open_frame(data: Any) -> Any:
            self.sent.append(bytes(data.tobytes() if isinstance(data, np.ndarray) else data))
            return send(data)

        def count(incoming: Any) -> None:
            payload = incoming.data if incoming._into is None else incoming._into
            self.received.append(bytes(payload))
            receive(incoming)

        channel._open_frame = open_frame  # type: ignore[method-assign]
        channel._count = count  # type: ignore[method-assign]


@dataclass
class Trio:
    """A session of three parties: the client's side is here, the others run in threads."""

    graph: Graph
    options: Options
    server: Any = None
    client: Any = None
    dealer: Any = None
    meters: dict[str, Meter] = field(default_factory=dict)
    taps: dict[tuple[str, str], Tapped] = field(default_factory=dict)
    channels: dict[tuple[str, str], Channel] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def both(self, name: str, *arguments: Any, images: Any = None) -> Any:
        """Call method ``name`` of server and client at the same time; the client's result."""
        thread = self.start(lambda: getattr(self.server, name)(*arguments))
        try:
            result = getattr(self.client, name)(*(arguments if images is None else (images,)))
        finally:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return result

    def start(self, action: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                action()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def setup(self) -> Trio:
        self.both("setup")
        return self

    def infer(self, images: Array) -> Array:
        self.both("offline", 1)
        result: Array = self.both("online", images=images)
        return result

    def online(self, role: str, peer: str, layer: str | None = None) -> list[Event]:
        """What ``role`` exchanged online with ``peer`` (in one layer)."""
        return [
            e
            for e in self.meters[role].events
            if e.phase == "online" and e.peer == peer and layer in (None, e.layer)
        ]


class Builder:
    """Graphs node by node, with random weights of a trained network's size."""

    def __init__(self, shape: tuple[int, ...] = (3, 8, 8), seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes = [Node("input", "input", (), shape)]
        self.tensors: dict[str, Array] = {}

    @property
    def last(self) -> Node:
        return self.nodes[-1]

    def add(self, op: str, *inputs: Node, channels: int = 0, **attrs: Any) -> Node:
        sources = inputs or (self.last,)
        shapes = tuple(node.shape for node in sources)
        name = f"{op}{len(self.nodes)}"
        shape = infer_shape(op, attrs, shapes, channels)
        node = Node(name, op, tuple(s.name for s in sources), shape, attrs)
        self.nodes.append(node)
        return node

    def put(self, node: Node, role: str, value: Array) -> None:
        self.tensors[f"{node.name}.{role}"] = value

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        value: Array = (self.rng.normal(size=shape) * scale).astype(np.float32)
        return value

    def conv(
        self,
        channels: int,
        *inputs: Node,
        kernel: Any = (3, 3),
        stride: Any = (1, 1),
        padding: Any = (1, 1),
        dilation: Any = (1, 1),
        groups: int = 1,
    ) -> Node:
        fan_in = (inputs or (self.last,))[0].shape[0] // groups
        node = self.add(
            "conv",
            *inputs,
            channels=channels,
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        scale = float((2 / (fan_in * kernel[0] * kernel[1])) ** 0.5)
        self.put(node, "weight", self.normal(channels, fan_in, *kernel, scale=scale))
        self.put(node, "bias", self.normal(channels, scale=0.3))
        return node

    def affine(self, *inputs: Node) -> Node:
        node = self.add("affine", *inputs)
        self.put(node, "scale", self.normal(node.shape[0]))
        self.put(node, "shift", self.normal(node.shape[0]))
        return node

    def relu(self, *inputs: Node, keep: float = 1.0) -> Node:
        """Keep exactly this fraction of the positions, rounded."""
        node = self.add("relu", *inputs)
        size = int(np.prod(node.shape))
        mask = np.zeros(size, np.bool_)
        mask[self.rng.permutation(size)[: round(keep * size)]] = True
        self.put(node, "mask", mask.reshape(node.shape))
        return node

    def pool(self, op: str, *inputs: Node, kernel: Any, stride: Any, padding: Any = (0, 0)) -> Node:
        return self.add(op, *inputs, kernel=kernel, stride=stride, padding=padding)

    def linear(self, classes: int) -> Node:
        if self.last.op != "flatten":
            self.add("flatten")
        size = self.last.shape[0]
        node = self.add("linear", channels=classes)
        self.put(node, "weight", self.normal(classes, size, scale=size**-0.5))
        self.put(node, "bias", self.normal(classes))
        return node

    def graph(self) -> Graph:
        return Graph(tuple(self.nodes), self.tensors, {"name": "test"})


def one_relu(keep: float, shape: tuple[int, ...] = (4, 6, 6)) -> Graph:
    """A ReLU between two cheap linear layers."""
    b = Builder(shape)
    b.relu(b.affine(), keep=keep)
    b.linear(2)
    return b.graph()


def images(graph: Graph, count: int = 1, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    value: Array = rng.normal(size=(count, *graph.input.shape)).astype(np.float32)
    return value
