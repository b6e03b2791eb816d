"""``pi-bench regress``: two results, the second against the first."""

from __future__ import annotations

from pathlib import Path

import click

from .. import common


@click.command()
@click.argument("before", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--threshold", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="Growth that still counts as none.",
)  # fmt: skip
@common.output_options
def regress(before: Path, after: Path, threshold: float, format_: str, output: Path | None) -> None:
    """Compare two results of one measurement on like machines: is the second worse?

    A slowdown counts if it is larger than the threshold and significant (permutation test on
    the raw values, 1 %); bytes and round trips are exact. Exit code 3 if anything is worse.

    \b
    Example:
      pi-bench run --repeat 30 --format json --output before.json
      pi-bench run --repeat 30 --format json --output after.json
      pi-bench regress before.json after.json
    """
    from dataclasses import asdict

    from ...bench.regress import compare as compare_results
    from ...bench.regress import print_changes, read
    from ...errors import BudgetError

    common.check_output(output)
    changes = compare_results(read(before), read(after), threshold=threshold)
    rows = [asdict(change) for change in changes]
    common.emit(
        rows,
        format_=format_,
        output=output,
        table=lambda console: print_changes(console, changes),
        rows=lambda: rows,
    )
    worse = [change for change in changes if change.worse]
    if worse:
        raise BudgetError(
            "worse than before: "
            + ", ".join(f"{change.figure} x {change.ratio:.2f}" for change in worse)
        )
