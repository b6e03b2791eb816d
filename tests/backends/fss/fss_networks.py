"""Random small graphs, and three sessions run over in-process channels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pi_system.backends.base import Options
from pi_system.backends.fss.client import Client
from pi_system.backends.fss.dealer import Dealer
from pi_system.backends.fss.plan import Plan, Precision, calibrate
from pi_system.backends.fss.server import PLAN_KEY, Server
from pi_system.backends.fss.store import Store
from pi_system.errors import PiError, RefusedError
from pi_system.graph.ir import Attribute, Graph, Node
from pi_system.net.channel import channel_pair
from pi_system.net.tap import Tape

Floats = npt.NDArray[np.float32]


class Builder:
    """Adds nodes one by one; every method returns the new node's name."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...] = (3, 8, 8)) -> None:
        self.rng = rng
        self.nodes = [Node("image", "input", (), shape)]
        self.tensors: dict[str, npt.NDArray[Any]] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return next(node.shape for node in self.nodes if node.name == name)

    def add(
        self,
        op: str,
        inputs: tuple[str, ...],
        shape: tuple[int, ...],
        tensors: dict[str, npt.NDArray[Any]] | None = None,
        **attrs: Attribute,
    ) -> str:
        name = f"{op}{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, shape, attrs))
        for role, value in (tensors or {}).items():
            self.tensors[f"{name}.{role}"] = value
        return name

    def conv(
        self, source: str, out: int, kernel: int = 3, stride: int = 1, groups: int = 1,
        dilation: int = 1,
    ) -> str:  # fmt: skip
        channels, height, width = self.shape(source)
        pad = dilation * (kernel // 2)
        fan = channels // groups * kernel * kernel
        weight = self.rng.normal(size=(out, channels // groups, kernel, kernel)) / np.sqrt(fan)
        span = dilation * (kernel - 1) + 1
        size = tuple((side + 2 * pad - span) // stride + 1 for side in (height, width))
        tensors = {
            "weight": weight.astype(np.float32),
            "bias": self.rng.normal(size=out).astype(np.float32) / 4,
        }
        return self.add(
            "conv", (source,), (out, *size), tensors, kernel=(kernel, kernel),
            stride=(stride, stride), padding=(pad, pad), dilation=(dilation, dilation),
            groups=groups,
        )  # fmt: skip

    def relu(self, source: str, keep: float) -> str:
        shape = self.shape(source)
        mask = self.rng.random(shape) < keep
        return self.add("relu", (source,), shape, {"mask": mask})

    def pool(self, source: str, op: str, kernel: int, stride: int, padding: int = 0) -> str:
        channels, *sides = self.shape(source)
        size = tuple((side + 2 * padding - kernel) // stride + 1 for side in sides)
        return self.add(
            op, (source,), (channels, *size), kernel=(kernel, kernel), stride=(stride, stride),
            padding=(padding, padding),
        )  # fmt: skip

    def affine(self, source: str) -> str:
        shape = self.shape(source)
        tensors = {
            "scale": self.rng.normal(1, 0.2, shape[0]).astype(np.float32),
            "shift": self.rng.normal(0, 0.2, shape[0]).astype(np.float32),
        }
        return self.add("affine", (source,), shape, tensors)

    def join(self, a: str, b: str) -> str:
        if self.shape(a) == self.shape(b) and self.rng.random() < 0.5:
            return self.add("add", (a, b), self.shape(a))
        (ca, *sides), (cb, *_) = self.shape(a), self.shape(b)
        return self.add("concat", (a, b), (ca + cb, *sides))

    def linear(self, source: str, out: int) -> str:
        shape = self.shape(source)
        if len(shape) != 1:
            source = self.add("flatten", (source,), (int(np.prod(shape)),))
        (width,) = self.shape(source)
        tensors = {
            "weight": (self.rng.normal(size=(out, width)) / np.sqrt(width)).astype(np.float32),
            "bias": self.rng.normal(size=out).astype(np.float32),
        }
        return self.add("linear", (source,), (out,), tensors)

    def graph(self) -> Graph:
        return Graph(tuple(self.nodes), self.tensors, {"name": "test"})


def random_graph(seed: int) -> Graph:
    """A few random layers of every kind, with fan-out, and full, empty and partial masks."""
    rng = np.random.default_rng(seed)
    b = Builder(rng)
    x = b.conv("image", int(rng.integers(2, 6)))
    keep = (0.0, 0.3, 1.0)
    for _ in range(int(rng.integers(1, 5))):
        skip = x
        match int(rng.integers(8)):
            case 0:
                x = b.relu(x, rng.choice(keep))
            case 1:
                x = b.conv(x, int(rng.integers(2, 6)), stride=int(rng.integers(1, 3)))
            case 2:
                out = b.shape(x)[0]
                y = b.conv(b.relu(b.conv(x, out), rng.choice(keep)), out)
                x = b.relu(b.join(y, skip), rng.choice(keep))
            case 3:
                side = b.shape(x)[1]
                x = b.pool(x, "maxpool", 3, 2, 1) if side % 2 else b.pool(x, "maxpool", 2, 2)
            case 4:
                x = b.pool(b.relu(x, 0.5), "avgpool", 3, 1, 1)
            case 5:
                x = b.relu(b.affine(x), rng.choice(keep))
            case 6:
                x = b.conv(x, b.shape(x)[0], groups=b.shape(x)[0], dilation=int(rng.integers(1, 3)))
            case 7:
                x = b.join(b.relu(x, 1.0), skip)
        if b.shape(x)[1] <= 2:
            break
    if rng.random() < 0.5:
        side = b.shape(x)[1]
        x = b.pool(x, "avgpool", side, side)
    b.linear(x, 5)
    return b.graph()


def residual(seed: int = 0, keep: float = 0.4, side: int = 8) -> Graph:
    """A residual block between two convolutions."""
    b = Builder(np.random.default_rng(seed), (3, side, side))
    x = b.relu(b.conv("image", 4), keep)
    y = b.conv(b.relu(b.conv(x, 4), keep), 4)
    x = b.relu(b.add("add", (x, y), b.shape(x)), keep)
    x = b.pool(x, "avgpool", side, side)
    b.linear(x, 5)
    return b.graph()


def images(graph: Graph, count: int, seed: int = 1) -> Floats:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *graph.input.shape)).astype(np.float32)


def planned(graph: Graph, precision: Precision | None = None) -> tuple[Graph, Plan]:
    """The graph with a plan from 16 other images of the same distribution."""
    plan = calibrate(graph, images(graph, 16, seed=2), precision or Precision())
    metadata = {**graph.metadata, PLAN_KEY: {"default": plan.to_json()}}
    return Graph(graph.nodes, graph.tensors, metadata), plan


@dataclass
class Sessions:
    """A server, a client and a dealer in three threads.

    ``tapes`` hold each one's frames. ``stores`` are the client's and the server's; without
    ``dealer`` there is none.
    """

    graph: Graph
    options: Options = field(default_factory=Options)
    tapes: dict[str, Tape] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    stores: tuple[Store | None, Store | None] = (None, None)
    dealer_takes_part: bool = True

    def __post_init__(self) -> None:
        self.at_server, self.at_client = channel_pair(names=("server", "client"))
        self.server_dealer, self.dealer_server = channel_pair(names=("server", "dealer"))
        self.client_dealer, self.dealer_client = channel_pair(names=("client", "dealer"))
        for role, channels in (
            ("server", (self.at_server, self.server_dealer)),
            ("client", (self.at_client, self.client_dealer)),
            ("dealer", (self.dealer_server, self.dealer_client)),
        ):
            self.tapes[role] = Tape()
            self.tapes[role].attach(*channels)
        kept, held = self.stores
        with_dealer = self.dealer_takes_part
        self.server = Server(
            self.graph, self.at_server, self.server_dealer if with_dealer else None,
            self.options, held,
        )  # fmt: skip
        self.client = Client(
            self.graph.public(), self.at_client, self.client_dealer if with_dealer else None,
            self.options, kept,
        )  # fmt: skip
        self.dealer = Dealer(self.dealer_server, self.dealer_client, self.options)
        self._dealing = self._start(self.dealer.run)
        try:
            self.together(self.client.setup, self.server.setup)
        except BaseException:
            self.close()
            raise

    def prepare(self, count: int) -> int:
        stock: int = self.together(
            lambda: self.client.prepare(count), lambda: self.server.prepare(count)
        )
        return stock

    def together(self, client: Callable[[], Any], server: Callable[[], Any]) -> Any:
        """Run both; the client's result. An error of the server is raised too."""
        before = len(self.errors)
        thread = self._start(server)
        try:
            result = client()
        except BaseException as error:
            self.at_client.abort(error if isinstance(error, PiError) else PiError("a bug"))
            thread.join(10)
            if isinstance(error, RefusedError) or not self.errors[before:]:
                raise
            raise self.errors[before] from error
        thread.join(10)
        if self.errors[before:]:
            raise self.errors[before]
        return result

    def offline(self, count: int) -> None:
        self.together(lambda: self.client.offline(count), lambda: self.server.offline(count))

    def online(self, x: Floats) -> Floats:
        result: Floats = self.together(lambda: self.client.online(x), self.server.online)
        return result

    def close(self) -> None:
        for channel in (
            self.at_server, self.at_client, self.server_dealer, self.client_dealer,
        ):  # fmt: skip
            channel.close()
        self._dealing.join(5)
        for channel in (self.dealer_server, self.dealer_client):
            channel.close()
        assert not self._dealing.is_alive()

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, work: Callable[[], Any]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)
                if work != self.dealer.run and isinstance(error, PiError):
                    self.at_server.abort(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread
