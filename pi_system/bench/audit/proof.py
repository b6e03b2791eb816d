"""That an audit can fail: many audits of good parties and of each kind of bad ones."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...errors import RefusedError
from .. import environment
from .report import LEVEL, SCHEMA_VERSION, Audit, Report, audit
from .sabotage import SABOTAGES


@dataclass(frozen=True)
class Trial:
    """Audits of one kind.

    Attributes:
        sabotage: None for good parties.
        right: how many audits passed (good parties) or failed (bad ones).
        tests: how often each test found something, in the audits of this kind.
        smallest_p: the smallest p-value of each audit.
    """

    sabotage: str | None
    does: str
    rounds: int
    right: int
    tests: dict[str, int]
    smallest_p: tuple[float, ...]
    median_seconds: float


def prove(
    wanted: Audit, rounds: int, *, progress: Callable[[str], None] = lambda text: None
) -> list[Trial]:
    """``rounds`` audits without sabotage and with each kind."""
    trials = []
    for kind in (None, *SABOTAGES):
        reports = []
        for number in range(rounds):
            progress(f"{kind or 'no sabotage'}, audit {number + 1} of {rounds}")
            reports.append(audit(replace(wanted, sabotage=kind)))
        trials.append(_trial(kind, reports))
    return trials


def _trial(kind: str | None, reports: list[Report]) -> Trial:
    found: Counter[str] = Counter()
    for report in reports:
        found.update({finding.test for finding in report.findings})
    return Trial(
        sabotage=kind,
        does="nothing" if kind is None else SABOTAGES[kind].does,
        rounds=len(reports),
        right=sum(report.passed == (kind is None) for report in reports),
        tests=dict(sorted(found.items())),
        smallest_p=tuple(float(f"{report.smallest_p:.3g}") for report in reports),
        median_seconds=round(statistics.median(report.seconds for report in reports), 2),
    )


def to_json(wanted: Audit, trials: list[Trial]) -> dict[str, Any]:
    """The trials as one object."""
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment.describe(),
        "model": str(wanted.graph.metadata.get("name", "unnamed")),
        "backend": wanted.backend,
        "plan": wanted.plan,
        "batch_size": wanted.batch,
        "inferences": wanted.inferences,
        "false_alarm": LEVEL,
        "trials": [asdict(trial) for trial in trials],
    }


def raise_if_wrong(trials: list[Trial]) -> None:
    """As an exit code.

    Raises:
        RefusedError: an audit of good parties failed, or one of bad parties passed.
    """
    wrong = [trial for trial in trials if trial.right != trial.rounds]
    if wrong:
        raise RefusedError(
            "audits were wrong: "
            + ", ".join(
                f"{t.sabotage or 'clean'} {t.rounds - t.right} of {t.rounds}" for t in wrong
            )
        )
