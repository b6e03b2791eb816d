"""Checks for people, for programs, and for pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import junit
from .check import Check

SUITE = "pi-bench budget"
_LAYERS = "relus.per_layer."


def to_json(model: str, checks: Sequence[Check]) -> dict[str, Any]:
    """One object."""
    return {
        "schema_version": 1,
        "model": model,
        "kept": all(check.state != "over" for check in checks),
        "checks": [{**asdict(check), "state": check.state} for check in checks],
    }


def rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """One flat record per limit."""
    return [
        {
            key: " ".join(value) if isinstance(value, list) else value
            for key, value in {**asdict(check), "state": check.state}.items()
        }
        for check in checks
    ]


def to_junit(checks: Sequence[Check]) -> bytes:
    """A JUnit XML report with one case per limit."""
    cases = []
    for check in checks:
        section, _, name = check.limit.partition(".")
        failure = None
        if check.state == "over":
            failure = (
                f"allowed {_text(check.allowed)}, computed {_text(check.computed)}, "
                f"measured {_text(check.measured)}: over by "
                f"{', '.join(check.beyond) or _text(check.over)}"
            )
        skipped = "needs --measure" if check.state == "not measured" else None
        cases.append(junit.Case(f"budget.{section}", name, failure, skipped))
    return junit.to_xml(SUITE, cases)


def print_checks(console: Console, model: str, checks: Sequence[Check]) -> None:
    """All limits as a table."""
    table = Table(title=f"Budget of {model}")
    table.add_column("limit", no_wrap=True)
    for column in ("allowed", "computed", "measured", "over by"):
        table.add_column(column, justify="right")
    table.add_column("")
    layers = [check for check in checks if check.limit.startswith(_LAYERS)]
    if layers and all(check.state == "kept" for check in layers):
        table.add_row(f"{_LAYERS}* ({len(layers)} layers)", "", "", "", "", "kept")
        checks = [check for check in checks if check not in layers]
    for check in checks:
        broken = check.state == "over"
        table.add_row(
            escape(check.limit),
            ("at least " if check.least else "") + _text(check.allowed),
            _text(check.computed),
            _text(check.measured),
            (escape(", ".join(check.beyond)) or _text(check.over)) if broken else "",
            "[red]OVER[/red]" if broken else check.state,
        )
    console.print(table)
    unknown = sum(check.state == "not measured" for check in checks)
    if unknown:
        console.print(f"{unknown} limits can only be measured; --measure does.")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{len(value)} facts"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
