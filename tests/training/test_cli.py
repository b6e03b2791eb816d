"""``pi-train`` through click's runner: formats, exit codes, one clear line on stderr."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from training.cli import cli


def invoke(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def finished(
    cifar10: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """(run directory, stdout, stderr) of a whole run as JSON."""
    directory = tmp_path_factory.mktemp("cli") / "run"
    code, out, err = invoke(
        "senet", "--recipe", recipe_path, "--data", cifar10, "--run", directory, "--format", "json"
    )
    assert code == 0, err
    return directory, out, err


def test_senet_prints_data_on_stdout_and_progress_on_stderr(
    finished: tuple[Path, str, str],
) -> None:
    _, out, err = finished
    teacher, student = json.loads(out)
    assert teacher["model"] == "teacher" and teacher["relu_kept"] == teacher["relu_total"]
    assert student["model"] == "student" and student["relu_kept"] == 3000
    assert 0 <= student["test_accuracy"] <= 1
    assert err.count("finetune 2/2") == 1 and "\x1b" not in err


def test_teacher_alone_leaves_the_test_split_alone(
    cifar10: Path, recipe_path: Path, tmp_path: Path
) -> None:
    code, out, err = invoke(
        "teacher", "--recipe", recipe_path, "--data", cifar10, "--run", tmp_path, "--format", "csv"
    )
    assert code == 0, err
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["model"] == "teacher" and row["test_accuracy"] == ""
    manifest = json.loads((tmp_path / "teacher" / "manifest.json").read_text())
    assert manifest["test_accuracy"] is None


def test_threads_take_the_place_of_the_recipes(
    cifar10: Path, recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    where = ("--recipe", recipe_path, "--data", cifar10, "--run", tmp_path, "--threads", 2)
    assert invoke("teacher", *where)[0] == 0
    assert asked[0] == 2


def test_evaluate_agrees_with_the_manifest(
    finished: tuple[Path, str, str], cifar10: Path, recipe_path: Path, tmp_path: Path
) -> None:
    student = finished[0] / "student"
    manifest = json.loads((student / "manifest.json").read_text())
    output = tmp_path / "figures.json"
    code, out, err = invoke(
        "evaluate", student, "--data", cifar10, "--format", "json", "--output", output
    )
    assert (code, out) == (0, ""), err
    (row,) = json.loads(output.read_text())
    assert row["accuracy"] == manifest["test_accuracy"]
    assert (row["images"], row["relu_kept"]) == (20, 3000)

    code, out, err = invoke(
        "evaluate", student, "--data", cifar10, "--split", "validation", "--recipe", recipe_path
    )
    assert code == 0, err
    assert f"{manifest['validation_accuracy']:.2%}" in out


def test_errors_are_one_line_with_their_exit_code(
    finished: tuple[Path, str, str], cifar10: Path, recipe_path: Path, tmp_path: Path
) -> None:
    data = ("--data", cifar10, "--run", tmp_path / "run")
    student = finished[0] / "student"
    for arguments, expected, word in [
        (("senet", "--recipe", "nothing", *data), 2, "bundled"),
        (("teacher", "--recipe", recipe_path, "--data", "/no", "--run", tmp_path), 2, "exist"),
        (("evaluate", tmp_path, "--data", cifar10), 2, "no checkpoint"),
        (("evaluate", student, "--data", tmp_path), 2, "official layout"),
        (("evaluate", student, "--data", cifar10, "--split", "validation"), 2, "--recipe"),
    ]:  # fmt: skip
        code, out, err = invoke(*arguments)
        assert (code, out) == (expected, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err

    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("manifest.json", "model.safetensors"):
        raw = (finished[0] / "student" / name).read_bytes()
        (broken / name).write_bytes(raw[:-1] if name.endswith("safetensors") else raw)
    code, _, err = invoke("evaluate", broken, "--data", cifar10)
    assert code == 6 and err.count("\n") == 1


def test_an_unknown_option_is_a_usage_error() -> None:
    assert invoke("teacher", "--nothing")[0] == 2
    assert invoke("senet")[0] == 2


@pytest.mark.parametrize("command", ["teacher", "senet", "evaluate"])
def test_help_has_an_example(command: str) -> None:
    code, out, _ = invoke(command, "--help")
    assert code == 0 and "Example:" in out and "pi-train" in out
