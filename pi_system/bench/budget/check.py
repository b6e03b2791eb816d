"""A model against a budget: by computing what follows from its plan, and by measuring the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...backends.fss import footprint
from ...backends.fss.party import FssBackend
from ...backends.fss.transcript import LEARNS
from ...errors import BudgetError, UsageError
from ...graph.ir import Graph
from ...net.framing import HEADER
from ...net.meter import LOGGED
from ...parties import commands
from ...parties.timeouts import Timeouts
from ..measure import Measurement, measure
from ..schema import Result
from .limits import Accuracy, Budget, Material, Offline, Online, Relus, Reveals

State = Literal["kept", "over", "not measured"]


@dataclass(frozen=True)
class Check:
    """One limit and what was found.

    Attributes:
        limit: its key in the file.
        allowed: a number, or names.
        computed: what follows from plan and program; ``None`` where nothing does.
        measured: ``None`` without measurement.
        over: by how much the worse of the two is beyond the limit, in its own unit.
        least: the limit is the least allowed, not the most.
        beyond: the names that are not allowed, where names are limited.
    """

    limit: str
    allowed: Any
    computed: Any = None
    measured: Any = None
    over: float = 0.0
    least: bool = False
    beyond: list[str] = field(default_factory=list)

    @property
    def state(self) -> State:
        if self.computed is None and self.measured is None:
            return "not measured"
        return "over" if self.over > 0 else "kept"


@dataclass(frozen=True)
class Subject:
    """The model, and how to measure it.

    Attributes:
        name: as named on the command line.
        images: (N, C, H, W), normalised.
        labels: (N,), or ``None`` where there are none.
    """

    name: str
    graph: Graph
    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None = None
    threads: int = 1
    repeat: int = 5
    timeouts: Timeouts = field(default_factory=Timeouts)


@dataclass(frozen=True)
class Found:
    """What was measured: on the first network all images, on the others speed alone."""

    results: dict[str, Result]
    findings: int | None

    @property
    def first(self) -> Result:
        return next(iter(self.results.values()))


def costs(graph: Graph, plan: str, batch: int, inference: int = LOGGED - 1) -> Budget:
    """What follows from a model without running it, as the tightest limits that it keeps.

    Args:
        inference: its number in a session. Some messages have it in decimal, so that their bytes
            are one more from the tenth on; by default it has two digits.

    Raises:
        UsageError: there is no such plan.
        IntegrityError: the model's is damaged.
    """
    public = footprint.public(graph, plan, batch)
    cost = footprint.footprint(public, inference)
    online, offline = dict(cost.online), dict(cost.offline)
    up: footprint.Link = ("client", "server")
    down: footprint.Link = ("server", "client")
    online[up] += HEADER.size + len(f"online {inference}")
    offline[up] += HEADER.size + len("offline 1")
    offline[down] += HEADER.size + len(commands.DONE)
    return Budget(
        plan=plan,
        batch=batch,
        relus=Relus(graph.relu_kept, {node.name: graph.kept(node) for node in graph.relus}),
        online=Online(
            bytes=sum(online.values()),
            round_trips=cost.round_trips,
            **{f"{a}_to_{b}": size for (a, b), size in online.items()},
        ),
        offline=Offline(
            bytes=sum(offline.values()),
            **{f"{a}_to_{b}": size for (a, b), size in offline.items()},
        ),
        material=Material(cost.material["server"], cost.material["client"]),
        reveals=Reveals(
            server=tuple(LEARNS["server"]),
            client=tuple(LEARNS["client"]),
            dealer=tuple(LEARNS["dealer"]),
            answer_bits=cost.answer_bits,
        ),
    )


def run(
    budget: Budget, subject: Subject, *, progress: Callable[[str], None] = lambda text: None
) -> Found:
    """Measure all that a budget limits.

    Raises:
        PiError: a party failed.
    """
    results: dict[str, Result] = {}
    for network in budget.latency_ms or {"loopback": 0.0}:
        progress(f"measuring on {network}")
        count = len(subject.images) if not results else budget.batch
        chosen = slice(0, max(count, 1))
        results[network] = measure(
            Measurement(
                model=subject.name,
                graph=subject.graph,
                backend=FssBackend.name,
                images=subject.images[chosen],
                labels=None if subject.labels is None else subject.labels[chosen],
                batch=budget.batch,
                threads=subject.threads,
                network=network,
                repeat=subject.repeat,
                timeouts=subject.timeouts,
                plan=budget.plan,
            )
        )
    return Found(results, _audited(budget, subject, progress))


def _audited(budget: Budget, subject: Subject, progress: Callable[[str], None]) -> int | None:
    wanted = budget.reveals.audited
    if wanted is None:
        return None
    from ..audit.report import Audit, audit

    progress("auditing")
    report = audit(
        Audit(subject.graph, subject.images, wanted, plan=budget.plan, batch=budget.batch)
    )
    return len(report.findings)


def check(budget: Budget, graph: Graph, found: Found | None = None) -> list[Check]:
    """Every limit of a budget.

    Raises:
        UsageError: a limit on a layer that the model does not have, or on accuracy where the
            images have no labels.
    """
    computed = costs(graph, budget.plan, budget.batch)
    checks = _relus(budget.relus, computed.relus)
    checks += _traffic(budget, computed, None if found is None else found.first)
    checks += _bits_on_disk(budget.material, computed.material)
    for network, limit in budget.latency_ms.items():
        latency = None
        if found is not None:
            latency = found.results[network].online.latency_ms.median
        checks.append(_most(f"latency_ms.{network}", limit, None, latency))
    checks += _accuracy(budget.accuracy, None if found is None else found.first)
    checks += _reveals(budget.reveals, computed.reveals, found)
    return checks


def raise_if_over(checks: Sequence[Check]) -> None:
    """As an exit code.

    Raises:
        BudgetError: a limit is broken; all broken ones are named.
    """
    over = [check for check in checks if check.state == "over"]
    if over:
        told = ", ".join(
            f"{check.limit} by {', '.join(check.beyond) or _number(check.over)}" for check in over
        )
        raise BudgetError(f"over budget: {told}")


def _relus(limits: Relus, computed: Relus) -> list[Check]:
    checks = []
    if limits.total is not None:
        checks.append(_most("relus.total", limits.total, computed.total))
    for layer, limit in limits.per_layer.items():
        if layer not in computed.per_layer:
            raise UsageError(
                f"relus.per_layer: the model has no ReLU layer {layer!r}; it has "
                f"{', '.join(computed.per_layer)}"
            )
        checks.append(_most(f"relus.per_layer.{layer}", limit, computed.per_layer[layer]))
    return checks


def _traffic(budget: Budget, computed: Budget, result: Result | None) -> list[Check]:
    checks = []
    for phase in ("online", "offline"):
        limits, costs = getattr(budget, phase), getattr(computed, phase)
        for name, limit in vars(limits).items():
            if limit is None:
                continue
            measured = None
            if result is not None:
                record = getattr(result, phase)
                if name == "round_trips":
                    measured = record.round_trips
                else:
                    traffic = record.bytes
                    measured = traffic.total if name == "bytes" else getattr(traffic, name)
            checks.append(_most(f"{phase}.{name}", limit, getattr(costs, name), measured))
    return checks


def _bits_on_disk(limits: Material, computed: Material) -> list[Check]:
    return [
        _most(f"material.{role}", limit, getattr(computed, role))
        for role, limit in vars(limits).items()
        if limit is not None
    ]


def _accuracy(limits: Accuracy, result: Result | None) -> list[Check]:
    seen = None if result is None else result.accuracy
    right = plain = None
    if seen is not None and (limits.private is not None or limits.loss is not None):
        if seen.correct is None or seen.plaintext_correct is None:
            raise UsageError("limits on accuracy.private and accuracy.loss need images with labels")
        right, plain = seen.correct / seen.images, seen.plaintext_correct / seen.images
    checks = []
    if limits.private is not None:
        checks.append(_least("accuracy.private", limits.private, right))
    if limits.loss is not None:
        loss = None if right is None or plain is None else round(plain - right, 6)
        checks.append(_most("accuracy.loss", limits.loss, None, loss))
    if limits.agreement is not None:
        agreement = None if seen is None else seen.argmax_agreement
        checks.append(_least("accuracy.agreement", limits.agreement, agreement))
    if limits.logit_error is not None:
        error = None if seen is None else seen.max_abs_error
        checks.append(_most("accuracy.logit_error", limits.logit_error, None, error))
    return checks


def _reveals(limits: Reveals, computed: Reveals, found: Found | None) -> list[Check]:
    checks = []
    for role in LEARNS:
        allowed = getattr(limits, role)
        if allowed is None:
            continue
        learns = getattr(computed, role)
        more = [name for name in learns if name not in allowed]
        limit = f"reveals.{role}"
        checks.append(Check(limit, list(allowed), list(learns), over=len(more), beyond=more))
    if limits.answer_bits is not None:
        checks.append(_most("reveals.answer_bits", limits.answer_bits, computed.answer_bits))
    if limits.audited is not None:
        # The limit is on findings; the file says how many inferences are audited.
        measured = None if found is None else found.findings
        checks.append(_most(f"reveals.audited ({limits.audited})", 0, None, measured))
    return checks


def _most(limit: str, allowed: float, computed: Any, measured: Any = None) -> Check:
    worst = max((x for x in (computed, measured) if x is not None), default=allowed)
    return Check(limit, allowed, computed, measured, max(0.0, worst - allowed))


def _least(limit: str, allowed: float, measured: Any) -> Check:
    short = 0.0 if measured is None else max(0.0, allowed - measured)
    return Check(limit, allowed, None, measured, short, least=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
