"""Backends for tests of the machinery around a backend. They protect nothing.

Child processes import this file by the name ``toy_backends:Class``, so it stands alone.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from pi_system.backends.base import Options
from pi_system.graph.ir import Graph, Node
from pi_system.net.channel import Channel, PeerClosed

ITEM = 24


class Plain:
    """The image goes to the server in the clear; one exchange per ReLU layer, for its bytes."""

    name = "plain"

    def server(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> Any:
        return PlainServer(graph, client, dealer, options)

    def client(self, public: Graph, server: Channel, dealer: Channel, options: Options) -> Any:
        return PlainClient(public, server, dealer, options)

    def dealer(self, server: Channel, client: Channel, options: Options) -> Any:
        return PlainDealer(server, client, options)


class PlainServer:
    def __init__(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> None:
        self.graph, self.channel, self.dealer, self.options = graph, client, dealer, options

    def setup(self) -> None:
        self.dealer.send(b"setup")

    def offline(self, count: int) -> None:
        self.dealer.send(count.to_bytes(4, "little"))
        for _ in range(count):
            self.dealer.recv_array(np.uint8, (ITEM,))

    def online(self) -> None:
        images = self.channel.recv_array(np.float32, (self.options.batch, *self.graph.input.shape))
        exchange_relus(self.graph, self.channel)
        self.channel.send_array(forward(self.graph, images))


class PlainClient:
    def __init__(self, public: Graph, server: Channel, dealer: Channel, options: Options) -> None:
        self.graph, self.channel, self.dealer = public, server, dealer

    def facts(self) -> dict[str, Any]:
        return {}

    def setup(self) -> None:
        pass

    def offline(self, count: int) -> None:
        for _ in range(count):
            self.dealer.recv_array(np.uint8, (ITEM,))

    def online(self, images: Any) -> Any:
        self.channel.send_array(images)
        exchange_relus(self.graph, self.channel)
        return self.channel.recv_array(np.float32, (len(images), *self.graph.output.shape))


class PlainDealer:
    def __init__(self, server: Channel, client: Channel, options: Options) -> None:
        self.server, self.client = server, client

    def run(self) -> None:
        try:
            self.server.recv()
            while True:
                for _ in range(int.from_bytes(self.server.recv(4), "little")):
                    for channel in (self.server, self.client):
                        channel.send_array(np.frombuffer(os.urandom(ITEM), np.uint8))
        except PeerClosed:
            return


def forward(graph: Graph, images: Any) -> Any:
    """The toy graph's logits in NumPy: a test that needs no torch starts in half the time."""
    values = {"input": images}
    for node in graph.nodes[1:]:
        first, *rest = (values[name] for name in node.inputs)
        match node.op:
            case "conv":
                padded = np.pad(first, ((0, 0), (0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
                bias = graph.tensor(node, "bias").reshape(-1, 1, 1)
                values[node.name] = bias + np.einsum(
                    "ncijab,ocab->noij", windows, graph.tensor(node, "weight")
                )
            case "relu":
                kept = graph.tensor(node, "mask")
                values[node.name] = np.where(kept, np.maximum(first, 0), first)
            case "add":
                values[node.name] = first + rest[0]
            case "flatten":
                values[node.name] = first.reshape(len(first), -1)
            case "linear":
                weight, bias = (graph.tensor(node, role) for role in ("weight", "bias"))
                values[node.name] = first @ weight.T + bias
    return values[graph.output.name].astype(np.float32)


def exchange_relus(graph: Graph, channel: Channel) -> None:
    for node in graph.relus:
        if graph.kept(node):
            with channel.meter.in_layer(node.name):
                channel.exchange(bytes(graph.kept(node)))


class SlowServer(Plain):
    """Three seconds per inference, for tests that strike in the middle of one."""

    def server(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> Any:
        class Session(PlainServer):
            def online(self) -> None:
                time.sleep(3)
                super().online()

        return Session(graph, client, dealer, options)


class SilentDealer(Plain):
    """The dealer never sends anything."""

    def dealer(self, server: Channel, client: Channel, options: Options) -> Any:
        class Session(PlainDealer):
            def run(self) -> None:
                time.sleep(5)

        return Session(server, client, options)


class Wrong(Plain):
    """The logits come back reversed."""

    def client(self, public: Graph, server: Channel, dealer: Channel, options: Options) -> Any:
        class Session(PlainClient):
            def online(self, images: Any) -> Any:
                return super().online(images)[:, ::-1].copy()

        return Session(public, server, dealer, options)


class Buggy(Plain):
    """The server fails in a way nobody foresaw."""

    def server(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> Any:
        class Session(PlainServer):
            def online(self) -> None:
                raise ZeroDivisionError("a bug")

        return Session(graph, client, dealer, options)


def toy_graph(seed: int = 0) -> Graph:
    """Two convolutions, a residual sum, half of the ReLUs each, linear: (3, 8, 8) -> 10."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        scale = np.prod(shape[1:]) ** -0.5
        return (generator.standard_normal(shape) * scale).astype(np.float32)

    conv = {
        "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1,
    }  # fmt: skip
    shape = (4, 8, 8)
    nodes = (
        Node("input", "input", (), (3, 8, 8)),
        Node("conv1", "conv", ("input",), shape, conv),
        Node("relu1", "relu", ("conv1",), shape),
        Node("conv2", "conv", ("relu1",), shape, conv),
        Node("sum", "add", ("conv2", "relu1"), shape),
        Node("relu2", "relu", ("sum",), shape),
        Node("flat", "flatten", ("relu2",), (256,)),
        Node("fc", "linear", ("flat",), (10,)),
    )
    half = np.zeros(shape, np.bool_)
    half[:, ::2] = True
    tensors = {
        "conv1.weight": draw(4, 3, 3, 3), "conv1.bias": draw(4),
        "relu1.mask": half,
        "conv2.weight": draw(4, 4, 3, 3), "conv2.bias": draw(4),
        "relu2.mask": ~half,
        "fc.weight": draw(10, 256), "fc.bias": draw(10),
    }  # fmt: skip
    metadata = {
        "name": "toy", "dataset": "toys", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25],
        "classes": [f"class {i}" for i in range(10)],
    }  # fmt: skip
    return Graph(nodes, tensors, metadata)
