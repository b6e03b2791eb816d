"""Drawings of a report: SVG that takes its colours from the page, and PNG for elsewhere.

Matplotlib draws with stand-in colours; in the SVG they become ``currentColor`` and the page's
variables, so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import log10
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..table import significant

COLOURS: Final = (
    "#0b6fb8", "#d1560b", "#0c8f6b", "#b5479a", "#a87600", "#5b5fc7", "#8a5a44", "#8a949e",
)  # fmt: skip
"""Of series, on white; the last for what is muted. ``page.html`` has others for the dark."""

_INK: Final = "#1b1f24"
_GRID: Final = "#d5d9de"
_STAND_IN: Final = tuple(f"#fe00{number:02x}" for number in range(1, len(COLOURS) + 1))
_INK_STAND_IN: Final = "#fe00f0"
_GRID_STAND_IN: Final = "#fe00f1"
_MARKERS: Final = "osD^vPX*ph"
"""A number of them that shares no divisor with that of the colours: no pair comes twice soon."""
_WIDTH: Final = 3.9
"""Inches; a phone shows them in about 360 pixels, so that text of 9 points is 11 pixels high."""
_LABEL: Final = 46
_TICK: Final = 24
_TICKS: Final = 7
_LOG: Final = 5
"""Less than this between the least and the greatest value is drawn on a linear scale."""
_DECADES: Final = 300
"""More than this between them, and only powers of ten are marked."""
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "pi-bench",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Line:
    """Points of one series, joined in the order of ``x`` unless ``joined`` is false."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = True


@dataclass(frozen=True)
class Lines:
    """Series over ReLU counts.

    Attributes:
        levels: named horizontal lines.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    levels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, the first on top; each is a stack of one value per kind.

    Attributes:
        stacks: (kind, values), one value per label.
        muted: the kind that is drawn in grey.
    """

    title: str
    x_label: str
    labels: tuple[str, ...]
    stacks: tuple[tuple[str, tuple[float, ...]], ...]
    muted: str = ""


@dataclass(frozen=True)
class Dots:
    """Ratios, the first on top, on a scale without a zero.

    Attributes:
        values: the middle, the least and the greatest of each label.
    """

    title: str
    x_label: str
    labels: tuple[str, ...]
    values: tuple[tuple[float, float, float], ...]


Chart = Lines | Bars | Dots


def svg(chart: Chart, key: str) -> str:
    """An inline ``<svg>`` element.

    Args:
        key: of letters and digits; makes the ids in it unique on the page.
    """
    figure = _draw(chart, _INK_STAND_IN, _GRID_STAND_IN, _STAND_IN)
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _save(figure, "svg", metadata=none).decode()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[0-9. ]+"', head)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", body)
    for number, colour in enumerate(_STAND_IN, 1):
        body = body.replace(colour, f"var(--series-{number})")
    body = body.replace(_INK_STAND_IN, "currentColor").replace(_GRID_STAND_IN, "var(--rule)")
    label = escape(chart.title, quote=True)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} {box[0]} role="img" aria-label="{label}">{body}'


def png(chart: Chart) -> bytes:
    """The same on white."""
    return _save(_draw(chart, _INK, _GRID, COLOURS), "png", dpi=200, facecolor="white")


def _save(figure: Figure, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names from files may have characters that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=format_, **{"transparent": format_ == "svg", **options})
    return buffer.getvalue()


def _draw(chart: Chart, ink: str, grid: str, colours: Sequence[str]) -> Figure:
    style: dict[Any, Any] = {
        **_STYLE,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), ink),
        **dict.fromkeys(("xtick.color", "ytick.color"), ink),
        "grid.color": grid,
    }
    with matplotlib.rc_context(style):
        if isinstance(chart, Lines):
            return _lines(chart, ink, colours)
        if isinstance(chart, Dots):
            return _dots(chart, colours)
        return _bars(chart, colours)


