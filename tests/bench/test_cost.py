"""The cost model against results made of known numbers, and its inverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi_system.bench import cost
from pi_system.errors import IntegrityError, UsageError
from pi_system.net.link import Link

WAN = Link("wan", 40.0, 100.0)


def result(relus: list[int], *, fixed: float = 3.0, per_relu: float = 1e-3) -> dict[str, Any]:
    total = sum(relus)
    return {
        "backend": "fss",
        "batch_size": 1,
        "threads_per_party": 1,
        "model": {"relu_total": 10_000, "relu_kept": total},
        "network": {"name": "loopback"},
        "online": {
            "latency_ms": {"median": fixed + per_relu * total},
            "bytes": {"client_to_server": 500 + 7 * total, "server_to_client": 200 + 2 * total},
            "round_trips": 1 + sum(count > 0 for count in relus),
            "layers": [{"relus_kept": count} for count in relus],
        },
    }


def test_known_numbers_come_back() -> None:
    found = cost.calibrate([result([0, 100, 10]), result([2000, 100, 10]), result([0, 0, 0])])
    assert found.fixed_ms == pytest.approx(3.0) and found.relu_ms == pytest.approx(1e-3)
    assert found.fixed_bytes == pytest.approx(700) and found.relu_bytes == pytest.approx(9)
    bits = 8 * (700 + 9 * 60) * (1 + 52 / 1448)
    assert found.latency_ms([0, 50, 10], WAN) == pytest.approx(3 + 0.06 + 3 * 40 + bits / 1e5)


@given(st.integers(0, 20), st.floats(1, 2000), st.floats(0.1, 200), st.floats(1, 1000))
def test_what_is_affordable_fits_and_no_more(
    layers: int, target: float, rtt: float, mbps: float
) -> None:
    link, model = Link("own", rtt, mbps), cost.Cost(3.0, 1e-3, 700.0, 9.0)
    relus = model.affordable(layers, target, link)
    empty = model.latency_ms([0], link) + rtt * layers
    if relus < 0:
        assert empty > target
    elif layers:
        spread = [relus, *([1e-9] * (layers - 1))]
        assert relus == 0 or model.latency_ms(spread, link) <= target + 1e-6  # type: ignore[arg-type]
        spread[0] += 2
        assert model.latency_ms(spread, link) > target - 1e-6  # type: ignore[arg-type]


def test_results_that_do_not_do() -> None:
    good = [result([10]), result([20])]
    wan = result([10]) | {"network": {"name": "wan"}}
    crypten = result([10])
    crypten["online"]["round_trips"] = 12
    for bad, message in [
        ([good[0], good[0]], "two different"),
        ([], "one backend"),
        ([good[0], result([20]) | {"backend": "crypten"}], "one backend"),
        ([good[0], good[1] | {"batch_size": 2}], "batch 1"),
        ([wan, good[1]], "loopback"),
        ([crypten, good[1]], "12 round trips"),
    ]:
        with pytest.raises(UsageError, match=message):
            cost.calibrate(bad)


def test_files(tmp_path: Path) -> None:
    results = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("run-*-fss.json"))
    found = cost.load([path for path in results if "resnet18" in path.name])
    assert 0 < found.relu_ms < 1 and found.fixed_ms > 0 and 0 < found.relu_bytes < 100
    broken = tmp_path / "a.json"
    broken.write_text("[]")
    with pytest.raises(IntegrityError, match="no result"):
        cost.load([broken])
