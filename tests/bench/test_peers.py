"""Peers beside backends, with their own real processes."""

from __future__ import annotations

import dataclasses
import io
import json
import runpy
import time
from pathlib import Path

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from pi_system.bench import peers
from pi_system.bench.compare import Plan, compare
from pi_system.bench.comparison_table import print_comparison
from pi_system.bench.schema import json_schema
from pi_system.errors import PeerError
from pi_system.graph.execute import run as run_plaintext
from pi_system.graph.serialize import load

TABLES = Path(__file__).resolve().parents[2] / "benchmarks" / "tables.py"


@pytest.fixture(autouse=True)
def crypten_is_there() -> None:
    from pi_system.backends.crypten import compat
    from pi_system.errors import UsageError

    try:
        compat.require()
    except UsageError as error:
        pytest.skip(str(error))


def test_stock_crypten_answers_as_plaintext(
    toy_model: Path, toy_images: npt.NDArray[np.float32]
) -> None:
    graph = load(toy_model)
    run = peers.PeerRun(toy_model, toy_images, batch=2, repeat=2, warmup=1, threads=1)
    report = peers.get("crypten-stock").run(run)
    assert [one["images"] for one in report.inferences] == [[0, 1], [2, 0]]
    expected = run_plaintext(graph, toy_images)
    for one in report.inferences:
        np.testing.assert_allclose(one["logits"], expected[one["images"]], atol=0.02)
    assert len(report.seconds) == 2 and min(report.seconds) > 0
    # Two images of this network go out as shares of eight bytes an element, and more than that.
    assert report.interface_bytes is None or report.interface_bytes > 8 * toy_images[:2].size
    assert set(report.peak_memory) == {"server", "client", "dealer"}


def test_a_peer_that_fails_says_which_party_and_why(tmp_path: Path) -> None:
    run = peers.PeerRun(
        tmp_path / "none",
        np.zeros((1, 3, 8, 8), np.float32),
        batch=1,
        repeat=1,
        warmup=0,
        threads=1,
    )
    started = time.monotonic()
    with pytest.raises(PeerError, match=r"its server: .*none"):
        peers.get("crypten-stock").run(run)
    assert time.monotonic() - started < 60


def test_a_peer_beside_a_backend(toy_model: Path) -> None:
    plan = Plan(str(toy_model), ("fss", "crypten-stock-all"), rounds=1, repeat=2)
    comparison = compare(plan)
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    jsonschema.validate(data, json_schema("compare"))
    fss, stock = data["contenders"]
    assert fss["whole"] is None and stock["online"] is None and stock["offline"] is None
    assert stock["model"]["relu_kept"] == stock["model"]["relu_total"] == 512
    values = stock["whole"]["latency_ms"]["values"]
    assert values == [v for one in data["rounds"] for v in one["online_ms"][stock["name"]]]
    assert all(list(one["offline_ms"]) == ["fss"] for one in data["rounds"])
    last = data["ratios"][-1]
    assert (last["contender"], last["over"]) == ("crypten-stock-all", "fss")
    assert last["online_latency"]["median"] > 1 and last["online_bytes"] is None

    console = Console(width=140, record=True, file=io.StringIO())
    print_comparison(console, comparison)
    text = console.export_text()
    assert "* the whole inference" in text and "crypten-stock-all" in text
    path = toy_model.parent / "compare.json"
    path.write_text(json.dumps(data))
    markdown = runpy.run_path(str(TABLES))["main"](["compare", str(path)])
    assert "CrypTen as distributed, all ReLUs" in markdown and "(whole)" in markdown


def test_a_peer_is_not_measured_behind_an_emulated_network(toy_model: Path) -> None:
    plan = Plan(str(toy_model), ("fss", "crypten-stock"), rounds=1, repeat=1, network="1:1000")
    fss, stock = compare(plan).contenders
    assert fss.not_run is None
    assert stock.not_run == "a peer runs on loopback and the CPU only"
    assert dataclasses.asdict(stock)["whole"] is None
