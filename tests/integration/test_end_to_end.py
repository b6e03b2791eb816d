"""Whole commands as a user types them: export, run in three processes, read the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi_system.bench.schema import json_schema


class Unseen(nn.Module):
    """Nothing the package knows: residual and concat branches, a depthwise convolution, one ReLU
    module used three times, a functional in-place ReLU and functional pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.left = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.right = nn.Conv2d(8, 4, 1, stride=2)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(x + self.pointwise(self.depthwise(x)))
        x = F.max_pool2d(x, 2)
        x = torch.cat([self.relu(self.left(x)), F.relu(self.right(x), inplace=True)], 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def build() -> nn.Module:
    """The factory that ``pi-export --from`` calls: the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Unseen()


def command(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bench(*arguments: str) -> dict[str, Any]:
    """``pi-bench run`` as JSON, checked against the schema by an independent validator."""
    text = command("pi_system.cli.bench", "run", "--format", "json", *arguments)
    result: dict[str, Any] = json.loads(text)
    jsonschema.validate(result, json_schema())
    return result


@pytest.mark.parametrize(
    ("backend", "relus"), [("fss", 0), ("fss", 700), ("fss", None), ("crypten", 700)]
)
def test_an_unseen_network_runs_privately(tmp_path: Path, backend: str, relus: int | None) -> None:
    budget = [] if relus is None else ["--relus", str(relus)]
    model, images = tmp_path / "model", tmp_path / "images.npy"
    factory = f"{Path(__file__)}:build"
    command(
        "pi_system.cli.export", "--from", factory, "--input", "3x12x12", *budget, "-o", str(model)
    )
    pixels = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)
    np.save(images, pixels)
    result = bench(
        "--model", str(model), "--images-file", str(images), "--repeat", "3",
        "--warmup", "0", "--backend", backend,
    )  # fmt: skip
    assert result["accuracy"]["max_abs_error"] < 0.01
    assert result["accuracy"]["argmax_agreement"] == 1.0
    kept = result["model"]["relu_kept"]
    assert kept == (result["model"]["relu_total"] if relus is None else relus)
    if relus is None:
        # The exported network is the module itself, not only the graph's own idea of it.
        with torch.inference_mode():
            expected = build().eval()(torch.from_numpy(pixels)).argmax(1).tolist()
        assert [p["private"] for p in result["predictions"]] == [str(e) for e in expected]


@pytest.mark.parametrize(
    ("backend", "least", "most"),
    [
        ("crypten", 0.07, 0.11),  # the same bytes for every ReLU: 9 % of them, 9 % of the bytes
        ("fss", 0.07, 0.16),  # a ring of 64 bits, where all ReLUs kept need about half of that
    ],
)
def test_the_student_pays_for_its_own_relus_only(backend: str, least: float, most: float) -> None:
    once = ("--backend", backend, "--warmup", "0")
    student = bench("--model", "demo", "--images", "2", "--repeat", "2", *once)
    teacher = bench("--model", "demo-teacher", "--images", "1", "--repeat", "1", *once)
    assert student["model"]["relu_kept"] <= 12_500
    assert teacher["model"]["relu_kept"] == teacher["model"]["relu_total"] == 139_264
    ratio = student["online"]["relu_bytes"] / teacher["online"]["relu_bytes"]
    assert least < ratio < most
    for result in (student, teacher):
        assert result["accuracy"]["argmax_agreement"] == 1.0
        assert result["offline"]["bytes"]["dealer_to_server"] > 0


def test_a_client_is_thin_at_full_width() -> None:
    """Every weight of the server's network is 11 million words, which the client never holds."""
    result = bench("--model", "random:resnet18@49600", "--repeat", "2", "--warmup", "0")
    assert result["model"]["relu_kept"] == 49600
    assert result["peak_memory_mb"]["client"] < 200
    assert result["peak_memory_mb"]["server"] < 1000
