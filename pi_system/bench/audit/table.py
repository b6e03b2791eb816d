"""An audit for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...backends.fss.transcript import LEARNS
from .proof import Trial
from .report import LEVEL, Report, Row
from .sabotage import SABOTAGES

_LISTED = 10


def print_report(console: Console, report: Report) -> None:
    """Kinds of messages, reuse, what each party learns, and the verdict."""
    title = (
        f"{report.model['name']}, {report.backend}, plan {report.plan}: "
        f"{report.inferences} inferences of batch {report.batch_size}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("message", "field"):
        table.add_column(column)
    for column in ("layers", "values", "bits"):
        table.add_column(column, justify="right")
    table.add_column("covered by")
    table.add_column("least p", justify="right")
    documents: dict[str, int] = {}
    phase = named = ""
    for rows in _kinds(report.rows):
        first = rows[0]
        if not first.bits:
            documents[first.kind] = documents.get(first.kind, 0) + first.frames
            continue
        if first.phase != phase:
            phase = first.phase
            named = ""
            table.add_row(f"[bold]{phase}[/bold]")
        message = f"{first.kind}, {first.sender} > {first.receiver}"
        tested = [row.worst[1] for row in rows if row.p]
        table.add_row(
            "" if named == message else message,
            escape(_base(first)),
            str(len(rows)),
            f"{sum(row.values for row in rows):,}",
            _range([row.bits for row in rows]),
            first.cover.partition(":")[0] or "public",
            f"{min(tested):.1e}" if tested else "",
        )
        named = message
    console.print(table)
    listed = ", ".join(f"{kind} {count}" for kind, count in documents.items())
    console.print(f"Public documents beside these, and how many: {listed}.")
    for what, count in report.reuse.items():
        console.print(f"{what}: {count['seen']} seen, {count['different']} different")
    console.print(
        f"{report.clear['frames searched']} messages searched for the image and the first layer's "
        f"weights in clear: found in {report.clear['found']}"
    )
    for role, facts in LEARNS.items():
        console.print(f"The {role} learns: {'; '.join(facts.values())}.")
    if report.sabotage is not None:
        console.print(f"Sabotage in this run: {SABOTAGES[report.sabotage].does}.")
    verdict = "no finding" if report.passed else f"{len(report.findings)} findings"
    console.print(
        f"{report.tests} tests at {report.threshold:.1e} each ({LEVEL:g} together), smallest p "
        f"{report.smallest_p:.1e}, {report.retries} retries, {report.seconds:.1f} s: {verdict}"
    )
    for finding in report.findings[:_LISTED]:
        console.print(f"  {escape(str(finding))}")
    if len(report.findings) > _LISTED:
        console.print(f"  and {len(report.findings) - _LISTED} more")


def print_trials(console: Console, trials: Sequence[Trial]) -> None:
    """What was done, and how often the audit was right about it."""
    table = Table(title="Audits that must pass, and that must fail")
    table.add_column("sabotage")
    table.add_column("what is done")
    for column in ("right", "s, median"):
        table.add_column(column, justify="right")
    for trial in trials:
        table.add_row(
            trial.sabotage or "none",
            trial.does,
            f"{trial.right} of {trial.rounds}",
            f"{trial.median_seconds:.1f}",
        )
    console.print(table)


def _kinds(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one kind of message and field, whatever their layer, in order of appearance."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = row.phase, row.kind, row.sender, row.receiver, _base(row)
        kinds.setdefault(key, []).append(row)
    return list(kinds.values())


def _base(row: Row) -> str:
    """A field's name without that of its layer."""
    name, _, layer = row.field.partition(" ")
    return name if layer and row.kind in ("opening", "bits", "closing") else row.field


def _range(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low}-{high}"
