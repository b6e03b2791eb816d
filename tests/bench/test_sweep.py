"""Sweeps: the grid, resuming after a kill, and files that are not whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest

from pi_system.bench import sweep as module
from pi_system.bench.schema import json_schema
from pi_system.bench.sheet import Key, Sheet, tidy
from pi_system.bench.sweep import Case, read_scenario, sweep
from pi_system.errors import IntegrityError, PeerError, PiError, UsageError

SCENARIOS = Path(__file__).resolve().parents[2] / "benchmarks" / "scenarios"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def scenario(path: Path, model: Path, *, backend: str = "Plain", batch: str = "1, 2") -> Path:
    return write(
        path / "scenario.toml",
        f'[[grid]]\nmodels = ["{model}"]\nbackends = ["toy_backends:{backend}"]\n'
        f"batch = [{batch}]\nrepeat = 2\nwarmup = 0\n",
    )


def test_a_grid_is_every_combination_once_model_by_model_and_grids_keep_their_order(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path / "x.toml",
        """
        [[grid]]
        models = ["random:resnet18", "demo"]
        relus = [0, "all"]
        batch = [1, 4]
        [[grid]]
        models = ["random:resnet18@0"]
        backends = ["fss", "crypten"]
        """,
    )
    cases = read_scenario(path)
    assert [(case.model, case.backend, case.batch) for case in cases] == [
        ("random:resnet18@0", "fss", 1),
        ("random:resnet18@0", "fss", 4),
        ("random:resnet18@all", "fss", 1),
        ("random:resnet18@all", "fss", 4),
        ("demo", "fss", 1),
        ("demo", "fss", 4),
        ("random:resnet18@0", "crypten", 1),
    ]
    assert cases[0] == Case("random:resnet18@0", "fss", "loopback", 1, 1, 20, 2)


def test_plans_are_of_the_grid_or_as_asked_for_and_of_fss_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.toml",
        """
        [[grid]]
        models = ["demo"]
        backends = ["fss", "crypten"]
        plans = ["default", "high"]
        [[grid]]
        models = ["demo-teacher"]
        backends = ["fss", "crypten"]
        """,
    )
    for asked, last in (("default", "default"), ("high", "high")):
        cases = read_scenario(path, asked)
        assert [(case.model, case.backend, case.plan) for case in cases] == [
            ("demo", "fss", "default"),
            ("demo", "fss", "high"),
            ("demo", "crypten", "default"),
            ("demo-teacher", "fss", last),
            ("demo-teacher", "crypten", "default"),
        ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing key 'grid'"),
        ("grid = []", "no [[grid]]"),
        ("[[grid]]\nmodel = 'demo'", "unknown key 'model'"),
        ("[[grid]]\nmodels = []", "grid 1: models is empty"),
        ("[[grid]]\nmodels = ['demo']\nbatch = [0]", "batch must be 1 or more"),
        ("[[grid]]\nmodels = ['demo']\nbatch = ['1']", "expected int, got '1'"),
        ("[[grid]]\nmodels = ['demo']\nrepeat = 0", "repeat must be 1 or more"),
        ("[[grid]]\nmodels = ['demo']\nbackends = ['fas']", "unknown backend 'fas'"),
        ("[[grid]]\nmodels = ['demo']\nnetworks = ['moon']", "no network 'moon'"),
        ("[[grid]]\nmodels = ['demo']\nrelus = [5]", "relus go with"),
        ("[[grid]]\nmodels = ['demo']\nplans = ['low']", "plans are default, high, not 'low'"),
        ("[[grid]]\nmodels = ['random:resnet18']", "needs relus"),
        ("[[grid]]\nmodels = ['random:resnet18']\nrelus = [-1]", 'or "all", not -1'),
        ("[[grid]]\nmodels = ['random:resnet18']\nrelus = ['most']", "not 'most'"),
        ("[[grid]]\nmodels = ['random:resnet18']\nrelus = [true]", "expected int"),
        ("[[grid]]\nmodels = ['random:resnet18']\nrelus = [0.5]", "expected int"),
    ],
)
def test_a_wrong_scenario_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "x.toml", text)
    with pytest.raises(UsageError) as error:
        read_scenario(path)
    assert words in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_scenarios_of_the_repository_are_right(path: Path) -> None:
    assert read_scenario(path)


def test_networks_have_every_cell_the_slowest_last() -> None:
    """Both backends and budgets over each network; what takes longest does not hold up the rest."""
    cases = read_scenario(SCENARIOS / "networks.toml")
    cells = [(case.model, case.backend, case.network) for case in cases]
    assert len(set(cells)) == len(cells) == 16
    slow = [case.network == "80:20" and case.backend == "crypten" for case in cases]
    assert slow == [False] * 14 + [True] * 2
    assert all(case.repeat <= 3 and case.warmup == 0 for case in cases[-2:])


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_row_is_what_a_single_run_would_say_and_is_measured_once(
    tmp_path: Path, toy_model: Path, parties: Callable[[], dict[str, int]], suffix: str
) -> None:
    cases = read_scenario(scenario(tmp_path, toy_model))
    path = tmp_path / f"out{suffix}"
    steps: list[tuple[str, int, int]] = []
    outcome = sweep(cases, Sheet(path), progress=lambda *step: steps.append(step))
    assert (outcome.measured, outcome.skipped, outcome.failures) == (2, 0, [])
    assert [(done, total) for _, done, total in steps] == [(0, 2), (1, 2)]

    if suffix == ".json":
        rows = json.loads(path.read_text())
        for row in rows:
            jsonschema.validate(row, json_schema())
        table = pd.DataFrame([tidy(row) for row in rows])
    else:
        table = pd.read_csv(path)
    assert list(table["batch_size"]) == [1, 2]
    assert list(table["accuracy.answers"]) == [2, 4]
    assert list(table["model.relu_kept"]) == [256, 256]
    for phase in ("plaintext", "offline", "online"):
        for _, row in table.iterrows():
            values = pd.Series(json.loads(row[f"{phase}.latency_ms.values"]))
            assert row[f"{phase}.latency_ms.median"] == pytest.approx(values.median(), abs=1e-3)
            assert row[f"{phase}.latency_ms.min"] == values.min()
    # Twice the images: twice the bytes but for framing and the toys' ReLUs.
    up = table["online.bytes.client_to_server"]
    assert up[1] - up[0] == 3 * 8 * 8 * 4

    before = path.read_bytes()
    again = sweep(cases, Sheet(path))
    assert (again.measured, again.skipped) == (0, 2) and path.read_bytes() == before


def test_a_killed_sweep_goes_on_where_it_was(
    tmp_path: Path, toy_model: Path, parties: Callable[[], dict[str, int]]
) -> None:
    path, output = scenario(tmp_path, toy_model, batch="1, 2, 3"), tmp_path / "out.csv"
    command = [sys.executable, "-m", "pi_system.cli.bench", "sweep", str(path)]
    command += ["--output", str(output), "--format", "json"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not output.exists() or not parties():  # a row is there, and the next is under way
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.communicate()[0] == b""
    done = output.read_bytes()
    count = len(Sheet(output))
    assert 1 <= count < 3

    second = subprocess.run(command, capture_output=True, check=True, text=True)
    assert second.stderr.splitlines()[0] == f"{3 - count} measured, {count} were there"
    assert output.read_bytes().startswith(done)
    table = pd.read_csv(output)
    assert list(table["batch_size"]) == [1, 2, 3]
    assert [int(row["batch_size"]) for row in json.loads(second.stdout)] == [1, 2, 3]


def test_a_row_that_fails_does_not_stop_the_others_and_is_tried_again(
    tmp_path: Path,
    toy_model: Path,
    parties: Callable[[], dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = module.measure

    def fail_once(plan: Any, **rest: Any) -> Any:
        if plan.batch == 1:
            raise PeerError("gone")
        return measure(plan, **rest)

    cases = read_scenario(scenario(tmp_path, toy_model))
    path = tmp_path / "out.csv"
    monkeypatch.setattr(module, "measure", fail_once)
    outcome = sweep(cases, Sheet(path))
    ((case, error),) = outcome.failures
    assert case.batch == 1 and str(error) == "gone" and outcome.measured == 1
    monkeypatch.setattr(module, "measure", measure)
    outcome = sweep(cases, Sheet(path))
    assert (outcome.measured, outcome.skipped, outcome.failures) == (1, 1, [])
    assert list(pd.read_csv(path)["batch_size"]) == [2, 1]


RESULT = json.loads((SCENARIOS.parent / "results" / "run-resnet18-49600-fss.json").read_text())


def result(batch: int = 1, **change: Any) -> dict[str, Any]:
    return {**RESULT, "batch_size": batch, **change}


@pytest.fixture(params=[".csv", ".json", ".parquet"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"table{request.param}"
    sheet = Sheet(path)
    for batch in (1, 2):
        sheet.append(result(batch))
    return path


def test_a_row_is_known_by_what_was_measured_alone(whole: Path) -> None:
    sheet = Sheet(whole)
    values = RESULT["online"]["latency_ms"]["values"]
    expected = Key(RESULT["model"]["sha256"], "fss", "loopback", 1, 1, len(values))
    assert sheet.keys == {expected, expected._replace(batch=2)}
    environment = {**RESULT["environment"], "commit": "another", "date": "later"}
    with pytest.raises(ValueError, match="is there already"):
        sheet.append(result(environment=environment))
    online = {**RESULT["online"], "latency_ms": {"median": 1, "min": 1, "max": 1, "values": [1]}}
    for change in (
        {"backend": "crypten"},
        {"threads_per_party": 2},
        {"network": {**RESULT["network"], "name": "wan"}},
        {"model": {**RESULT["model"], "sha256": "0" * 64}},
        {"online": online},
        {"fixed_point": {**RESULT["fixed_point"], "plan": "high"}},
        {"backend": "crypten", "batch_size": 3, "fixed_point": None},
    ):
        sheet.append(result(**change))
        with pytest.raises(ValueError, match="is there already"):
            sheet.append(result(**change))
    assert len(Sheet(whole)) == 9
    batches = [int(row["batch_size"]) for row in Sheet(whole).tidy_rows()]
    assert batches == [1, 2, 1, 1, 1, 1, 1, 1, 3]


def test_no_truncation_and_no_garbage_is_taken_for_a_table(whole: Path) -> None:
    data = whole.read_bytes()
    damaged = [b"", b"{}", b"[]", b"[]\x00", b"hello, world\n", data[:-1] + b","]
    if whole.suffix == ".parquet":  # its pages have checksums
        first = data.index(b"EPYC")
        damaged.append(data[:first] + b"X" + data[first + 1 :])
    else:
        middle = data.rindex(b"fss")
        damaged += [data + data, data[:middle] + b"\n" + data[middle:]]
    damaged += [data[:length] for length in range(1, len(data) - 2, 211)]
    for wrong in damaged:
        whole.write_bytes(wrong)
        with pytest.raises(IntegrityError, match="is no whole table"):
            Sheet(whole)
        assert whole.read_bytes() == wrong  # left for its owner to look at


@pytest.mark.parametrize("whole", [".csv", ".json"], indirect=True)  # the others are no text
def test_rows_changed_by_hand_are_refused(whole: Path) -> None:
    text = whole.read_text()
    sha = RESULT["model"]["sha256"]
    for old, new in ((sha, "12"), (sha, sha[:-1] + "X"), ("batch_size", "batch_sizes")):
        whole.write_text(text.replace(old, new))
        with pytest.raises(IntegrityError):
            Sheet(whole)


def test_file_names_say_the_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.csv"):
        Sheet(tmp_path / "table.txt")
    with pytest.raises(UsageError, match="cannot read"):
        (tmp_path / "folder.csv").mkdir()
        Sheet(tmp_path / "folder.csv")


def test_parquet_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package 'pyarrow'"):
        Sheet(tmp_path / "table.parquet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PiError, match="cannot write"):
            Sheet(tmp_path / "table.csv").append(result())
    finally:
        tmp_path.chmod(0o700)
