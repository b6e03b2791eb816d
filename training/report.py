"""Tables and plots of a sweep, from its result files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pi_system.errors import IntegrityError, UsageError

from .methods import METHODS

Result = dict[str, Any]


def load(folder: Path) -> list[Result]:
    """The result files of ``folder``.

    Raises:
        UsageError: there are none, or they are not of one network and schedule.
        IntegrityError: one is corrupt.
    """
    results = []
    for path in sorted(folder.glob("*-s*.json")):
        try:
            document = json.loads(path.read_bytes())
            document["method"], document["relu_budget"], document["seed"], document["curve"]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is no result of a sweep: {error}") from error
        results.append(document)
    if not results:
        raise UsageError(f"{folder} holds no results of a sweep")
    kinds = {(r["recipe"], sum(r["epochs"].values()), r["relu_total"]) for r in results}
    if len(kinds) > 1:
        raise UsageError(f"{folder} mixes networks or schedules: {sorted(kinds)}")
    return results


def table(results: Sequence[Result]) -> str:
    """Test accuracy per method and budget as Markdown: the mean, then each seed's."""
    budgets = sorted({r["relu_budget"] for r in results})
    total = results[0]["relu_total"]
    heads = ["method", *(f"{b:,} ReLUs ({b / total:.1%})" for b in budgets)]
    lines = [heads, ["---"] * len(heads)]
    for method in _methods(results):
        cells = [f"`{method}`: {METHODS[method].title}" if method in METHODS else method]
        for budget in budgets:
            values = _values(results, method, budget)
            each = ", ".join(f"{v:.2f}" for v in values)
            cells.append(f"**{mean(values):.2f}** ({each})" if values else "-")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n" + caption(results)


def caption(results: Sequence[Result]) -> str:
    """What the figures of :func:`table` are."""
    first = results[0]
    reference = first["teacher"]["test_accuracy"]
    seeds = ", ".join(str(seed) for seed in sorted({r["seed"] for r in results}))
    return (
        f"Test accuracy in % on {first['dataset']}, mean (each seed's); {first['arch']}, "
        f"{sum(first['epochs'].values())} epochs per student, seeds {seeds}; all-ReLU teacher "
        f"{100 * reference:.2f} with {first['relu_total']:,} ReLUs.\n"
    )


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy against ReLUs, a line per method through its means, a dot per student.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from .pictures import figure

    chart, axes = figure(7, 4.5)
    for method in _methods(results):
        points = sorted(
            (r["relu_kept"], 100 * r["test_accuracy"]) for r in results if r["method"] == method
        )
        budgets = sorted({r["relu_budget"] for r in results if r["method"] == method})
        means = [mean(_values(results, method, budget)) for budget in budgets]
        (line,) = axes.plot(budgets, means, label=method)
        axes.scatter(*zip(*points, strict=True), s=12, color=line.get_color())
    reference = 100 * results[0]["teacher"]["test_accuracy"]
    axes.axhline(reference, color="grey", linestyle="--", label="all-ReLU teacher")
    axes.set_xscale("log")
    ticks = sorted({r["relu_budget"] for r in results})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ReLUs kept (the stem counted)")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    chart.savefig(path)


def _methods(results: Iterable[Result]) -> list[str]:
    known = list(METHODS)
    present = {str(r["method"]) for r in results}
    return sorted(present, key=lambda m: (known.index(m) if m in known else len(known), m))


def _values(results: Iterable[Result], method: str, budget: int) -> list[float]:
    found = [r for r in results if (r["method"], r["relu_budget"]) == (method, budget)]
    return [100 * r["test_accuracy"] for r in sorted(found, key=lambda r: r["seed"])]
