"""Budgets: what follows from a model is what is measured, and every kind of limit can break."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import yaml
from click.testing import CliRunner

from pi_system.bench.budget import report
from pi_system.bench.budget.check import Found, Subject, check, costs, raise_if_over, run
from pi_system.bench.budget.draft import draft, with_measured
from pi_system.bench.budget.limits import Accuracy, Budget, Relus, Reveals, load, to_toml
from pi_system.bench.measure import Measurement, measure
from pi_system.bench.schema import Latency
from pi_system.cli.bench import cli
from pi_system.errors import BudgetError, UsageError
from pi_system.graph.ir import Graph
from pi_system.models import images, resolve

ROOT = Path(__file__).resolve().parents[2]
SMALL = "random:resnet10w4@600"


@cache
def demo() -> Graph:
    return resolve("demo")


@cache
def measured() -> Found:
    x, labels = images(demo(), 8)
    subject = Subject("demo", demo(), x, labels, repeat=2)
    wanted = Budget(latency_ms={"loopback": 1.0, "20:100": 1.0}, reveals=Reveals(audited=8))
    return run(wanted, subject)


@pytest.mark.parametrize(("model", "plan", "batch"), [("demo", "default", 1), (SMALL, "high", 2)])
def test_what_is_computed_is_what_is_measured(model: str, plan: str, batch: int) -> None:
    graph = resolve(model)
    x, labels = images(graph, batch)
    result = measure(
        Measurement(model, graph, "fss", x, labels, batch=batch, repeat=2, warmup=1, plan=plan)
    )
    computed = costs(graph, plan, batch, inference=2)
    for phase in ("online", "offline"):
        exact = getattr(computed, phase)
        traffic = vars(getattr(result, phase).bytes)
        for direction, size in traffic.items():
            assert (getattr(exact, direction, 0) or 0) == size, (phase, direction)
        assert exact.bytes == getattr(result, phase).bytes.total
    assert computed.online.round_trips == result.online.round_trips


def test_the_budget_of_a_model_is_kept_by_it_and_by_no_larger_one() -> None:
    budget = draft(demo(), "default", 1, 16)
    checks = check(budget, demo())
    assert {one.state for one in checks} == {"kept", "not measured"}
    raise_if_over(checks)
    other = replace(budget, plan="high")
    broken = {one.limit for one in check(other, demo()) if one.state == "over"}
    assert {"online.bytes", "offline.bytes", "material.server", "reveals.answer_bits"} <= broken
    assert "relus.total" not in broken


def static_limits() -> list[tuple[str, str, Any]]:
    made = draft(demo(), "default", 1, 16)
    found: list[tuple[str, str, Any]] = [
        (section, name, value)
        for section in ("online", "offline", "material")
        for name, value in vars(getattr(made, section)).items()
    ]
    return [*found, ("relus", "total", 12500), ("reveals", "answer_bits", 1500)]


@pytest.mark.parametrize(("section", "name", "value"), static_limits())
def test_each_computed_limit_breaks_by_one(section: str, name: str, value: int) -> None:
    budget = draft(demo(), "default", 1, 16)
    tight = replace(getattr(budget, section), **{name: value - 1})
    checks = check(replace(budget, **{section: tight}), demo())
    (broken,) = [one for one in checks if one.state == "over"]
    assert (broken.limit, broken.over) == (f"{section}.{name}", 1)
    with pytest.raises(BudgetError, match=f"over budget: {section}.{name} by 1"):
        raise_if_over(checks)


def test_a_layer_and_a_fact_too_many_break() -> None:
    budget = draft(demo(), "default", 1, 16)
    layer = Relus(None, {"stages.3.1.relu1": 1185})
    (broken,) = [one for one in check(replace(budget, relus=layer), demo()) if one.over]
    assert broken.limit == "relus.per_layer.stages.3.1.relu1"
    for role, fact in (("server", "times"), ("client", "metadata"), ("dealer", "masks")):
        allowed = tuple(name for name in getattr(budget.reveals, role) if name != fact)
        checks = check(replace(budget, reveals=replace(budget.reveals, **{role: allowed})), demo())
        (broken,) = [one for one in checks if one.over]
        assert (broken.limit, broken.beyond) == (f"reveals.{role}", [fact])
        with pytest.raises(BudgetError, match=f"reveals.{role} by {fact}"):
            raise_if_over(checks)


def broken_measured(budget: Budget, found: Found) -> set[str]:
    return {one.limit for one in check(budget, demo(), found) if one.state == "over"}


def test_each_measured_limit_breaks() -> None:
    found = measured()
    assert found.findings == 0
    kept = with_measured(draft(demo(), "default", 1, 8), found, headroom=0.5)
    assert set(kept.latency_ms) == {"loopback", "20:100"}
    assert kept.latency_ms["20:100"] > 13 * 20
    assert broken_measured(kept, found) == set()
    assert {one.state for one in check(kept, demo(), found)} == {"kept"}
    for network in kept.latency_ms:
        tight = replace(kept, latency_ms={**kept.latency_ms, network: 0.1})
        assert broken_measured(tight, found) == {f"latency_ms.{network}"}
    result = found.first
    worse = replace(result.accuracy, correct=3, plaintext_correct=6, argmax_agreement=0.5,
                    max_abs_error=9.0)  # fmt: skip
    bad = replace(found, results={**found.results, "loopback": replace(result, accuracy=worse)})
    for limits, expected in (
        (Accuracy(private=0.5), "accuracy.private"),
        (Accuracy(loss=0.25), "accuracy.loss"),
        (Accuracy(agreement=0.75), "accuracy.agreement"),
        (Accuracy(logit_error=8.5), "accuracy.logit_error"),
    ):
        assert broken_measured(Budget(accuracy=limits), bad) == {expected}
    by = {one.limit: one.over for one in check(Budget(accuracy=Accuracy(loss=0.25)), demo(), bad)}
    assert by["accuracy.loss"] == pytest.approx(3 / 8 - 0.25)
    found_out = replace(found, findings=2)
    assert broken_measured(kept, found_out) == {"reveals.audited (32)"}
    # Measured bytes count as computed ones do, and round trips too.
    more = replace(result.online, bytes=replace(result.online.bytes, client_to_server=10**6),
                   round_trips=14, latency_ms=Latency.of([0.001]))  # fmt: skip
    slow = replace(found, results={**found.results, "loopback": replace(result, online=more)})
    assert broken_measured(kept, slow) == {
        "online.bytes", "online.client_to_server", "online.round_trips",
    }  # fmt: skip


def test_accuracy_without_labels_is_a_usage_error() -> None:
    found = measured()
    unknown = replace(found.first.accuracy, correct=None, plaintext_correct=None)
    bare = replace(found, results={"loopback": replace(found.first, accuracy=unknown)})
    with pytest.raises(UsageError, match="need images with labels"):
        check(Budget(accuracy=Accuracy(private=0.1)), demo(), bare)


def test_a_file_gives_the_same_budget(tmp_path: Path) -> None:
    path = tmp_path / "budget.toml"
    for budget in (
        Budget(),
        draft(demo(), "high", 2, 16),
        with_measured(draft(demo(), "default", 1, 8), measured(), 0.25),
    ):
        path.write_text(to_toml(budget, "some words\n\nmore"))
        assert load(path) == budget


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("online.byte = 3", "unknown key 'byte'"),
        ("onlien.bytes = 3", "unknown key 'onlien'"),
        ("online.bytes = 'few'", "expected int"),
        ("online.bytes = -1", "online.bytes: a limit cannot be -1"),
        ("accuracy.loss = nan", "accuracy.loss: a limit cannot be nan"),
        ("relus.per_layer = 3", "expected a table"),
        ("relus.per_layer.relu = 1.5", "per_layer.relu: expected int"),
        ("latency_ms.moon = 3", "no network 'moon'"),
        ("reveals.server = ['images']", "the server does not learn 'images'"),
        ("reveals.audited = 9", "must be even"),
        ("batch = 0", "at least 1"),
    ],
)
def test_a_file_with_a_mistake_is_a_usage_error(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "budget.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason):
        load(path)


def test_a_layer_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no ReLU layer 'relu9'"):
        check(Budget(relus=Relus(None, {"relu9": 3})), demo())
    with pytest.raises(UsageError, match="no plan 'low'"):
        check(Budget(plan="low"), demo())


def test_the_commands(tmp_path: Path) -> None:
    path, xml = tmp_path / "budget.toml", tmp_path / "budget.xml"
    made = CliRunner().invoke(cli, ["budget", "init", "--model", "demo", "--output", str(path)])
    assert made.exit_code == 0, made.output
    arguments = ["budget", "check", str(path), "--model", "demo"]
    table = CliRunner().invoke(cli, [*arguments, "--junit", str(xml)])
    assert table.exit_code == 0 and "relus.per_layer.* (17 layers)" in table.output
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert suite is not None
    path.write_text(path.read_text().replace("round_trips = 10", "round_trips = 9"))
    broken = CliRunner().invoke(cli, [*arguments, "--junit", str(xml)])
    assert isinstance(broken.exception, BudgetError) and broken.exception.exit_code == 3
    assert "OVER" in broken.output and "online.round_trips" in broken.output
    valid_junit(xml.read_bytes(), failures=1)
    done = CliRunner().invoke(cli, [*arguments, "--format", "json"])
    document = json.loads(done.output)
    assert not document["kept"]
    (one,) = [row for row in document["checks"] if row["state"] == "over"]
    assert (one["limit"], one["allowed"], one["computed"]) == ("online.round_trips", 9, 10)
    rows = CliRunner().invoke(cli, [*arguments, "--format", "csv"])
    assert rows.output.splitlines()[0].startswith("limit,allowed,computed,measured,over")
    path.write_text("[latency_ms]\nloopback = 0.01\n")
    slow = CliRunner().invoke(cli, [*arguments, "--measure", "--repeat", "1"])
    assert isinstance(slow.exception, BudgetError) and "latency_ms.loopback" in slow.output


def valid_junit(document: bytes, failures: int) -> None:
    """The rules of the common XSD (Apache Ant's, as CI systems read it)."""
    root = ElementTree.fromstring(document)
    assert root.tag == "testsuites"
    for suite in root:
        assert suite.tag == "testsuite" and suite.get("name")
        cases = suite.findall("testcase")
        assert len(cases) == len(list(suite)) == int(suite.attrib["tests"])
        for case in cases:
            assert case.get("classname") and case.get("name")
            float(case.attrib["time"])
            assert [child.tag for child in case] in ([], ["failure"], ["skipped"])
        for what, attribute in (("failure", "failures"), ("skipped", "skipped")):
            assert len(suite.findall(f"testcase/{what}")) == int(suite.attrib[attribute])
        assert int(suite.attrib["failures"]) == failures


def test_junit_tells_what_is_over_and_what_was_left_out() -> None:
    budget = draft(demo(), "default", 1, 16)
    budget = replace(budget, online=replace(budget.online, bytes=1000))
    document = report.to_junit(check(budget, demo()))
    valid_junit(document, failures=1)
    (failure,) = ElementTree.fromstring(document).iter("failure")
    assert "allowed 1,000" in failure.attrib["message"]
    assert len(list(ElementTree.fromstring(document).iter("skipped"))) == 2


# -- the examples ---------------------------------------------------------------------------------


def test_the_example_budget_is_kept() -> None:
    checks = check(load(ROOT / "examples" / "budget.toml"), demo())
    assert {one.state for one in checks} == {"kept", "not measured"}


def commands() -> list[list[str]]:
    """The ``pi-`` commands of the sample pipeline."""
    pipeline = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())
    steps = [step for job in pipeline["jobs"].values() for step in job["steps"]]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("pi-")]


def test_the_sample_pipeline_is_one() -> None:
    pipeline = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())
    # "on" is a truth value in YAML 1.1.
    assert set(pipeline) == {"name", True, "permissions", "jobs"}
    for job in pipeline["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
    assert len(commands()) == 5


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:3]))
def test_its_commands_are_as_written(words: list[str]) -> None:
    assert words[0] == "pi-bench"
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, rest[0]
        command, rest = found, rest[1:]
    command.make_context("command", rest)
    with pytest.raises(click.UsageError):
        command.make_context("command", [*rest, "--no-such-option"])
