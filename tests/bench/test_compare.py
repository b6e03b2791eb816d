"""Comparisons with real processes; their ratios recomputed from the raw values."""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from pi_system.bench import contenders
from pi_system.bench.compare import Plan, check_answers, compare
from pi_system.bench.comparison_table import print_comparison
from pi_system.bench.contenders import with_all_relus
from pi_system.bench.observation import Observation, combine
from pi_system.bench.schema import Comparison, Latency, Offline, Traffic, json_schema
from pi_system.errors import ParityError, PeerError, PiError, UsageError
from pi_system.models import resolve

TABLES = Path(__file__).resolve().parents[2] / "benchmarks" / "tables.py"
PLAIN, ALL, WRONG, BUGGY = (
    f"toy_backends:{name}" for name in ("Plain", "Plain-all", "Wrong", "Buggy")
)
SCHEMA = json_schema("compare")


@pytest.fixture
def plan(parties: Callable[[], dict[str, int]], toy_model: Path) -> Plan:
    return Plan(str(toy_model), (PLAIN, BUGGY, ALL), rounds=2, repeat=3, batch=2)


def test_contenders_side_by_side(plan: Plan) -> None:
    steps: list[tuple[str, int, int]] = []
    comparison = compare(plan, progress=lambda *step: steps.append(step))
    data: dict[str, Any] = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    jsonschema.validate(data, SCHEMA)

    # Every round starts with another contender; who has failed is left out.
    names = [PLAIN, BUGGY, ALL]
    rounds = [(1, PLAIN, 0), (1, BUGGY, 1), (1, ALL, 2), (2, ALL, 4), (2, PLAIN, 5)]
    assert steps == [(f"round {number}, {name}", done, 6) for number, name, done in rounds]

    by_name = {one["name"]: one for one in data["contenders"]}
    assert list(by_name) == names
    assert "ZeroDivisionError: a bug" in by_name[BUGGY]["not_run"]
    assert by_name[BUGGY]["online"] is None

    plain, whole = by_name[PLAIN], by_name[ALL]
    assert plain["model"] == data["model"] and plain["model"]["relu_kept"] == 256
    assert whole["model"]["relu_kept"] == whole["model"]["relu_total"] == 512
    for one in (plain, whole):
        assert one["not_run"] is None and one["backend"] == "toy_backends:Plain"
        assert one["accuracy"]["answers"] == 2 * 3 * 2 and one["accuracy"]["images"] == 6
        assert one["accuracy"]["argmax_agreement"] == 1.0
        assert len(one["online"]["latency_ms"]["values"]) == 2 * 3
        assert one["online"]["round_trips"] == 2
        assert set(one["peak_memory_mb"]) == {"client", "server", "dealer"}
    # A byte each way per kept ReLU and direction: all of them are twice half of them.
    assert (plain["online"]["relu_bytes"], whole["online"]["relu_bytes"]) == (528, 1040)
    assert data["network"]["measured"]["rtt_ms"] > 0

    check_ratios(data)
    check_table(comparison)
    check_markdown(data)


def check_ratios(data: dict[str, Any]) -> None:
    """Everything again, from the raw values of the rounds alone."""
    rounds = data["rounds"]
    assert len(rounds) == 2
    medians = [
        {
            "plaintext": statistics.median(one["plaintext_ms"]),
            **{name: statistics.median(values) for name, values in one["online_ms"].items()},
        }
        for one in rounds
    ]
    pairs = [(ratio["contender"], ratio["over"]) for ratio in data["ratios"]]
    assert pairs == [(PLAIN, "plaintext"), (ALL, "plaintext"), (ALL, PLAIN)]
    for ratio in data["ratios"]:
        each = [one[ratio["contender"]] / one[ratio["over"]] for one in medians]
        spread = ratio["online_latency"]
        assert spread["values"] == pytest.approx(each, rel=1e-3, abs=1e-4)
        for name, figure in (("median", statistics.median), ("min", min), ("max", max)):
            assert spread[name] == pytest.approx(figure(each), rel=1e-3, abs=1e-4)
    *_, last = data["ratios"]
    above, below = (
        next(one for one in data["contenders"] if one["name"] == name) for name in (ALL, PLAIN)
    )
    for phase in ("online", "offline"):
        totals = [sum(one[phase]["bytes"].values()) for one in (above, below)]
        assert last[f"{phase}_bytes"] == pytest.approx(totals[0] / totals[1], abs=1e-4)
    assert last["round_trips"] == 1
    assert last["offline_latency"]["values"] == pytest.approx(
        [
            statistics.median(one["offline_ms"][ALL]) / statistics.median(one["offline_ms"][PLAIN])
            for one in rounds
        ],
        rel=1e-3,
    )

    # The rounds are the values of the whole, cut.
    for one in (above, below):
        for phase in ("online", "offline"):
            values = [v for r in rounds for v in r[f"{phase}_ms"][one["name"]]]
            latency = one[phase]["latency_ms"]
            assert values == latency["values"]
            assert latency["median"] == pytest.approx(statistics.median(values), abs=1e-3)
    values = [value for one in rounds for value in one["plaintext_ms"]]
    assert values == data["plaintext"]["latency_ms"]["values"]


def check_table(comparison: Comparison) -> None:
    console = Console(width=120)
    with console.capture() as captured:
        print_comparison(console, comparison)
    text = " ".join(captured.get().split())
    for words in (
        "256 of 512 ReLUs", "2 rounds", f"{BUGGY} not run:", f"{ALL} / {PLAIN}: ",
        f"{PLAIN}: 12 of 12 answers as in plaintext",
    ):  # fmt: skip
        assert words in text


