"""Predictions: exact bytes against real sessions, fits against known numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system import models
from pi_system.bench import forecast, predict
from pi_system.bench.forecast import Compute
from pi_system.bench.observation import Observation
from pi_system.bench.report.sources import Run
from pi_system.cli import bench, common
from pi_system.errors import UsageError
from pi_system.net.link import Link
from pi_system.parties.local import LocalRun, run_local

NOTHING = Compute(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
TRUTH = {
    "online": Compute(1.0, 5e-9, 4e-7, 5e-6, 3e-5, 0.1),
    "offline": Compute(9, 1e-8, 8e-7, 8e-6, 2e-4, 0.7),
}
RUN: dict[str, Any] = json.loads(
    (
        Path(__file__).resolve().parents[2] / "benchmarks/results/fss-cifar100-test-default.json"
    ).read_text()
)


@pytest.fixture(scope="module")
def demo() -> forecast.Public:
    return forecast.public(models.resolve("demo"))


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_those_of_a_real_session(demo: forecast.Public, batch: int) -> None:
    graph = models.resolve("demo")
    images = models.images(graph, batch)[0]
    # Inferences 10 and 11: their numbers have two digits in the session's commands.
    local = run_local(LocalRun("demo", "fss", images, batch=batch, repeat=2, warmup=10))
    seen = Observation.of(graph, local)
    found = forecast.traffic(dataclasses.replace(demo, batch=batch))
    assert found.online == dataclasses.asdict(seen.online.bytes)
    measured = dataclasses.asdict(seen.offline.bytes)
    for direction, count in found.offline.items():
        # Numbers of inferences in its JSON.
        assert abs(measured[direction] - count) <= 4, direction
    assert found.round_trips == seen.online.round_trips


def test_over_a_network_nothing_else_uses_the_time_is_that_of_its_bytes_and_trips(
    demo: forecast.Public,
) -> None:
    online, offline = forecast.latency_ms(demo, NOTHING, NOTHING, Link("own", 100.0, 1e6))
    assert online == pytest.approx(100 * demo.lowered.round_trips, rel=0.01)
    # A step and its answer; the request and the last gates; what follows them, and the end.
    assert offline == pytest.approx(300, rel=0.02)
    online, offline = forecast.latency_ms(demo, NOTHING, NOTHING, Link("own", 0.0, 1.0))
    found = forecast.traffic(demo)
    # One direction after the other within a step; the dealer's link to the server is the fullest.
    assert 8e-3 * sum(found.online.values()) == pytest.approx(online, rel=0.05)
    assert 8e-3 * found.offline["dealer_to_server"] == pytest.approx(offline, rel=0.06)


def test_on_loopback_the_time_is_the_compute(demo: forecast.Public) -> None:
    size = forecast.size(demo)
    found = forecast.latency_ms(demo, TRUTH["online"], TRUTH["offline"], None)
    assert found[0] == pytest.approx(TRUTH["online"].of(size), rel=1e-9)
    assert found[1] == pytest.approx(TRUTH["offline"].of(size), rel=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.floats(1, 200), st.floats(5, 500))
def test_more_bandwidth_and_less_delay_never_hurt(
    demo: forecast.Public, rtt: float, mbps: float
) -> None:
    compute = TRUTH["online"], TRUTH["offline"]
    base = forecast.latency_ms(demo, *compute, Link("own", rtt, mbps))
    for better in (Link("own", rtt / 2, mbps), Link("own", rtt, mbps * 2)):
        found = forecast.latency_ms(demo, *compute, better)
        assert found[0] <= base[0] * (1 + 1e-9) and found[1] <= base[1] * (1 + 1e-9)


@pytest.mark.parametrize(("bits", "digits"), [(14, 1), (15, 2), (30, 2), (31, 3), (46, 3), (47, 4)])
def test_a_product_is_counted_once_for_each_16_bit_digit(bits: int, digits: int) -> None:
    known = forecast.public(models.resolve("random:resnet18w8@100"))
    convs = {name: dataclasses.replace(conv, n=bits) for name, conv in known.plan.convs.items()}
    known = dataclasses.replace(known, plan=dataclasses.replace(known.plan, convs=convs), batch=2)
    found = forecast.size(known)
    weights = {op.out: math.prod(op.weight_shape) for op in known.lowered.convs}
    pixels = {op.out: math.prod(op.shape[1:]) for op in known.lowered.convs}
    assert found.products == 2 * digits * sum(weights[name] * pixels[name] for name in weights)
    assert found.weights == sum(weights.values())


def test_the_comparisons_of_max_pools_are_gates() -> None:
    known = forecast.public(models.resolve("random:vgg16w4@0"))
    left = [math.prod(node.shape) for node in known.graph if node.op == "maxpool"]
    # Of 2 x 2 values one is left after three comparisons.
    assert left and forecast.size(known).gates == 3 * sum(left)


def measured(model: str, batch: int = 1, **changes: Any) -> Run:
    """A run of the true cost."""
    known = dataclasses.replace(forecast.public(models.resolve(model)), batch=batch)
    whole, graph = forecast.size(known), known.graph
    values: dict[str, Any] = {
        "file": "made.json", "model": model, "backend": "fss", "network": "loopback", "threads": 1,
        "batch": batch, "relus": graph.relu_kept, "relus_total": graph.relu_total,
        "online": TRUTH["online"].of(whole), "offline": TRUTH["offline"].of(whole),
        "round_trips": whole.steps + 1.0,
    }  # fmt: skip
    values |= {f"{phase}_min": values[phase] for phase in predict.PHASES}
    other = {field.name: 0 for field in dataclasses.fields(Run) if field.name not in values}
    return Run(**{**other, **values, **changes})


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    found = [measured(f"random:resnet18w16@{n}") for n in ("1000", "5000", "20000", "60000", "all")]
    found += [measured(f"random:resnet18w8@{n}") for n in (5000, "all")]
    found += [measured(f"random:resnet10w16@{n}") for n in (9, 20000)]
    found += [measured("random:resnet18w16@20000", batch=n) for n in (2, 4)]
    return [*found, measured("random:resnet10w16@20000", batch=3)]


def test_a_linear_cost_is_found_again_and_left_out_rows_are_predicted(runs: list[Run]) -> None:
    fitted = predict.fit(runs)
    assert fitted.rows == 12 and len(fitted.architectures) == 3
    for phase in predict.PHASES:
        assert fitted.left_out[phase].largest < 0.1
        assert fitted.left_out[phase].median < 0.02
        assert fitted.unseen[phase].predictions == 12
        assert min(dataclasses.astuple(fitted.compute[phase])) >= 0


def test_the_error_stated_is_that_of_rows_the_cost_does_not_explain(runs: list[Run]) -> None:
    odd = dataclasses.replace(runs[2], online_min=3 * runs[2].online)
    fitted = predict.fit([*runs[:2], odd, *runs[3:]])
    assert fitted.left_out["online"].largest > 0.5 > fitted.left_out["offline"].largest


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda runs: runs[:2], "too few"),
        (lambda runs: [runs[0]] * 5, "too few"),
        (lambda runs: [*runs, dataclasses.replace(runs[0], threads=2)], "one number of threads"),
        (lambda runs: [*runs, dataclasses.replace(runs[0], model="gone")], "gone is not at hand"),
        (lambda runs: [*runs, dataclasses.replace(runs[0], relus_total=1)], "another network"),
    ],
)
def test_measurements_that_allow_no_fit(
    runs: list[Run], spoil: Callable[[list[Run]], list[Run]], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        predict.fit(spoil(runs))


def document(run: Run) -> dict[str, Any]:
    """What pi-bench run would have written."""

    def latency(value: float) -> dict[str, Any]:
        return {"median": value, "min": value, "max": value, "values": [value]}

    return {
        **RUN,
        "model": {
            **RUN["model"],
            "name": run.model,
            "relu_kept": run.relus,
            "relu_total": run.relus_total,
        },
        "batch_size": run.batch,
        "online": {
            **RUN["online"],
            "latency_ms": latency(run.online),
            "round_trips": run.round_trips,
        },
        "offline": {**RUN["offline"], "latency_ms": latency(run.offline)},
    }


def test_the_command_predicts_and_checks(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [document(run) for run in runs]
    other = {**RUN, "backend": "crypten"}
    (tmp_path / "fit.json").write_text(json.dumps([*rows, other]))
    (tmp_path / "check.json").write_text(json.dumps({**RUN, "network": {**RUN["network"]}}))
    fit = ["predict", "--fit", str(tmp_path / "fit.json")]
    networks = ("--network", "wan", "--network", "80:20", "--format", "json")
    code = common.run(bench.cli, [*fit, "--model", "demo", *networks])
    out, err = capsys.readouterr()
    assert code == 0 and "1 rows of other backends or networks" in err
    data = json.loads(out)
    wan, far = data["predictions"]
    assert (wan["network"], far["network"], wan["relus"]) == ("wan", "80:20", 12500)
    assert 40 * 10 < wan["online_ms"] < 40 * 10 + 60 and far["online_ms"] > 80 * 10
    assert data["fit"]["left_out"]["online"]["median"] < 0.02
    code = common.run(bench.cli, [*fit, "--check", str(tmp_path / "check.json")])
    out, err = capsys.readouterr()
    assert code == 0 and "Predicted and measured" in out and "checks:" in out
    for wrong, why in (
        ([], "name a --model"),
        (["--model", "nobody"], "no model 'nobody'"),
        (["--model", "demo", "--network", "moon"], "no network 'moon'"),
        (["--check", str(tmp_path / "gone.json")], "gone.json"),
        (["--check", str(tmp_path / "check.json"), "--network", "wan"], "--network goes with"),
    ):
        assert common.run(bench.cli, [*fit, *wrong]) == 2
        assert why in capsys.readouterr().err
