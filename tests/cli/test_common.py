"""Errors as one line and an exit code; formats and outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from rich.console import Console

from pi_system import errors
from pi_system.cli import common


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def failing(error: BaseException) -> click.Command:
    @click.command()
    @click.option("--number", type=int)
    def command(number: int | None) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.PiError("broken"), 1, "error: broken"),
        (errors.UsageError("no file\nx"), 2, "error: no file x"),
        (errors.BudgetError("over"), 3, "error: over"),
        (errors.ParityError("far"), 4, "error: far"),
        (errors.PeerError("lost"), 5, "error: lost"),
        (errors.PeerTimeout("late"), 5, "error: late"),
        (errors.RefusedError("no"), 6, "error: no"),
        (errors.IntegrityError("bad"), 6, "error: bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
        (ZeroDivisionError("x"), 1, "error: unexpected ZeroDivisionError: x (--traceback shows"),
    ],
)
def test_a_failure_is_one_line_and_the_code_of_its_class(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert common.run(failing(error), []) == code
    out, err = capsys.readouterr()
    assert out == "" and err.strip().startswith(line) and err.strip().count("\n") == 0


def test_wrong_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run(failing(ValueError()), ["--number", "x"]) == 2
    assert "Invalid value for '--number'" in capsys.readouterr().err
    assert common.run(failing(ValueError()), ["--help"]) == 0


def test_traceback_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run(failing(errors.UsageError("x")), ["--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def emit(format_: str, output: Path | None) -> None:
    rows = [{"a": 1, "b": "x,y"}, {"a": 2, "c": None}]

    def table(console: Console) -> None:
        console.print("a table")

    common.emit({"rows": rows}, format_=format_, output=output, table=table, rows=lambda: rows)


def test_data_go_to_stdout_or_a_file_in_the_format_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = {"table": "a table\n", "csv": 'a,b,c\n1,"x,y",\n2,,\n'}
    for format_, text in texts.items():
        emit(format_, None)
        assert capsys.readouterr() == (text, "")
        emit(format_, tmp_path / format_)
        assert (tmp_path / format_).read_text() == text and capsys.readouterr() == ("", "")
    emit("json", None)
    assert json.loads(capsys.readouterr().out)["rows"][0]["a"] == 1


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="there is no folder"):
        common.check_output(tmp_path / "none" / "x.json")
    with pytest.raises(errors.UsageError, match="cannot write"):
        emit("json", tmp_path)


def test_a_client_needs_no_torch(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    at = "'--server', '127.0.0.1:1', '--dealer', '127.0.0.1:1', '--timeout', '0.1'"
    program = (
        "import sys\nfrom pi_system.cli import common, party\n"
        f"code = common.run(party.cli, ['client', {at}, '--images', 'x.npy', "
        "'--backend', 'toy_backends:Plain', '--insecure'])\n"
        "assert code == 5 and 'torch' not in sys.modules and 'pi_system.models' in sys.modules"
    )
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.parametrize("command", ["bench", "party"])
def test_help_needs_neither_torch_nor_numpy(command: str) -> None:
    program = (
        f"import sys\nfrom pi_system.cli import common, {command}\n"
        f"code = common.run({command}.cli, ['--help'])\n"
        "heavy = {'torch', 'numpy', 'rich', 'pandas', 'crypten'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "Exit codes: 0 ok" in done.stdout