def check_markdown(data: dict[str, Any]) -> None:
    tables: Any = runpy.run_path(str(TABLES))
    slow, fast = sorted(data["ratios"][:2], key=lambda r: -r["online_latency"]["median"])
    rows = tables["compare_rows"](data)
    assert [row[1] for row in rows] == ["plaintext", slow["contender"], fast["contender"]]
    assert all(len(row) == len(tables["COMPARE"]) for row in rows)
    assert {row[2] for row in rows} == {"256", "512"}
    for row, ratio in zip(rows[1:], (slow, fast), strict=True):
        assert row[4].startswith(f"{ratio['online_latency']['median']:.3g} (")
    first, second = tables["compare_notes"](data)
    assert first.startswith(f"- toy, {ALL} over {PLAIN}: ") and "in 2 rounds" in first
    assert second.startswith(f"- toy, {BUGGY} was not run: ")


def test_the_schema_refuses_a_contender_half_run(plan: Plan) -> None:
    plan = dataclasses.replace(plan, contenders=(PLAIN, "plaintext", PLAIN), rounds=1, repeat=1)
    data = compare(plan).to_json()
    jsonschema.validate(data, SCHEMA)
    assert len(data["contenders"]) == 1 and len(data["ratios"]) == 1
    for change in (
        {"not_run": "why"},
        {"online": None},
        {"model": {}},
        {"online": {**data["contenders"][0]["online"], "round_trips": "two"}},
    ):
        wrong = copy.deepcopy(data)
        wrong["contenders"][0] |= change
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


def test_wrong_answers_are_a_parity_error_that_names_who(plan: Plan) -> None:
    comparison = compare(dataclasses.replace(plan, contenders=(PLAIN, WRONG), rounds=1, repeat=1))
    with pytest.raises(ParityError, match=f"^{WRONG}: .* are wanted"):
        check_answers(comparison, agreement=1.0, tolerance=0.1)
    good = dataclasses.replace(comparison, contenders=comparison.contenders[:1])
    check_answers(good, agreement=1.0, tolerance=0.1)


def test_nobody_could_run(plan: Plan) -> None:
    with pytest.raises(PiError, match="no 'Absent'"):
        compare(dataclasses.replace(plan, contenders=("toy_backends:Absent",)))


def test_plaintext_alone(plan: Plan) -> None:
    data = compare(dataclasses.replace(plan, contenders=("plaintext",), rounds=1)).to_json()
    jsonschema.validate(data, SCHEMA)
    assert [len(one["plaintext_ms"]) for one in data["rounds"]] == [10]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"contenders": ("fss", "crypten-most")}, "unknown backend 'crypten-most'"),
        ({"network": "moon"}, "no network 'moon'"),
        ({"model": "nothing"}, "no model 'nothing'"),
    ],
)
def test_what_does_not_exist_is_refused_at_once(change: dict[str, Any], text: str) -> None:
    plan = dataclasses.replace(Plan("demo", ("fss",)), **change)
    with pytest.raises(UsageError, match=text):
        compare(plan)


def test_a_contender_that_fails_later_says_when(
    monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    sessions = []
    run_local = contenders.run_local

    def fail_in_round_2(session: Any) -> Any:
        sessions.append(session)
        if len(sessions) == 3:
            raise PeerError("gone")
        return run_local(session)

    monkeypatch.setattr(contenders, "run_local", fail_in_round_2)
    plan = dataclasses.replace(plan, contenders=(PLAIN, ALL), rounds=2, repeat=1)
    data = compare(plan).to_json()
    jsonschema.validate(data, SCHEMA)
    plain, whole = data["contenders"]
    assert plain["not_run"] is None
    assert whole["not_run"] == "failed in round 2: gone" and whole["online"] is None
    assert all(list(one["online_ms"]) == [PLAIN] for one in data["rounds"])
    assert len(data["ratios"]) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo", "demo-teacher"),
        ("demo-teacher", "demo-teacher"),
        ("random:resnet10w2@100", "random:resnet10w2@all"),
        ("random:resnet10w2@all", "random:resnet10w2@all"),
    ],
)
def test_the_all_relu_version_of_a_named_model_has_a_name_too(name: str, expected: str) -> None:
    graph = with_all_relus(name, resolve(name))
    assert graph.sha256() == resolve(expected).sha256()
    assert graph.relu_kept == graph.relu_total


def test_the_all_relu_version_of_an_own_model_has_its_weights(toys: ModuleType) -> None:
    graph = toys.toy_graph()
    whole = with_all_relus("somewhere", graph)
    assert whole.relu_kept == whole.relu_total == 512
    assert whole.metadata["dataset"] is None and whole.metadata["name"] == "toy, all ReLUs"
    for name, tensor in graph.tensors.items():
        if not name.endswith(".mask"):
            np.testing.assert_array_equal(tensor, whole.tensors[name])


def test_sessions_are_combined_by_medians_and_keep_raw_values() -> None:
    def one(*milliseconds: float, sent: int, **measured: float) -> Observation:
        offline = Offline(Latency.of_milliseconds([*milliseconds]), Traffic(sent))
        return Observation(None, offline, None, measured, {"client": None})  # type: ignore

    seen = [one(1, 9, sent=5, a=1.0), one(2, sent=7, a=3.0, b=1.0), one(3, sent=7, a=8.0)]
    both = combine(seen)
    assert both.offline.latency_ms == Latency(2.5, 1, 9, [1, 9, 2, 3])
    assert both.offline.bytes == Traffic(7)
    assert both.measured == {"a": 3.0, "b": 1.0} and both.peak_memory_mb == {"client": None}
    assert combine([1, 2]) == 2 and isinstance(combine([1, 2]), int)
    with pytest.raises(ValueError, match="differ"):
        combine(["a", "b"])
    with pytest.raises(ValueError):
        combine([[1], [1, 2]])
