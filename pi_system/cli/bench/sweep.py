"""``pi-bench sweep``: every combination that a TOML file lists."""

from __future__ import annotations

from pathlib import Path

import click

from .. import common
from . import options


@click.command()
@click.argument("scenario", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="The table: .csv, .parquet (needs pyarrow) or .json (raw values and layers too). "
    "Rows it has are not measured again.",
)  # fmt: skip
@common.plan_option
@options.timeout
@click.option(
    "--format", "format_", type=click.Choice(common.FORMATS), default="table", show_default=True,
    help="Shape in which the finished table is printed on stdout.",
)  # fmt: skip
def sweep(scenario: Path, output: Path, plan: str, timeout: float, format_: str) -> None:
    """Measure every combination that a TOML file lists, into one table.

    --plan is for grids without plans of their own.

    Each row is written as soon as it is measured; a sweep that was stopped goes on where it
    was when it is called again. A row that fails does not stop the others; the exit code is
    its own then.

    \b
    Example:
      pi-bench sweep benchmarks/scenarios/relus.toml --output relus.csv
    """
    common.check_output(output)
    from ...bench.sheet import Sheet
    from ...bench.sweep import read_scenario
    from ...bench.sweep import sweep as run_sweep
    from ...bench.sweep_table import print_rows
    from ...parties.timeouts import Timeouts
    from ..progress import Progress

    cases = read_scenario(scenario, plan)
    sheet = Sheet(output)
    with Progress() as progress:
        outcome = run_sweep(cases, sheet, timeouts=Timeouts(step=timeout), progress=progress)
    rows = sheet.tidy_rows()
    common.emit(
        rows,
        format_=format_,
        output=None,
        table=lambda console: print_rows(console, rows),
        rows=lambda: rows,
    )
    click.echo(f"{outcome.measured} measured, {outcome.skipped} were there", err=True)
    for case, error in outcome.failures:
        click.echo(f"not measured: {case}: {error}", err=True)
    if outcome.failures:
        raise outcome.failures[0][1]
