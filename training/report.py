"""Tables and plots of a sweep, from its result files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pi_system.errors import IntegrityError, UsageError

from .methods import METHODS
from .sweep import Job, stored

Result = dict[str, Any]

MISSING = "-"


@dataclass(frozen=True)
class Report:
    """The results of a sweep so far.

    Args:
        results: at least one, all of one network and schedule.
        methods, budgets, seeds: of the whole sweep, with or without a result.
    """

    results: tuple[Result, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]

    def accuracies(self, method: str, budget: int) -> list[float | None]:
        """Test accuracy in % for each seed, ``None`` where there is no result."""
        found = {
            r["seed"]: 100 * r["test_accuracy"]
            for r in self.results
            if (r["method"], r["relu_budget"]) == (method, budget)
        }
        return [found.get(seed) for seed in self.seeds]

    @property
    def missing(self) -> int:
        """Students of the sweep without a result."""
        cells = [(m, b) for m in self.methods for b in self.budgets]
        return sum(self.accuracies(*cell).count(None) for cell in cells)


def load(folder: Path, jobs: Sequence[Job] = ()) -> Report:
    """The result files of ``folder``.

    Args:
        jobs: the students of a sweep, whose files alone are read; without them, all are.

    Raises:
        UsageError: there are none, or they are not of one network and schedule.
        IntegrityError: one is corrupt.
    """
    if jobs:
        results = [r for job in jobs if (r := stored(job, folder)) is not None]
    else:
        results = [_read(path) for path in sorted(folder.glob("*-s*.json"))]
    if not results:
        raise UsageError(f"{folder} holds no results of a sweep")
    kinds = {(r["recipe"], sum(r["epochs"].values()), r["relu_total"]) for r in results}
    if len(kinds) > 1:
        raise UsageError(f"{folder} mixes networks or schedules: {sorted(kinds)}")
    asked = [(job.method, job.budget, job.seed) for job in jobs] or [
        (str(r["method"]), int(r["relu_budget"]), int(r["seed"])) for r in results
    ]
    known = list(METHODS)
    methods = sorted(
        {method for method, _, _ in asked},
        key=lambda m: (known.index(m) if m in known else len(known), m),
    )
    budgets = sorted({budget for _, budget, _ in asked})
    seeds = sorted({seed for _, _, seed in asked})
    return Report(tuple(results), tuple(methods), tuple(budgets), tuple(seeds))


def _read(path: Path) -> Result:
    try:
        document = dict(json.loads(path.read_bytes()))
        for key in ("method", "relu_budget", "seed", "curve"):
            document[key]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is no result of a sweep: {error}") from error
    return document


def table(report: Report) -> str:
    """Test accuracy per method and budget as Markdown: the mean, then each seed's."""
    total = report.results[0]["relu_total"]
    heads = ["method", *(f"{b:,} ReLUs ({b / total:.1%})" for b in report.budgets)]
    lines = [heads, ["---"] * len(heads)]
    for method in report.methods:
        # A bar would end the cell.
        title = METHODS[method].title.replace("|", "\\|") if method in METHODS else ""
        cells = [f"`{method}`: {title}" if title else method]
        for budget in report.budgets:
            values = report.accuracies(method, budget)
            done = [value for value in values if value is not None]
            each = ", ".join(MISSING if v is None else f"{v:.2f}" for v in values)
            cells.append(f"**{mean(done):.2f}** ({each})" if done else MISSING)
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n" + caption(report)


def caption(report: Report) -> str:
    """What the figures of :func:`table` are."""
    first, seeds = report.results[0], ", ".join(str(seed) for seed in report.seeds)
    reference = first["teacher"]["test_accuracy"]
    text = (
        f"Test accuracy in % on {first['dataset']}, mean (each seed's); {first['arch']}, "
        f"{sum(first['epochs'].values())} epochs per student, seeds {seeds}; all-ReLU teacher "
        f"{100 * reference:.2f} with {first['relu_total']:,} ReLUs."
    )
    if report.missing:
        count = len(report.methods) * len(report.budgets) * len(report.seeds)
        text += f" {MISSING} is a student without a result yet: {report.missing} of {count}."
    return text + "\n"


def plot(report: Report, path: Path) -> None:
    """Accuracy against ReLUs, a line per method through its means, a dot per student.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from .pictures import figure

    chart, axes = figure(7, 4.5)
    for method in report.methods:
        points = sorted(
            (r["relu_kept"], 100 * r["test_accuracy"])
            for r in report.results
            if r["method"] == method
        )
        if not points:
            continue
        means = []
        for budget in report.budgets:
            done = [v for v in report.accuracies(method, budget) if v is not None]
            if done:
                means.append((budget, mean(done)))
        (line,) = axes.plot(*zip(*means, strict=True), label=method)
        axes.scatter(*zip(*points, strict=True), s=12, color=line.get_color())
    reference = 100 * report.results[0]["teacher"]["test_accuracy"]
    axes.axhline(reference, color="grey", linestyle="--", label="all-ReLU teacher")
    axes.set_xscale("log")
    axes.set_xticks(report.budgets, [f"{tick:,}" for tick in report.budgets])
    axes.minorticks_off()
    if report.missing:
        axes.set_title(f"{report.missing} students without a result yet", fontsize=9)
    axes.set_xlabel("ReLUs kept (the stem counted)")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    chart.savefig(path)
