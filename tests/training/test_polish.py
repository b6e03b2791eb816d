"""The block-coordinate polish: what it drops, and by which rule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi_system import nn
from pi_system.errors import UsageError
from training import data, methods, recipe, senet, teacher
from training.loop import Run, accuracy
from training.polish import polish, without
from training.recipe import Masks, Optimizer, Polish, Schedule


@pytest.fixture(scope="module")
def run(cifar10: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    chosen = recipe.load(str(recipe_path))
    folder = tmp_path_factory.mktemp("polish")
    return Run(folder / "run", chosen, data.load("cifar10", cifar10), shared=folder / "shared")


def network(run: Run, kept: int) -> torch.nn.Module:
    """A random network whose first layers keep ``kept`` ReLUs."""
    model = teacher.masked(run, teacher.fresh(run, "teacher")).eval()
    for site in nn.relu_sites(model).values():
        mask = torch.zeros(site.total, dtype=torch.bool)
        mask[: min(kept, site.total)] = True
        kept -= int(mask.sum())
        site.set_mask(mask.view(site.mask.shape))
    return model


def test_a_block_is_dropped_from_what_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(4, 5, generator=generator) < 0.5, torch.rand(30, generator=generator) < 0.2]
    kept = sum(int(m.sum()) for m in masks)
    for count in (0, 1, 7, kept):
        fewer = without(masks, count, generator)
        assert sum(int(m.sum()) for m in fewer) == kept - count
        assert all(not (new & ~old).any() for new, old in zip(fewer, masks, strict=True))
    dropped = torch.zeros(20)
    for _ in range(300):
        dropped += (masks[0] & ~without(masks, 3, generator)[0]).reshape(-1)
    assert (dropped[masks[0].reshape(-1)] > 5).all(), "every kept position is drawn sometimes"


@pytest.mark.parametrize("tolerance", [0.0, 0.0101, 1.0])
def test_the_rule_of_acceptance(run: Run, tolerance: float) -> None:
    run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, relu_budget=6000))
    settings = Polish(block=900, tolerance=tolerance, trials=3)
    images = run.dataset.train
    model, twin = network(run, 9000), network(run, 9000)
    before = accuracy(model, images, run.dataset)
    blocks = polish(run, model, images, settings, torch.Generator().manual_seed(1))
    assert nn.count_relus(model).kept == 6000
    assert [block["relus"] for block in blocks] == [900, 900, 900, 300]
    assert accuracy(model, images, run.dataset) == blocks[-1]["after"]

    # The same draws, decided again by the rule as it is written.
    generator = torch.Generator().manual_seed(1)
    sites = list(nn.relu_sites(twin).values())
    for block in blocks:
        assert block["before"] == before
        masks, trials = [site.mask.clone() for site in sites], []
        for _ in range(block["tried"]):
            fewer = without(masks, block["relus"], generator)
            for site, mask in zip(sites, fewer, strict=True):
                site.set_mask(mask)
            trials.append((accuracy(twin, images, run.dataset), fewer))
        falls = [before - after for after, _ in trials]
        assert not any(fall < tolerance for fall in falls[:-1])
        if falls[-1] < tolerance:
            after, fewer = trials[-1]
        else:
            assert block["tried"] == 3
            after, fewer = max(trials, key=lambda trial: trial[0])
        assert after == block["after"]
        for site, mask in zip(sites, fewer, strict=True):
            site.set_mask(mask)
        before = after
    ours = nn.relu_sites(model).values()
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(ours, sites, strict=True))
    if tolerance == 1.0:
        assert all(block["tried"] == 1 for block in blocks)


def test_the_search_ends_above_the_budget_and_the_polish_at_it(run: Run) -> None:
    chosen = methods.apply(run.recipe, "senet+polish", 3000, seed=1)
    assert chosen.searched(38912) == 3300 and chosen.searched(3100) == 3100
    assert dataclasses.replace(chosen, relu_budget=0).searched(38912) == 0
    run = dataclasses.replace(run, recipe=chosen)
    _, found = senet.find_masks(run)
    assert nn.count_relus(found).kept == 3000
    document = json.loads((run.directory / "masks.json").read_text())
    assert [block["relus"] for block in document["polish"]] == [100, 100, 100]
    assert document["relu_kept"] == 3000
    assert (
        sum(int(m.sum()) for m in load_file(run.directory / "masks.safetensors").values()) == 3000
    )


def test_what_cannot_be_polished_is_refused() -> None:
    optimizer = Optimizer(Schedule("constant", 0.1))
    for settings in ({"granularity": "channel"}, {"method": "random", "epochs": 0}):
        with pytest.raises(UsageError, match="polish"):
            Masks(**{"epochs": 1, "optimizer": optimizer, "polish": Polish()} | settings)
    for bad in ({"block": 0}, {"extra": 0.0}, {"tolerance": -0.1}, {"trials": 0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            Polish(**bad)
