"""The page of a report, and the PNG and CSV files beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...errors import UsageError
from ...files import write_atomic
from . import charts, sections, sources
from .sections import Cell, Column, Part, Table

_SHORT: Final = 40
_WORD: Final = 64
_MANY: Final = 8
"""A table of more columns is put below its chart."""


@dataclass(frozen=True)
class Asset:
    """A file beside the page."""

    name: str
    data: bytes


def render(material: sources.Material, title: str) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    environment.filters["classes"] = _classes
    environment.filters["drawing"] = _drawing
    found = sections.build(material)
    return environment.get_template("page.html").render(
        title=sources.clean(title),
        sections=found,
        summary=_summary(material),
        warned=sum(bool(run.warnings) for run in material.runs),
        measured=len(material.runs),
        many=_MANY,
        series=charts.COLOURS,
    )


def assets(material: sources.Material) -> Iterator[Asset]:
    """A CSV file for each table and a PNG file for each chart."""
    for section in sections.build(material):
        for part in section.parts:
            yield Asset(f"{part.key}.csv", _csv(part.table).encode())
            if part.chart is not None:
                yield Asset(f"{part.key}.png", charts.png(part.chart))


def write(paths: Iterable[Path], output: Path, folder: Path, title: str) -> list[Path]:
    """Make a report.

    Args:
        folder: for PNG and CSV files; made if it is not there.

    Returns:
        the files written, the page first.

    Raises:
        UsageError: a file that is no result, or a place that cannot be written.
    """
    material = sources.read(paths)
    page = render(material, title)
    written = [output]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for asset in assets(material):
            written.append(folder / asset.name)
            write_atomic(written[-1], asset.data)
        write_atomic(output, page.encode())
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or output}: {error.strerror}") from error
    return written


def cell(value: Cell, column: Column) -> str:
    """A cell as people read it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if column.digits is None:
        return f"{value:g}"
    text = f"{value:,.{column.digits}f}"
    if value and not text.strip("0.,"):
        text = f"{value:.2g}"
    return text


def _classes(table: Table) -> list[str]:
    """Of each column: numbers, texts that stay on one line, and other texts."""
    return [
        "number"
        if column.digits is not None
        else "short"
        if all(_fits(str(row[place])) for row in table.rows)
        else "text"
        for place, column in enumerate(table.columns)
    ]


def _fits(text: str) -> bool:
    return len(text) <= _SHORT or (" " not in text and len(text) <= _WORD)


def _drawing(part: Part) -> Markup:
    assert part.chart is not None
    return Markup(charts.svg(part.chart, part.key.replace("-", "")))


def _summary(material: sources.Material) -> list[tuple[str, str]]:
    runs = material.runs
    facts = [
        ("Files", f"{len(material.files)}"),
        ("Measurements", f"{len(runs)}"),
    ]
    for name, values in (
        ("Models", [run.model for run in runs]),
        ("Backends", [run.backend for run in runs]),
        ("Networks", [run.network for run in runs]),
        ("Processors", [dict(run.environment).get("cpu", "unknown") for run in runs]),
    ):
        if values:
            once = list(dict.fromkeys(values))
            more = f" and {len(once) - 6} more" if len(once) > 6 else ""
            facts.append((name, ", ".join(once[:6]) + more))
    if material.students:
        facts.append(("Students", f"{len(material.students)}"))
    return facts


def _csv(table: Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.title for column in table.columns])
    writer.writerows([_plain(value) for value in row] for row in table.rows)
    return buffer.getvalue()


def _plain(value: Cell) -> Cell:
    """A text that a spreadsheet would take for a formula is quoted."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return f"'{value}"
    return value
