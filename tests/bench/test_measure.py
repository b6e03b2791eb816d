"""A whole measurement with real processes: the JSON, and what its figures must add up to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from pi_system.bench.measure import Measurement, measure
from pi_system.bench.schema import Result, json_schema
from pi_system.bench.table import print_result
from pi_system.errors import IntegrityError
from pi_system.models import resolve

FRAME = 4


@pytest.fixture
def plan(
    parties: Callable[[], dict[str, int]],
    toy_model: Path,
    toy_images: npt.NDArray[np.float32],
) -> Measurement:
    return Measurement(
        model=str(toy_model),
        graph=resolve(str(toy_model)),
        backend="toy_backends:Plain",
        images=toy_images,
        labels=np.array([3, 1, 4]),
        batch=2,
        repeat=3,
    )


def test_a_result_fits_the_schema_and_its_figures_fit_each_other(
    plan: Measurement, toys: ModuleType
) -> None:
    result = measure(plan)
    data: dict[str, Any] = json.loads(json.dumps(result.to_json(), allow_nan=False))
    jsonschema.validate(data, json_schema())
    assert next(iter(data)) == "schema_version" and data["schema_version"] == 1

    graph, online = toys.toy_graph(), data["online"]
    assert data["model"] == {
        "name": "toy", "dataset": "toys", "relu_total": 512, "relu_kept": 256,
        "relu_layers": 2, "sha256": graph.sha256(),
    }  # fmt: skip
    assert len(online["latency_ms"]["values"]) == 3
    # What measures the link is no part of the setup.
    assert data["setup"]["bytes"]["client_to_server"] < 1000

    # What the toy protocol sends, counted by hand: a command, the images, 128 bytes each way
    # per ReLU layer, the logits.
    images, logits = 2 * 3 * 8 * 8 * 4 + FRAME, 2 * 10 * 4 + FRAME
    relus = 2 * (128 + FRAME)
    assert online["bytes"] == {
        "client_to_server": len("online 1") + FRAME + images + relus,
        "server_to_client": relus + logits,
    }
    assert online["relu_bytes"] == 2 * relus
    # image; layer 1 (the server's half needs the image); layer 2; logits
    assert online["round_trips"] == 2
    for direction, total in online["bytes"].items():
        assert sum(layer["bytes"][direction] for layer in online["layers"]) == total
    kinds = {layer["name"]: layer for layer in online["layers"]}
    assert list(kinds) == ["session", "relu1", "relu2"]
    assert kinds["relu1"]["relus_kept"] == 128 and kinds["relu1"]["relus_total"] == 256
    assert kinds["relu1"]["milliseconds"]["server"] > 0

    item = toys.ITEM + FRAME
    assert data["offline"]["bytes"] == {
        "client_to_server": len("offline 1") + FRAME,
        "server_to_client": len("done") + FRAME,
        "dealer_to_server": item,
        "dealer_to_client": item,
        "server_to_dealer": 4 + FRAME,
        "client_to_dealer": 0,
    }
    assert data["setup"]["seconds"] > 0 and data["setup"]["bytes"]["server_to_client"] > 500

    expected = toys.forward(graph, plan.images)
    correct = int((expected.argmax(1) == plan.labels).sum())
    assert data["accuracy"] == {
        "images": 3,
        "answers": 5,  # images 0 and 1, 2 (padded), 0 and 1 again
        "argmax_agreement": 1.0,
        "max_abs_error": pytest.approx(0, abs=1e-4),
        "correct": correct,
        "plaintext_correct": correct,
        "retries": 0,
        "stated_error": None,
        "beyond_stated": 0,
    }
    assert [row["image"] for row in data["predictions"]] == [0, 1, 2]
    assert data["predictions"][0]["label"] == "class 3"
    check_table(result)


def check_table(result: Result) -> None:
    console = Console(width=100, record=True, quiet=True)
    with console.capture():
        print_result(console, result, predictions=True, layers=True)
    quiet = Console(width=100, file=None)
    with quiet.capture() as captured:
        print_result(quiet, result, predictions=True, layers=True)
    text = captured.get()
    for words in ("256 of 512 ReLUs", "2 round trips", "5 of 5 answers", "relu2", "class 3"):
        assert words in text


def test_a_model_changed_under_the_parties_is_noticed(plan: Measurement, toys: ModuleType) -> None:
    changed = Measurement(
        model=plan.model, graph=toys.toy_graph(seed=1), backend=plan.backend, images=plan.images
    )
    with pytest.raises(IntegrityError, match="not the plaintext one"):
        measure(changed)


def test_an_emulated_network_costs_its_round_trips_and_its_bandwidth(plan: Measurement) -> None:
    near = measure(dataclasses.replace(plan, repeat=2))
    far = measure(dataclasses.replace(plan, repeat=2, network="40:10"))
    jsonschema.validate(json.loads(json.dumps(far.to_json())), json_schema())
    network = far.network
    assert (network.name, network.rtt_ms, network.mbps) == ("40:10", 40, 10)
    assert 40 <= network.measured["rtt_ms"] < 60
    assert 7 < network.measured["mbps"] < 10.5
    assert far.online.bytes == near.online.bytes
    assert far.online.round_trips == near.online.round_trips
    least = 40 * far.online.round_trips + 8e-3 * far.online.bytes.total / 10
    assert least < far.online.latency_ms.min < least + 60
    assert near.network.rtt_ms is None and near.network.measured["rtt_ms"] < 20
