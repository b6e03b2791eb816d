"""What all commands share: exit codes, one-line errors, ``--format`` and ``--output``.

Only click is imported here, so that ``--help`` is quick; commands import what they need.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from ..errors import FULL, PiError, UsageError, reason

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

FORMATS: Final = ("table", "json", "csv")
EXIT_CODES: Final = """\b
Exit codes: 0 ok, 1 failure, 2 usage, 3 a budget or regression broken,
4 parity with plaintext broken, 5 peer lost or timed out, 6 refused.
--traceback, anywhere on the line, shows where an error came from."""


def run(command: click.Command, argv: Sequence[str] | None = None) -> int:
    """Run a command; every failure is one line on stderr and the exit code of its class."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in args
    if traceback:
        args.remove("--traceback")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = command.main(args=args, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BaseException as error:
        if traceback and not isinstance(error, click.exceptions.Exit):
            import traceback as module

            module.print_exc()
        return _report(error)


def _report(error: BaseException) -> int:
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case SystemExit():
            return error.code if isinstance(error.code, int) else 1
        case click.UsageError():
            error.show()
            return 2
        case click.ClickException():
            _line(f"error: {error.format_message()}")
            return 2
        case PiError():
            _line(f"error: {error}")
            return error.exit_code
        case KeyboardInterrupt() | click.Abort():
            _line("interrupted")
            return 130
        case BrokenPipeError():
            # The reader of stdout has gone; keep the interpreter from complaining at exit.
            _drop_stdout()
            return 1
        case OSError() if error.errno in FULL:
            _drop_stdout()
            _line(f"error: cannot write {error.filename or 'the output'}: {reason(error)}")
            return 1
        case _:
            _line(f"error: unexpected {type(error).__name__}: {error} (--traceback shows where)")
            return 1


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _line(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwind as for Ctrl-C, so that children and files are cleaned up."""
    raise SystemExit(128 + number)


def plan_option(function: F) -> F:
    """``--plan``: the server's precision."""
    return click.option(
        "--plan",
        type=click.Choice(["default", "high"]),
        default="default",
        show_default=True,
        help="fss: the server's fixed-point precision.",
    )(function)


def output_options(function: F) -> F:
    """``--format table|json|csv`` and ``--output FILE``."""
    function = click.option(
        "--output",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        help="Write the data to this file instead of stdout.",
    )(function)
    return click.option(
        "--format",
        "format_",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="Shape of the data on stdout.",
    )(function)


def check_output(output: Path | None) -> None:
    """Fail before a long computation rather than after it.

    Raises:
        UsageError: the folder of ``output`` does not exist.
    """
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"cannot write {output}: there is no folder {output.parent}")


def emit(
    value: Any,
    *,
    format_: str,
    output: Path | None,
    table: Callable[[Console], None],
    rows: Callable[[], Iterable[Mapping[str, Any]]],
) -> None:
    """Write data in the format asked for, to ``output`` or stdout.

    Args:
        value: the JSON-able whole.
        table: prints the table for people on a console.
        rows: the data as flat records, for csv.
    """
    text = {
        "json": lambda: json.dumps(value, indent=2, allow_nan=False) + "\n",
        "csv": lambda: _csv(list(rows())),
        "table": lambda: _table(table, sys.stdout if output is None else None),
    }[format_]()
    write(text, output)


def write(text: str, output: Path | None) -> None:
    """Write data to ``output`` or stdout.

    Raises:
        UsageError: it cannot be written there.
        PiError: the disk is full; nothing half written is left.
    """
    if output is None:
        sys.stdout.write(text)
        return
    try:
        file = output.open("w")
    except OSError as error:
        kind = PiError if error.errno in FULL else UsageError
        raise kind(f"cannot write {output}: {reason(error)}") from error
    try:
        with file:
            file.write(text)
    except OSError as error:
        if output.is_file() and not output.is_symlink():
            output.unlink(missing_ok=True)
        raise PiError(f"cannot write {output}: {reason(error)}") from error


def _csv(rows: list[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _table(table: Callable[[Console], None], stream: Any) -> str:
    from rich.console import Console

    terminal = stream is not None and stream.isatty()
    buffer = io.StringIO()
    console = Console(
        file=buffer, force_terminal=terminal, width=None if terminal else 100, highlight=False
    )
    table(console)
    return buffer.getvalue()
