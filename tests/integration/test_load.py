"""A small load: the command that makes the committed tables, and its judgement."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "load.py"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_clients_that_come_and_go_get_right_answers_or_named_errors(
    parties: Callable[[], dict[str, int]], toy_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "load.json"
    done = subprocess.run(
        [
            *(sys.executable, str(FILE), "--model", str(toy_model), "--clients", "3"),
            *("--inferences", "6", "--disconnect", "0.3", "--store", "--output", str(output)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(output.read_text())["runs"]
    assert run["answers"] == run["asked"] == 18 and run["wrong"] == run["reused"] == 0
    assert run["disconnects"] > 0 and run["sessions"] > 3
    assert run["one_time_values"] >= 3 * 18  # a seed, an id and a masked image for each
    assert "| dealer |" in done.stdout


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ""),
        ({"wrong": 1}, "1 wrong"),
        ({"answers": 9}, "9 of 10 answers"),
        ({"reused": 2}, "2 values reused"),
        ({"unnamed": ["client 0: KeyError"]}, "KeyError"),
        ({"exit_code": 143}, "the server ended with 143"),
        ({"growth": 0.2}, "memory grew"),
        ({"peak_growth": 0.2}, "memory grew"),
    ],
)
def test_what_does_not_hold_is_found(load: ModuleType, change: dict[str, Any], found: str) -> None:
    row = {"answers": 10, "asked": 10, "wrong": 0, "reused": 0, "unnamed": []}
    sizes = {name: change.pop(name, 0) for name in ("growth", "peak_growth")}
    facts = {"exit_code": change.pop("exit_code", 0), "memory": sizes}
    result = {"runs": [{**row, **change}], "parties": {"server": facts}, "judge_memory": True}
    assert found in " ".join(load.bad(result))
    assert bool(load.bad(result)) == bool(found)


def test_growth_is_what_comes_after_the_warm_up(load: ModuleType) -> None:
    grown = [(float(at), 10**6 * (50 + at)) for at in range(100)]
    assert load.memory(grown)["growth"] == pytest.approx(139.5 / 79.5 - 1, abs=0.02)
    spike = [(float(at), 10**6 * (min(50 + at, 60) + 90 * (at == 70))) for at in range(100)]
    assert load.memory(spike)["growth"] == 0 and load.memory(spike)["most"] == 150
    assert load.memory(spike)["peak_growth"] == 1.5
    assert load.memory(grown)["slope"] == pytest.approx(79 / 79.5, abs=0.02)
    assert len(load.memory(grown)["raw"]) == 50
