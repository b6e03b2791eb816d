"""Print the tables of ``benchmarks/README.md`` from result files, as Markdown.

python benchmarks/tables.py benchmarks/results/run-*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "model",
    "backend",
    "ReLUs",
    "online ms, median (min)",
    "offline ms",
    "online MB",
    "of it ReLU",
    "offline MB",
    "round trips",
    "plaintext ms",
    "agreement",
    "max logit error",
)


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one result of ``pi-bench run``."""
    online, offline, accuracy = result["online"], result["offline"], result["accuracy"]
    model, latency = result["model"], online["latency_ms"]
    batch = f" x{result['batch_size']}" if result["batch_size"] > 1 else ""
    return (
        f"{model['name']}{batch}",
        result["backend"],
        f"{model['relu_kept']:,}",
        f"{latency['median']:,.1f} ({latency['min']:,.1f})",
        f"{offline['latency_ms']['median']:,.0f}",
        f"{sum(online['bytes'].values()) / 1e6:,.2f}",
        f"{online['relu_bytes'] / 1e6:,.2f}",
        f"{sum(offline['bytes'].values()) / 1e6:,.2f}",
        f"{online['round_trips']:g}",
        f"{result['plaintext']['latency_ms']['median']:,.1f}",
        f"{accuracy['argmax_agreement']:.1%} of {accuracy['answers']}",
        f"{accuracy['max_abs_error']:.4f}",
    )


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one line per result."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row(result) for result in results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
