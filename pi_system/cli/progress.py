"""Progress on stderr, nothing when that is no terminal.

It is drawn only when a step begins, never in between, so that it takes no time from what is
being measured.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self


class Progress:
    """Called with what runs next, the steps done and their number."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=None)

    def __call__(self, text: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=text, completed=done, total=total, refresh=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
