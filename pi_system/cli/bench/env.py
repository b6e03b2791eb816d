"""``pi-bench env``: this machine and its software."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import common


@click.command()
@common.output_options
def env(format_: str, output: Path | None) -> None:
    """Describe this machine and the software, as results record it.

    \b
    Example:
      pi-bench env --format json
    """
    from ...bench.environment import describe
    from ...bench.schema import flatten

    common.check_output(output)
    value = describe()

    def table(console: Any) -> None:
        for key, item in value.items():
            for name, text in (flatten(item, key) or {key: " ".join(map(str, item))}).items():
                console.print(f"{name:<32} {'-' if text is None else text}", markup=False)

    common.emit(value, format_=format_, output=output, table=table, rows=lambda: [flatten(value)])
