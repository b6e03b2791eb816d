"""Sparse training keeps its density; the profile comes from what it kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training import data, recipe, sensitivity
from training.loop import Run
from training.sensitivity import SensitivityStage, SparseWeights


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1.0])
def test_updates_keep_the_global_density(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (10, 16)}
    weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    total = sum(w.numel() for w in weights.values())
    sparse = SparseWeights(weights, density, generator)
    for rate in (0.9, 0.5, 0.1, 0.0):
        momenta = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        sparse.update(rate, momenta)
        assert sparse.kept == max(1, round(density * total))
        for name, weight in weights.items():
            assert not weight[~sparse.masks[name]].any()


def test_the_smallest_go_and_the_largest_momenta_come() -> None:
    weights = {"w": torch.tensor([[4.0, -1.0, 3.0, 0.5, 9.0, 9.0]])}
    sparse = SparseWeights(weights, 1.0, torch.Generator())
    sparse.masks["w"][0, 4:] = False
    sparse.apply()
    sparse.update(0.5, {"w": torch.tensor([[1.0, 1.0, 1.0, 2.0, 0.5, -7.0]])})
    # -1 and 0.5 are pruned; the largest momenta among the missing are -7 and 2.
    assert sparse.masks["w"].tolist() == [[True, False, True, True, False, True]]
    assert weights["w"].tolist() == [[4.0, 0.0, 3.0, 0.5, 0.0, 0.0]]


def test_regrowth_follows_the_momentum_of_the_layers() -> None:
    weights = {"a": torch.ones(100), "b": torch.ones(100)}
    sparse = SparseWeights(weights, 0.2, torch.Generator().manual_seed(0))
    before = {n: int(m.sum()) for n, m in sparse.masks.items()}
    sparse.update(0.5, {"a": torch.full((100,), 3.0), "b": torch.full((100,), 1.0)})
    after = {n: int(m.sum()) for n, m in sparse.masks.items()}
    assert before == {"a": 20, "b": 20}
    assert after == {"a": 25, "b": 15}


def test_stage_keeps_density_and_writes_the_profile(
    cifar10: Path, recipe_path: Path, tmp_path: Path
) -> None:
    chosen = recipe.load(str(recipe_path))
    run = Run(tmp_path / "run", chosen, data.load("cifar10", cifar10))
    profile = sensitivity.run_stage(run)
    document = json.loads((tmp_path / "run" / "sensitivity.json").read_text())
    assert document["density"] == pytest.approx(0.1, abs=1e-4)
    assert list(profile) == [layer["site"] for layer in document["layers"]]
    assert len(profile) == 9
    for layer in document["layers"]:
        assert layer["eta_theta"] == layer["parameters_kept"] / layer["parameters"]
        assert profile[layer["site"]] == 1 - layer["eta_theta"]
        assert layer["feeding_layers"]

    stage = SensitivityStage(run)
    stage.restore()
    for name, weight in stage.sparse.weights.items():
        assert not weight[~stage.sparse.masks[name]].any()
    assert sensitivity.run_stage(run) == profile
