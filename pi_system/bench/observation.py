"""What sessions of three parties showed: the cost of each phase, from the parties' reports."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from ..errors import IntegrityError, UsageError
from ..graph.ir import Graph
from ..net.link import parse
from ..net.meter import LOGGED
from ..parties.local import LocalResult
from .schema import Latency, Model, Network, Offline, Online, OnlineTraffic, Setup
from .traffic import Logs

T = TypeVar("T")


@dataclass(frozen=True)
class Observation:
    """Of one session, or of several (see :func:`combine`).

    Attributes:
        measured: the link, as the client found it.
    """

    setup: Setup
    offline: Offline
    online: Online
    measured: dict[str, float]
    peak_memory_mb: dict[str, float]

    @classmethod
    def of(cls, graph: Graph, local: LocalResult) -> Self:
        """One session on ``graph``.

        Raises:
            IntegrityError: the server ran another model.
        UsageError: all logged inferences were warm-ups.
        """
        report = local.client
        if report["sha256"] != graph.sha256():
            raise IntegrityError("the server's model is not the plaintext one; has it changed?")
        logs = Logs.of(local.server["meter"], report["meter"])
        inferences = report["inferences"]
        numbers = [one["number"] for one in inferences if one["number"] < LOGGED]
        if not numbers:
            raise UsageError(f"messages are logged of the first {LOGGED} inferences: warm up less")
        traffic = logs.phase("online", numbers)
        layers = logs.layers(graph, numbers)
        parties = {"client": report, "server": local.server, "dealer": local.dealer}
        return cls(
            setup=Setup(round(report["setup_seconds"], 4), logs.phase("setup")),
            offline=Offline(
                Latency.of(inference["offline_seconds"] for inference in inferences),
                logs.phase("offline", numbers),
                **logs.offline_parts(graph, report["batch"], numbers),
            ),
            online=Online(
                latency_ms=Latency.of(inference["online_seconds"] for inference in inferences),
                bytes=OnlineTraffic(traffic.client_to_server, traffic.server_to_client),
                relu_bytes=sum(layer.bytes.total for layer in layers if layer.op == "relu"),
                round_trips=statistics.median(logs.online_round_trips(n) for n in numbers),
                work_ms=logs.work(numbers),
                layers=layers,
            ),
            measured={
                "rtt_ms": round(1000 * statistics.median(report["round_trip_seconds"]), 4),
                "mbps": round(report["megabits"], 1),
            },
            peak_memory_mb={
                role: round(party["peak_memory"] / 1e6, 1) for role, party in parties.items()
            },
        )


def combine(sessions: list[T]) -> T:
    """Several records of one shape as one: every number is the median, raw values stay.

    Lists and dictionaries are combined item by item, leaving out what some do not have; strings
    must be equal.

    Raises:
        ValueError: the records differ in shape.
    """
    sessions = [one for one in sessions if one is not None] or sessions
    first = sessions[0]
    result: Any
    if isinstance(first, Latency):
        values = [value for one in sessions for value in one.values]  # type: ignore[attr-defined]
        result = Latency.of_milliseconds(values)
    elif dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = [field.name for field in dataclasses.fields(first)]
        result = type(first)(
            **{name: combine([getattr(one, name) for one in sessions]) for name in fields}
        )
    elif isinstance(first, dict):
        records: list[dict[str, Any]] = sessions  # type: ignore[assignment]
        keys = dict.fromkeys(key for one in records for key in one)
        result = {key: combine([one[key] for one in records if key in one]) for key in keys}
    elif isinstance(first, list):
        columns = zip(*sessions, strict=True)
        result = [combine(list(column)) for column in columns]
    elif isinstance(first, int | float):
        median: Any = statistics.median(sessions)  # type: ignore[type-var]
        result = round(median) if isinstance(first, int) else median
    elif any(one != first for one in sessions):
        raise ValueError(f"the sessions differ: {sessions}")
    else:
        result = first
    return result  # type: ignore[no-any-return]


def describe_model(graph: Graph) -> Model:
    """The model as results record it."""
    dataset = graph.metadata.get("dataset")
    return Model(
        name=str(graph.metadata.get("name", "unnamed")),
        dataset=None if dataset is None else str(dataset),
        relu_total=graph.relu_total,
        relu_kept=graph.relu_kept,
        relu_layers=sum(graph.kept(node) > 0 for node in graph.relus),
        sha256=graph.sha256(),
    )


def describe_network(name: str, measured: dict[str, float]) -> Network:
    """The network as results record it.

    Args:
        measured: of :class:`Observation`.
    """
    link = parse(name)
    if link is None:
        return Network(name, None, None, measured)
    return Network(name, link.rtt_ms, link.mbps, measured)
