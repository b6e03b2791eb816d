"""Pictures of the stages' outputs; matplotlib is the ``report`` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pi_system.errors import UsageError
from pi_system.nn import relu_sites

from .senet import Result
from .sensitivity import PUBLISHED_RESNET18


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure without a window, and its axes.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'pi-system[report]'") from error
    # The same figures give the same SVG file.
    matplotlib.rcParams["svg.hashsalt"] = "pi-system"
    chart = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(chart)
    return chart, chart.subplots(rows, columns)


def sensitivity(document: dict[str, Any], path: Path) -> None:
    """Max-normalised ``eta_alpha`` against relative depth, beside ResNet-18's published one."""
    chart, axes = figure(7, 4)
    eta = [layer["eta_alpha"] for layer in document["layers"]]
    top = max(eta) or 1.0
    axes.plot(_depths(len(eta)), [e / top for e in eta], "o-", label="measured here")
    published = list(PUBLISHED_RESNET18)
    axes.plot(_depths(len(published)), published, "s--", label="published, ResNet-18")
    axes.set_xlabel("depth of the ReLU layer, stem 0, last 1")
    axes.set_ylabel("eta_alpha, largest 1")
    axes.legend()
    chart.savefig(path)


def budgets(document: dict[str, Any], path: Path) -> None:
    """A bar per layer: the ReLUs it keeps within those it has."""
    chart, axes = figure(8, 4)
    layers = document["layers"]
    places = range(len(layers))
    axes.bar(places, [layer["total"] for layer in layers], color="lightgrey", label="all")
    kept = axes.bar(places, [layer["relus"] for layer in layers], label="kept")
    axes.bar_label(kept, fontsize=7)
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xticks(places, [layer["site"] for layer in layers], rotation=60, ha="right")
    axes.set_ylabel("ReLUs")
    axes.legend()
    chart.savefig(path)


def hamming(distances: Sequence[float], path: Path) -> None:
    """Hamming distance between the masks of successive epochs, over all positions."""
    chart, axes = figure(6, 4)
    axes.plot(range(1, len(distances) + 1), distances, "o-")
    axes.set_xlabel("epoch of the search")
    axes.set_ylabel("normalised Hamming distance")
    axes.set_ylim(bottom=0)
    chart.savefig(path)


def masks(model: nn.Module, path: Path) -> None:
    """A heat map per layer: the part of the channels that keep their ReLU at each pixel."""
    sites = [(name, site) for name, site in relu_sites(model).items() if site.mask.dim() == 3]
    columns = min(5, len(sites)) or 1
    rows = -(-len(sites) // columns) or 1
    chart, axes = figure(2.2 * columns, 2.4 * rows, rows, columns)
    cells = [axes] if rows * columns == 1 else list(axes.flat)
    for cell in cells:
        cell.axis("off")
    for cell, (name, site) in zip(cells, sites, strict=False):
        image = cell.imshow(site.mask.float().mean(0).numpy(), vmin=0, vmax=1, cmap="viridis")
        cell.set_title(f"{name}\n{site.kept:,} of {site.total:,}", fontsize=7)
    if sites:
        chart.colorbar(image, ax=axes, shrink=0.6)
    chart.savefig(path)


def widths(rows: Sequence[Result], path: Path) -> None:
    """Accuracy of each width's student against its ReLUs and its multiply-accumulates."""
    chart, axes = figure(8, 4, 1, 2)
    split = "validation" if any(row.test_accuracy is None for row in rows) else "test"
    heights = [100 * (getattr(row, f"{split}_accuracy") or 0) for row in rows]
    sides = (("ReLUs kept", "relu_kept"), ("multiply-accumulates", "macs"))
    for side, (label, name) in zip(axes, sides, strict=True):
        places = [getattr(row, name) for row in rows]
        side.plot(places, heights, "o-")
        for row, x, y in zip(rows, places, heights, strict=True):
            side.annotate(row.model, (x, y), textcoords="offset points", xytext=(4, -10))
        side.set_xlabel(label)
    axes[0].set_ylabel(f"{split} accuracy, %")
    chart.savefig(path)


def _depths(count: int) -> list[float]:
    return [i / max(count - 1, 1) for i in range(count)]