def _lines(chart: Lines, ink: str, colours: Sequence[str]) -> Figure:
    rows = -(-len(chart.lines) // 2)
    figure = Figure(figsize=(_WIDTH, 3.0 + 0.2 * rows), layout="constrained")
    axes = figure.add_subplot()
    for number, line in enumerate(chart.lines):
        order = sorted(range(len(line.x)), key=lambda i, x=line.x: x[i])  # type: ignore[misc]
        axes.plot(
            [line.x[i] for i in order],
            [line.y[i] for i in order],
            color=colours[number % (len(colours) - 1)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.6,
            linestyle=("-" if number < len(colours) - 1 else "--") if line.joined else "",
            label=short(line.label),
        )
    for name, level in chart.levels:
        axes.axhline(level, color=ink, linewidth=1, linestyle=":")
        axes.annotate(
            short(name), (0, level), (2, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )  # fmt: skip
    values = [y for line in chart.lines for y in line.y]
    log_y = chart.log_y and min(values) > 0 and max(values) >= _LOG * min(values)
    if log_y:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, max(values) / min(values))
    else:
        axes.margins(y=0.1)
    if chart.log_x:
        axes.set_xscale("log")
        ticks = sorted({x for line in chart.lines for x in line.x})
        _log_ticks(axes.xaxis, ticks[-1] / ticks[0])
        apart = _apart(ticks)
        if len(apart) <= _TICKS:
            axes.set_xticks(apart)
            axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.yaxis.set_major_formatter(FuncFormatter(_count))
    axes.grid(True, axis="y", linewidth=0.7)
    axes.set_xlabel(short(chart.x_label))
    axes.set_title(short(chart.y_label), loc="left")
    if len(chart.lines) > 1 or chart.levels:
        _legend(figure, axes)
    return figure


def _bars(chart: Bars, colours: Sequence[str]) -> Figure:
    rows = max(1, len(chart.labels))
    height = 0.75 + 0.18 * rows + 0.2 * (-(-len(chart.stacks) // 2))
    figure = Figure(figsize=(_WIDTH, max(1.6, height)), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(rows))
    left = [0.0] * rows
    for number, (kind, values) in enumerate(chart.stacks):
        axes.barh(
            places, values, 0.72, left=left,
            color=colours[-1 if kind == chart.muted else number % (len(colours) - 1)],
            label=short(kind),
        )  # fmt: skip
        left = [a + b for a, b in zip(left, values, strict=True)]
    _rows(axes, chart.labels)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.grid(True, axis="x", linewidth=0.7)
    axes.set_xlabel(short(chart.x_label))
    if len(chart.stacks) > 1:
        _legend(figure, axes)
    return figure


def _dots(chart: Dots, colours: Sequence[str]) -> Figure:
    rows = len(chart.labels)
    figure = Figure(figsize=(_WIDTH, 0.75 + 0.24 * rows), layout="constrained")
    axes = figure.add_subplot()
    for place, (middle, low, high) in enumerate(chart.values):
        axes.plot([low, high], [place, place], color=colours[0], linewidth=1.6)
        axes.plot([middle], [place], color=colours[0], marker="o", markersize=5)
        axes.annotate(
            significant(middle), (high, place), (6, 0), textcoords="offset points", va="center"
        )
    least = min(low for _, low, _ in chart.values)
    greatest = max(high for *_, high in chart.values)
    if least > 0:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, greatest / least)
        # Room for the figure behind the last dot.
        axes.set_xlim(least / 1.3, greatest * max(1.5, (greatest / least) ** 0.25))
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    _rows(axes, chart.labels)
    axes.grid(True, axis="x", linewidth=0.7)
    axes.set_xlabel(short(chart.x_label))
    return figure


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [short(label, _TICK) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those whose labels do not touch on a logarithmic axis of all."""
    least = 10 ** (0.1 * log10(ticks[-1] / ticks[0]))
    found = [ticks[0]]
    for tick in ticks[1:]:
        if tick >= least * found[-1]:
            found.append(tick)
    return found


def _log_ticks(axis: Axis, span: float) -> None:
    """Marked at 1, 2 and 5 of each decade, or at 1 alone where there are many decades.

    Args:
        span: the greatest value over the least.
    """
    axis.set_major_locator(LogLocator(subs=(1,) if span > _DECADES else (1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(len(label) for label in labels)
    figure.legend(
        handles, labels, loc="outside lower left", ncols=1 if longest > 20 else 2,
        handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip


def short(label: str, most: int = _LABEL) -> str:
    """A label that fits; the table beside a chart has the whole of it."""
    return label if len(label) <= most else label[: most - 1] + "…"


def _count(value: float, place: object = None) -> str:
    """10000 as 10k, 20480 as 20.5k, 2500000 as 2.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
