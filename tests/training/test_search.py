"""The mask search: where it starts and what it scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pi_system import nn
from training import data, recipe, teacher
from training.loop import Run
from training.masks import MaskStage, linearization_losses, top


@pytest.fixture(scope="module")
def run(cifar10: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    chosen = recipe.load(str(recipe_path))
    return Run(tmp_path_factory.mktemp("search"), chosen, data.load("cifar10", cifar10))


def search(run: Run, **settings: object) -> MaskStage:
    """A search that keeps a fifth of every layer of a random teacher."""
    masks = dataclasses.replace(run.recipe.masks, **settings)  # type: ignore[arg-type]
    run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, masks=masks))
    full = teacher.masked(run, teacher.fresh(run, "teacher")).eval()
    budgets = {layer.name: layer.total // 5 for layer in nn.count_relus(full).layers}
    return MaskStage(run, full, budgets)


def test_losses_are_what_the_relu_removes(run: Run) -> None:
    full = teacher.masked(run, teacher.fresh(run, "teacher")).eval()
    sites = tuple(nn.relu_sites(full))
    images = run.dataset.train.subset(torch.arange(30))
    losses = linearization_losses(full, sites, images, run, count=30)
    pixels = data.normalise(images.pixels, run.dataset.mean, run.dataset.std)
    stem = full.get_submodule("bn1")(full.get_submodule("conv1")(pixels))
    assert torch.allclose(losses[0], (stem.relu() - stem).abs().sum(0), atol=1e-4)


def test_a_start_from_the_teacher_keeps_the_largest_losses(run: Run) -> None:
    stage = search(run, start="teacher", start_images=40)
    train, _ = run.split()
    stage.before_first(train)
    full = teacher.masked(run, teacher.fresh(run, "teacher")).eval()
    losses = linearization_losses(full, tuple(stage.sites), train, run, count=40)
    for (name, site), loss in zip(stage.sites.items(), losses, strict=True):
        assert torch.equal(site.mask, top(loss, stage.budgets[name]))


@pytest.mark.parametrize("score", ["mismatch", "linearized"])
def test_scores_against_their_definition(run: Run, score: str) -> None:
    stage = search(run, score=score)
    train, _ = run.split()
    pixels = data.normalise(train.pixels[:20], run.dataset.mean, run.dataset.std)
    stage.model.train()
    sites = tuple(stage.sites)
    before = nn.with_activations(stage.model, sites, before=True)(pixels)[1]  # type: ignore[arg-type]
    stage.loss(pixels, train.labels[:20])
    full = teacher.masked(run, teacher.fresh(run, "teacher")).eval()
    with torch.no_grad():
        reference = nn.with_activations(full, sites)(pixels)[1]
    for site, entering, ours, sums in zip(
        stage.sites.values(), before, reference, stage._mismatch, strict=True
    ):
        partial = entering if score == "linearized" else site(entering)
        assert torch.allclose(sums, (ours - partial).abs().sum(0), atol=1e-4)


def test_an_epoch_keeps_the_top_scores_and_starts_anew(run: Run) -> None:
    stage = search(run)
    old = {name: site.mask.clone() for name, site in stage.sites.items()}
    scores = [torch.rand(site.mask.shape) for site in stage.sites.values()]
    stage._mismatch = scores
    distance = stage.after_epoch(0)
    assert distance is not None and distance > 0
    assert not stage._mismatch
    for (name, site), score in zip(stage.sites.items(), scores, strict=True):
        assert torch.equal(site.mask, top(score, stage.budgets[name]))
        assert site.kept == int(old[name].sum())
