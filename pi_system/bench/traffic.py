"""From the parties' logs of messages to bytes per phase, direction and layer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..graph.ir import Graph, Node
from ..net.meter import (
    Event,
    Labels,
    Phase,
    Work,
    events_from_json,
    seconds_from_json,
    work_from_json,
)
from .rounds import round_trips
from .schema import Layer, OnlineTraffic, Traffic

WorkSeconds = dict[tuple[Phase, int, Work], float]
"""Of :func:`work_from_json`."""


@dataclass(frozen=True)
class Logs:
    """What server and client logged in one session.

    The dealer does not know the phases; its links are counted at their other ends.
    """

    server: list[Event]
    client: list[Event]
    server_seconds: dict[Labels, float]
    client_seconds: dict[Labels, float]
    server_work: WorkSeconds
    client_work: WorkSeconds

    @classmethod
    def of(cls, server: dict[str, Any], client: dict[str, Any]) -> Self:
        """From the two parties' :meth:`Meter.to_json`."""
        return cls(
            events_from_json(server),
            events_from_json(client),
            seconds_from_json(server),
            seconds_from_json(client),
            work_from_json(server),
            work_from_json(client),
        )

    def phase(
        self, phase: str, inferences: Sequence[int] | None = None, layer: str | None = None
    ) -> Traffic:
        """Bytes of a phase by direction; per inference (the median) if inferences are named."""
        if inferences is None:
            return Traffic(**self._directions(phase, None, layer))
        each = [self._directions(phase, number, layer) for number in inferences]
        return Traffic(**{key: _median(one[key] for one in each) for key in each[0]})

    def offline_parts(self, graph: Graph, batch: int, inferences: Sequence[int]) -> dict[str, Any]:
        """What :class:`~pi_system.bench.schema.Offline` says of ReLUs and linear layers."""
        marks = {event.layer for event in self.client if event.phase == "offline"}
        if not {"gates", "linear"} & marks:
            return {}
        gates, linear = (
            self.phase("offline", inferences, layer=mark) for mark in ("gates", "linear")
        )
        kept = batch * graph.relu_kept
        per = {
            way: round(getattr(gates, way) / kept, 2) if kept else 0.0
            for way in ("dealer_to_client", "dealer_to_server")
        }
        return {"relu_bytes": gates, "linear_bytes": linear, "bytes_per_relu": per}

    def online_round_trips(self, inference: int) -> float:
        """Of one inference between server and client."""
        logs = {"server": self.server, "client": self.client}
        return round_trips({role: _online(log, inference) for role, log in logs.items()})

    def work(self, inferences: Sequence[int]) -> dict[str, dict[str, float]]:
        """Milliseconds of an inference online by party and kind of work, as far as the backend
        tells them apart."""
        return {
            role: _by_kind(work, inferences)
            for role, work in (("server", self.server_work), ("client", self.client_work))
        }

    def layers(self, graph: Graph, inferences: Sequence[int]) -> list[Layer]:
        """Every layer that sent or received anything online or took time, and all ReLU layers."""
        names = [node.name for node in graph.relus]
        names += [event.layer for event in self.client if event.phase == "online"]
        names += [labels.layer for labels in self.server_seconds if labels.phase == "online"]
        order = {node.name: index for index, node in enumerate(graph)}
        unique = sorted(set(names), key=lambda name: order.get(name.partition("+")[0], -1))
        return [self._layer(graph, name, inferences) for name in unique]

    def _layer(self, graph: Graph, name: str, inferences: Sequence[int]) -> Layer:
        nodes = _nodes(graph, name)
        relus = [node for node in nodes if node.op == "relu"]
        each = [
            [event for event in _online(self.client, number) if event.layer == name]
            for number in inferences
        ]
        return Layer(
            name=name or "session",
            op=nodes[0].op if nodes else ("other" if name else "session"),
            relus_kept=sum(graph.kept(node) for node in relus),
            relus_total=sum(_size(node) for node in relus),
            bytes=OnlineTraffic(
                _median(_bytes(events, "server", "sent") for events in each),
                _median(_bytes(events, "server", "received") for events in each),
            ),
            milliseconds={
                "server": _milliseconds(self.server_seconds, name, inferences),
                "client": _milliseconds(self.client_seconds, name, inferences),
            },
        )

    def _directions(
        self, phase: str, inference: int | None, layer: str | None = None
    ) -> dict[str, int]:
        server, client = (
            [
                e
                for e in log
                if e.phase == phase
                and inference in (None, e.inference)
                and layer in (None, e.layer)
            ]
            for log in (self.server, self.client)
        )
        return {
            "client_to_server": _bytes(client, "server", "sent"),
            "server_to_client": _bytes(client, "server", "received"),
            "dealer_to_server": _bytes(server, "dealer", "received"),
            "dealer_to_client": _bytes(client, "dealer", "received"),
            "server_to_dealer": _bytes(server, "dealer", "sent"),
            "client_to_dealer": _bytes(client, "dealer", "sent"),
        }


def _online(log: Iterable[Event], inference: int) -> list[Event]:
    return [event for event in log if event.phase == "online" and event.inference == inference]


def _bytes(events: Iterable[Event], peer: str, direction: str) -> int:
    return sum(e.bytes for e in events if e.peer == peer and e.direction == direction)


def _median(values: Iterable[int]) -> int:
    return round(statistics.median(values))


def _by_kind(work: WorkSeconds, inferences: Sequence[int]) -> dict[str, float]:
    kinds = dict.fromkeys(kind for phase, _, kind in work if phase == "online")
    return {
        kind: round(
            1000 * statistics.median(work.get(("online", n, kind), 0.0) for n in inferences), 4
        )
        for kind in kinds
    }


def _milliseconds(
    seconds: dict[Labels, float], layer: str, inferences: Sequence[int]
) -> float | None:
    if not layer:
        return None  # the phase as a whole, layers included
    values = [seconds.get(Labels("online", number, layer)) for number in inferences]
    known = [value for value in values if value is not None]
    return round(1000 * statistics.median(known), 4) if known else None


def _nodes(graph: Graph, name: str) -> list[Node]:
    """The nodes a label stands for; several names joined by "+" were done in one message."""
    nodes = {node.name: node for node in graph}
    parts = [nodes.get(part) for part in name.split("+")]
    return [node for node in parts if node is not None] if all(parts) else []


def _size(node: Node) -> int:
    size = 1
    for length in node.shape:
        size *= length
    return size
