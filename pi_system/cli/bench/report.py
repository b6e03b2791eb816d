"""``pi-bench report``: result files as one page."""

from __future__ import annotations

from pathlib import Path

import click

from .. import common


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="The HTML page.",
)  # fmt: skip
@click.option(
    "--assets", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where the same charts go as PNG and the tables as CSV. "
    "[default: beside the page, its name with -files behind]",
)  # fmt: skip
@click.option("--title", default="Private inference, measured", show_default=True)
@click.option(
    "--format", "format_", type=click.Choice(common.FORMATS), default="table", show_default=True,
    help="Shape of the list of written files on stdout.",
)  # fmt: skip
def report(
    results: tuple[Path, ...], output: Path, assets: Path | None, title: str, format_: str
) -> None:
    """Make one HTML page of result files: it needs no network and no script.

    RESULTS are files of pi-bench run, compare (JSON) and sweep (JSON, CSV, Parquet), and of
    pi-train sweep; of a folder, all JSON files in it that are results. Charts need the extra
    "report" (matplotlib, jinja2).

    \b
    Example:
      pi-bench report benchmarks/results/run-*.json benchmarks/results/senet --output report.html
    """
    common.check_output(output)
    from ...errors import UsageError

    try:
        from ...bench.report import page
    except ModuleNotFoundError as error:
        raise UsageError(
            f"a report needs {error.name}, not installed: pip install 'pi-system[report]'"
        ) from error

    folder = assets or output.with_name(f"{output.stem}-files")
    written = page.write(results, output, folder, title)
    size = output.stat().st_size / 1e6
    rows = [{"file": str(path)} for path in written]
    common.emit(
        rows,
        format_=format_,
        output=None,
        table=lambda console: console.print(
            f"{output}: {size:.2f} MB; {len(rows) - 1} files in {folder}",
            markup=False,
            soft_wrap=True,
        ),
        rows=lambda: rows,
    )
