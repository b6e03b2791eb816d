"""Who takes part in a comparison: a backend or a peer, on the model itself or on its all-ReLU
version."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .. import models
from ..backends import base
from ..backends.fss.plan import PLAN_KEY
from ..errors import PiError, UsageError
from ..graph import serialize
from ..graph.execute import run as run_plaintext
from ..graph.ir import Graph
from ..parties.local import run_local
from . import parity, peers
from .measure import Measurement
from .observation import Observation, combine, describe_model
from .schema import Contender, Latency, Whole

ALL: Final = "-all"
"""Behind a backend's name: on the version that keeps every ReLU, the usual cost without masks."""


def backend_of(name: str) -> str:
    """The backend or peer behind a contender's name."""
    return name.removesuffix(ALL)


def check(name: str) -> None:
    """Raise UsageError unless there is a contender of this name."""
    if backend_of(name) not in peers.NAMES:
        base.check(backend_of(name))


def with_all_relus(model: str, graph: Graph) -> Graph:
    """The version of a model that keeps every ReLU: the student's teacher, a random model of the
    same architecture, else the same weights without masks.

    Args:
        model: as named on the command line.
        graph: the same, resolved.
    """
    if graph.relu_kept == graph.relu_total:
        return graph
    if model == "demo":
        return models.resolve("demo-teacher")
    if model.startswith("random:"):
        return models.resolve(f"{model.partition('@')[0]}@all")
    masks = {f"{node.name}.mask": np.ones_like(graph.tensor(node, "mask")) for node in graph.relus}
    name = f"{graph.metadata.get('name', 'unnamed')}, all ReLUs"
    # These weights were trained on no data set with these masks, nor calibrated.
    metadata = {**graph.metadata, "name": name, "dataset": None}
    metadata.pop(PLAN_KEY, None)
    return dataclasses.replace(graph, tensors={**graph.tensors, **masks}, metadata=metadata)


@dataclass
class Entry:
    """A contender's sessions so far.

    Attributes:
        plan: of one session.
        failure: why there will be no more sessions.
        seen: one observation per session.
        facts: of the latest session, but the retries of all.
    """

    name: str
    plan: Measurement
    expected: npt.NDArray[np.float32]
    failure: PiError | None = None
    seen: list[Observation] = field(default_factory=list)
    inferences: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> list[dict[str, float]]:
        """The link as each session's client found it."""
        return [one.measured for one in self.seen]

    def online_ms(self, number: int) -> list[float]:
        """Raw values of a session."""
        return self.seen[number].online.latency_ms.values

    def offline_ms(self, number: int) -> list[float] | None:
        """The same of the offline phase, if there is one."""
        return self.seen[number].offline.latency_ms.values

    def run(self) -> None:
        """One more session; if it fails, let it be the last."""
        try:
            local = run_local(self.plan.session())
            self.seen.append(Observation.of(self.plan.graph, local))
        except PiError as error:
            self.failure = error
        else:
            self.inferences += local.client["inferences"]
            facts = local.client["facts"]
            retries = self.facts.get("retries", 0) + facts.get("retries", 0)
            self.facts = {**facts, "retries": retries}

    def result(self) -> Contender:
        """All sessions together."""
        model = describe_model(self.plan.graph)
        if self.failure is not None:
            done = f"failed in round {len(self.seen) + 1}: " if self.seen else ""
            return Contender(self.name, self.plan.backend, model, f"{done}{self.failure}")
        seen = combine(self.seen)
        return Contender(
            name=self.name,
            backend=self.plan.backend,
            model=model,
            not_run=None,
            setup=seen.setup,
            offline=seen.offline,
            online=seen.online,
            accuracy=parity.accuracy(self.inferences, self.expected, self.plan.labels, self.facts),
            peak_memory_mb=seen.peak_memory_mb,
            fixed_point=parity.fixed_point(self.plan.plan, self.facts),
        )


@dataclass
class PeerEntry:
    """A peer's sessions so far; see :class:`Entry`.

    Attributes:
        python: see :class:`~pi_system.bench.peers.PeerRun`.
    """

    name: str
    plan: Measurement
    expected: npt.NDArray[np.float32]
    python: str | None = None
    failure: PiError | None = None
    seen: list[peers.PeerReport] = field(default_factory=list)
    measured: Final[tuple[dict[str, float], ...]] = ()

    def online_ms(self, number: int) -> list[float]:
        """Raw values of a session's whole inferences."""
        return Latency.of(self.seen[number].seconds).values

    def offline_ms(self, number: int) -> list[float] | None:
        """None: it is part of the whole."""
        return None

    def run(self) -> None:
        """One more session; if it fails, let it be the last."""
        plan = self.plan
        try:
            if plan.network != "loopback" or plan.device != "cpu":
                raise UsageError("a peer runs on loopback and the CPU only")
            self.seen.append(
                peers.get(plan.backend).run(
                    peers.PeerRun(
                        model=Path(plan.model),
                        images=plan.images,
                        batch=plan.batch,
                        repeat=plan.repeat,
                        warmup=plan.warmup,
                        threads=plan.threads,
                        python=self.python,
                    )
                )
            )
        except PiError as error:
            self.failure = error

    def result(self) -> Contender:
        """All sessions together."""
        model, backend = describe_model(self.plan.graph), self.plan.backend
        if self.failure is not None:
            done = f"failed in round {len(self.seen) + 1}: " if self.seen else ""
            return Contender(self.name, backend, model, f"{done}{self.failure}")
        inferences = [one for report in self.seen for one in report.inferences]
        carried = [r.interface_bytes for r in self.seen if r.interface_bytes is not None]
        roles = self.seen[0].peak_memory
        return Contender(
            name=self.name,
            backend=backend,
            model=model,
            not_run=None,
            accuracy=parity.accuracy(inferences, self.expected, self.plan.labels, {}),
            peak_memory_mb={
                role: round(statistics.median(r.peak_memory[role] for r in self.seen) / 1e6, 1)
                for role in roles
            },
            whole=Whole(
                latency_ms=Latency.of(value for report in self.seen for value in report.seconds),
                interface_bytes=round(statistics.median(carried)) if carried else None,
                settings=self.seen[0].settings,
            ),
        )


def enter(
    name: str, plan: Measurement, folder: Path, python: str | None = None
) -> Entry | PeerEntry:
    """A contender for measurements like ``plan``.

    Args:
        plan: of the model compared, whatever its backend.
        folder: for the models, which the parties read there: making a random one takes seconds.
        python: for a peer with an environment of its own.
    """
    graph = with_all_relus(plan.model, plan.graph) if name.endswith(ALL) else plan.graph
    path = folder / graph.sha256()
    if not path.exists():
        serialize.save(path, graph)
    mine = dataclasses.replace(plan, model=str(path), graph=graph, backend=backend_of(name))
    expected = run_plaintext(graph, plan.images)
    if mine.backend in peers.NAMES:
        return PeerEntry(name, mine, expected, python)
    return Entry(name, mine, expected)
