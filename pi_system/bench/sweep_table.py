"""The rows of a sweep for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .sheet import plan_of
from .table import size


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row; what is the same in all is said above.

    Args:
        rows: of :meth:`Sheet.tidy_rows`; cells may be text.
    """
    parameters = {
        column: [str(row[key]) for row in rows]
        for column, key in (
            ("backend", "backend"),
            ("network", "network.name"),
            ("batch", "batch_size"),
            ("threads", "threads_per_party"),
        )
    }
    plans = [plan_of(row) for row in rows]
    if set(plans) != {"default"}:
        parameters["plan"] = plans
    same = {name: cells[0] for name, cells in parameters.items() if len(set(cells)) == 1}
    varying = [name for name in parameters if name not in same]
    said = "".join(f", {name} {cell}" for name, cell in same.items())
    table = Table(title=f"{len(rows)} rows{said}")
    table.add_column("model", overflow="fold")
    for column in (*varying, "ReLUs", "online ms", "min", "x plain", "online", "trips"):
        table.add_column(column, justify="right")
    for index, row in enumerate(rows):
        online = float(row["online.latency_ms.median"])
        directions = ("client_to_server", "server_to_client")
        table.add_row(
            str(row["model.name"]),
            *(parameters[name][index] for name in varying),
            f"{int(row['model.relu_kept']):,}",
            f"{online:,.1f}",
            f"{float(row['online.latency_ms.min']):,.1f}",
            f"{online / float(row['plaintext.latency_ms.median']):.3g}",
            size(sum(int(row[f"online.bytes.{direction}"]) for direction in directions)),
            f"{float(row['online.round_trips']):g}",
        )
    console.print(table)
