"""A run that is killed anywhere goes on to the same bits; its files are bound to its recipe."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pi_system import checkpoint, nn
from pi_system.errors import IntegrityError, PiError, UsageError
from training import data, distill, recipe, senet, teacher
from training.loop import Reporter, Row, Run, derive_seed, stored_rows

EPOCHS = 8


class Stop(Exception):
    pass


class StopAfter(Reporter):
    """Stops a run like a kill would: after so many epochs, or inside the next one."""

    def __init__(self, epochs: int, *, inside: bool = False) -> None:
        self.left, self.inside = epochs, inside

    def epoch(self, row: Row) -> None:
        self.left -= 1
        if self.left == 0 and not self.inside:
            raise Stop

    def step(self, stage: str, fraction: float, loss: float) -> None:
        if self.left == 0 and self.inside:
            raise Stop


class Names(Reporter):
    """Which stages trained."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def epoch(self, row: Row) -> None:
        self.rows.append(row)


@pytest.fixture(scope="module")
def tiny(cifar10: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of all stages."""
    chosen = recipe.load(str(recipe_path))
    run = Run(tmp_path_factory.mktemp("runs") / "whole", chosen, data.load("cifar10", cifar10))
    senet.train(run)
    return run


def contents(directory: Path) -> dict[str, Any]:
    """Everything a run leaves but the seconds."""
    result: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                result[name] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        elif path.is_file():
            result[name] = path.read_text()
    result["metrics.jsonl"] = [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in result["metrics.jsonl"].splitlines()
    ]
    return result


def assert_same(ours: Path, theirs: Path) -> None:
    left, right = contents(ours), contents(theirs)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if name.endswith(".safetensors"):
            assert value.keys() == right[name].keys()
            for key, tensor in value.items():
                assert torch.equal(tensor, right[name][key]), f"{name}: {key}"
        else:
            assert value == right[name], name


def test_the_whole_run(tiny: Run) -> None:
    rows = stored_rows(tiny.directory)
    assert [row.stage for row in rows] == [s for s in recipe.STAGES for _ in range(2)]
    assert len(rows) == EPOCHS
    assert all(row.validation_accuracy is not None for row in rows)
    assert [row.hamming is not None for row in rows] == [False] * 4 + [True] * 2 + [False] * 2

    student, manifest = checkpoint.load(tiny.directory / "student")
    assert nn.count_relus(student).kept == manifest.relu_kept == tiny.recipe.relu_budget
    assert manifest.test_accuracy is not None
    full, manifest = checkpoint.load(tiny.directory / "teacher")
    assert nn.count_relus(full).kept == nn.count_relus(full).total == manifest.relu_budget
    assert manifest.test_accuracy is not None

    allocation = json.loads((tiny.directory / "allocation.json").read_text())
    kept = {layer.name: layer.kept for layer in nn.count_relus(student).layers}
    assert kept == {layer["site"]: layer["relus"] for layer in allocation["layers"]}


def test_no_file_names_the_machine(tiny: Run, cifar10: Path) -> None:
    for path in tiny.directory.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert str(tiny.directory).encode() not in raw
            assert str(cifar10).encode() not in raw


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("epochs", [1, 3, 5, 7])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny: Run, tmp_path: Path, epochs: int, inside: bool
) -> None:
    stopped = dataclasses.replace(
        tiny, directory=tmp_path / "run", reporter=StopAfter(epochs, inside=inside)
    )
    with pytest.raises(Stop):
        senet.train(stopped)
    assert len(stored_rows(stopped.directory)) == epochs
    seen = Names()
    senet.train(dataclasses.replace(stopped, reporter=seen))
    assert len(seen.rows) == EPOCHS - epochs, "finished epochs are not repeated"
    assert_same(stopped.directory, tiny.directory)


def test_a_killed_process_goes_on_to_the_same_bits(
    tiny: Run, cifar10: Path, recipe_path: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "training.cli", "senet", "--format", "json"]
    command += ["--recipe", str(recipe_path), "--data", str(cifar10), "--run", str(directory)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    state = directory / "teacher.state.safetensors"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (directory / "finetune.json").exists()
    senet.train(dataclasses.replace(tiny, directory=directory))
    for path in directory.glob(".*.tmp"):
        path.unlink()
    assert_same(directory, tiny.directory)


def test_a_finished_run_does_nothing(tiny: Run) -> None:
    before = contents(tiny.directory)["metrics.jsonl"]
    seen = Names()
    senet.train(dataclasses.replace(tiny, reporter=seen))
    assert not seen.rows
    assert contents(tiny.directory)["metrics.jsonl"] == before


def test_another_recipe_is_refused(tiny: Run) -> None:
    other = dataclasses.replace(tiny.recipe, seed=tiny.recipe.seed + 1)
    with pytest.raises(UsageError, match="different recipe"):
        teacher.train(dataclasses.replace(tiny, recipe=other))
    finetune = dataclasses.replace(tiny.recipe.finetune, pram=1.0)
    other = dataclasses.replace(tiny.recipe, finetune=finetune)
    with pytest.raises(UsageError, match=r"finetune.*different recipe"):
        senet.train(dataclasses.replace(tiny, recipe=other))


def test_a_corrupt_state_is_refused(tiny: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(tiny, directory=tmp_path / "run")
    run.directory.mkdir()
    raw = (tiny.directory / "teacher.state.safetensors").read_bytes()
    (run.directory / "teacher.state.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(IntegrityError, match="corrupt"):
        teacher.train(run)


def test_a_budget_over_the_total_is_refused_before_training(tiny: Run, tmp_path: Path) -> None:
    large = dataclasses.replace(tiny.recipe, relu_budget=10**9)
    run = dataclasses.replace(tiny, directory=tmp_path / "run", recipe=large)
    with pytest.raises(UsageError, match="over the network's"):
        senet.train(run)
    assert not run.directory.exists()


def test_a_batch_larger_than_the_data_is_refused(tiny: Run, tmp_path: Path) -> None:
    large = dataclasses.replace(tiny.recipe, batch=1000)
    with pytest.raises(UsageError, match="batch"):
        teacher.train(dataclasses.replace(tiny, directory=tmp_path, recipe=large))


def test_a_diverging_loss_is_an_error(tiny: Run, tmp_path: Path) -> None:
    schedule = recipe.Schedule("constant", 1e30)
    sgd = dataclasses.replace(tiny.recipe.teacher.optimizer, schedule=schedule)
    wild = dataclasses.replace(
        tiny.recipe, teacher=dataclasses.replace(tiny.recipe.teacher, optimizer=sgd)
    )
    with pytest.raises(PiError, match="loss is"):
        teacher.train(dataclasses.replace(tiny, directory=tmp_path, recipe=wild))


@pytest.mark.parametrize("budget", [0, 777])
def test_channel_masks_stay_within_the_budget(tiny: Run, tmp_path: Path, budget: int) -> None:
    masks = dataclasses.replace(tiny.recipe.masks, granularity="channel")
    chosen = dataclasses.replace(tiny.recipe, masks=masks, relu_budget=budget)
    run = dataclasses.replace(tiny, directory=tmp_path, recipe=chosen)
    senet.train(run)
    model, _ = checkpoint.load(tmp_path / distill.FOLDER)
    assert nn.count_relus(model).kept <= budget
    for site in nn.relu_sites(model).values():
        channels = site.mask.flatten(1)
        assert torch.equal(channels.any(1), channels.all(1))


def test_seeds_depend_on_all_three() -> None:
    seeds = {derive_seed(s, n, e) for s in (0, 1) for n in ("teacher", "masks") for e in (0, 1)}
    assert len(seeds) == 8
    assert derive_seed(0, "masks", 1) == derive_seed(0, "masks", 1)
