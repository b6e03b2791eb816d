"""Records, statistics, stability and the environment."""

from __future__ import annotations

import dataclasses
import getpass
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import pytest

from pi_system.bench import environment, schema
from pi_system.bench.observation import describe_network
from pi_system.bench.parity import check_parity
from pi_system.bench.plaintext import PlaintextTimer
from pi_system.bench.schema import Accuracy, Latency, Traffic, flatten
from pi_system.bench.stability import judge
from pi_system.bench.table import size
from pi_system.errors import ParityError


def test_latencies_are_milliseconds_with_their_raw_values() -> None:
    latency = Latency.of([0.004, 0.001, 0.002])
    assert latency == Latency(median=2.0, min=1.0, max=4.0, values=[4.0, 1.0, 2.0])
    assert latency.spread == 1.5


def test_the_schema_is_valid_and_strict() -> None:
    document = schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema_version": 1}, document)


def test_the_records_and_the_json_schema_name_the_same_fields() -> None:
    document = schema.json_schema()
    assert_same_names(document, schema.Result)
    for name, kind in (
        ("model", schema.Model),
        ("network", schema.Network),
        ("plaintext", schema.Plaintext),
        ("setup", schema.Setup),
        ("offline", schema.Offline),
        ("online", schema.Online),
        ("accuracy", schema.Accuracy),
        ("stability", schema.Stability),
    ):
        assert_same_names(document["properties"][name], kind)
    for name, kind in (
        ("latency", schema.Latency),
        ("traffic", schema.Traffic),
        ("online_traffic", schema.OnlineTraffic),
        ("layer", schema.Layer),
    ):
        assert_same_names(document["$defs"][name], kind)


def test_the_records_and_the_schema_of_comparisons_name_the_same_fields() -> None:
    document = schema.json_schema("compare")
    jsonschema.Draft202012Validator.check_schema(document)
    assert_same_names(document, schema.Comparison)
    for name, kind in (
        ("contender", schema.Contender),
        ("round", schema.Round),
        ("ratio", schema.Ratio),
        ("spread", schema.Spread),
    ):
        assert_same_names(document["$defs"][name], kind)


def assert_same_names(document: dict[str, Any], kind: Any) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    assert set(document["properties"]) == set(document["required"]) == names


def test_the_environment_names_no_host_user_or_path() -> None:
    described = environment.describe()
    required = schema.json_schema()["properties"]["environment"]["required"]
    assert set(described) == {*required, "kernels"}
    assert described["kernels"]["gates"] and described["kernels"]["convolutions"]
    text = json.dumps(described)
    for secret in (str(Path.home()), str(Path(__file__).resolve().parents[2]), "/tmp"):
        assert secret not in text
    words = set(text.replace('"', " ").replace(",", " ").split())
    assert platform.node() not in words and getpass.getuser() not in words
    assert described["cores"] >= described["cores_usable"] >= 1
    assert described["memory_mb"] > 100


IDLE: dict[str, Any] = {"cores_usable": 8, "load_average": [0.1, 0.1, 0.1]}
STEADY = Latency.of([0.010] * 5)
LOOPBACK = schema.Network("loopback", None, None, {"rtt_ms": 0.1, "mbps": 9000.0})


def link(name: str, rtt: float, mbps: float) -> schema.Network:
    """One that was measured to have these."""
    return describe_network(name, {"rtt_ms": rtt, "mbps": mbps})


def test_a_steady_run_on_an_idle_machine_is_stable() -> None:
    for network in (
        LOOPBACK,
        link("lan", 0.33, 930),
        link("wan", 41, 95),
        link("80:20", 80.5, 19.3),
        link("40:100:0.01", 40, 11),  # TCP loses its rate with packets
    ):
        verdict = judge(
            {"online": STEADY},
            STEADY,
            plaintext_drift=0.02,
            threads=1,
            environment=IDLE,
            network=network,
        )
        assert verdict.stable and verdict.warnings == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"online": Latency.of([0.010, 0.010, 0.010, 0.010, 0.013])}, "online latency spreads"),
        ({"plaintext": Latency.of([0.010, 0.020])}, "plaintext latency spreads over 67%"),
        ({"online": Latency.of([0.010])}, "only 1 values of online latency"),
        ({"plaintext_drift": 0.3}, "plaintext latency changed by 30%"),
        ({"threads": 5}, "two parties of 5 threads share 8 cores"),
        ({"environment": {**IDLE, "load_average": [5.0]}}, "load average 5.0 on 8 cores"),
        ({"network": link("lan", 0.38, 930)}, "round trip was 0.38 ms and not 0.301 ms"),
        ({"network": link("wan", 44.2, 95)}, "round trip was 44.2 ms and not 40"),
        ({"network": link("80:20", 71, 19.3)}, "round trip was 71 ms and not 80"),
        ({"network": link("lan", 0.3, 860)}, "carried 860 Mbit/s of payload and not 965"),
        ({"network": link("80:20", 80, 22)}, "carried 22 Mbit/s of payload and not 19.3"),
    ],
)
def test_each_reason_for_doubt_is_said(change: dict[str, Any], text: str) -> None:
    values: dict[str, Any] = {
        "online": STEADY,
        "plaintext": STEADY,
        "plaintext_drift": 0.0,
        "threads": 1,
        "environment": IDLE,
        "network": LOOPBACK,
        **change,
    }
    online, plaintext = values.pop("online"), values.pop("plaintext")
    verdict = judge({"online": online}, plaintext, **values)
    assert not verdict.stable
    (warning,) = verdict.warnings
    assert text in warning


def test_parity_is_judged_by_argmax_or_by_logits() -> None:
    good = Accuracy(4, 4, 1.0, 0.01, None, None)
    near = Accuracy(4, 4, 0.75, 0.2, None, None)
    broken = Accuracy(4, 4, 1.0, float("nan"), None, None)
    check_parity(good, trained=True, agreement=1.0, tolerance=0.1)
    check_parity(good, trained=False, agreement=1.0, tolerance=0.1)
    check_parity(near, trained=True, agreement=0.7, tolerance=0.1)
    check_parity(near, trained=False, agreement=1.0, tolerance=0.3)
    for result, trained in ((near, True), (near, False), (broken, False)):
        with pytest.raises(ParityError):
            check_parity(result, trained=trained, agreement=1.0, tolerance=0.1)


def test_plaintext_takes_the_faster_format_and_all_its_values(toys: ModuleType) -> None:
    timer = PlaintextTimer(toys.toy_graph(), np.zeros((2, 3, 8, 8), np.float32), 1)
    timer.run(3)
    timer.run(2)
    result = timer.result()
    assert len(result.latency_ms.values) == 5
    assert result.memory_format in ("contiguous", "channels_last") and result.threads == 1
    assert timer.drift() >= 0
    assert [len(block) for block in timer.blocks()] == [3, 2]
    assert result.latency_ms == Latency.of(s for block in timer.blocks() for s in block)


def test_small_helpers() -> None:
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "d": None}
    assert [size(n) for n in (0, 999, 1000, 123_456, 448_000_000, 2 * 10**9)] == [
        "0 B", "999 B", "1 kB", "123 kB", "448 MB", "2 GB",
    ]  # fmt: skip
    assert Traffic(1, 2, 3, 4, 5, 6).total == 21
