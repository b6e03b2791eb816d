"""The full-width recipes: each trains for some steps, on images of its data set's shape."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pi_system import checkpoint, nn
from training import data, recipe, smoke
from training.cli import cli

NETWORKS = ("resnet18", "resnet34", "vgg16", "wrn22-8")
RECIPES = [f"{d}-{n}" for d in ("cifar100", "tiny-imagenet", "imagenet") for n in NETWORKS]


def test_every_network_has_a_recipe_on_every_data_set() -> None:
    assert {f"cifar10-{n}" for n in NETWORKS} | set(RECIPES) <= set(recipe.bundled())


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_for_some_steps(name: str, tmp_path: Path) -> None:
    """Every stage at the recipe's resolution; fewer channels, or it would take minutes."""
    full = recipe.load(name)
    width = full.channels // 16
    slim = dataclasses.replace(
        full, width=width, relu_budget=full.relu_budget // 16, threads=1, compile=False
    )
    paces = smoke.run(slim, tmp_path, steps=2, batch=2)
    assert [pace.stage for pace in paces] == list(recipe.STAGES)
    assert all(pace.images_per_second > 0 and pace.hours is None for pace in paces)
    student, manifest = checkpoint.load(tmp_path / "student")
    facts = data.KNOWN[full.dataset]
    assert manifest.input_shape == facts.shape and len(manifest.classes) == facts.classes
    count = nn.count_relus(student)
    assert count.kept == slim.relu_budget
    # The comment says how many the network has at full width.
    text = (recipe.BUNDLED / f"{name}.toml").read_text()
    if "base" in text and "ReLUs kept" in text:
        assert f"of {16 * count.total:,} ReLUs kept" in text.replace("\n# ", " ")
        assert f"{full.relu_budget:,} of" in text


def test_the_command_at_the_recipes_own_batch(recipe_path: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli, ["smoke", "--recipe", str(recipe_path), "--steps", "3", "--format", "json"]
    )
    assert done.exit_code == 0, done.stderr
    rows = {row["stage"]: row for row in json.loads(done.stdout)}
    assert [row["epochs"] for row in rows.values()] == [2, 2, 2, 2]
    for row in rows.values():
        expected = row["epochs"] * (50_000 - 20) / row["images_per_second"] / 3600
        assert row["hours"] == pytest.approx(expected, abs=0.06, rel=0.01)
    # Two phases of three steps; the first step of an epoch is not timed.
    assert rows["teacher"]["steps"] == 4 and rows["finetune"]["steps"] == 2


def test_synthetic_images_have_the_shape_and_every_class() -> None:
    for name, facts in data.KNOWN.items():
        made = data.synthetic(name, 4, 3)
        assert made.train.shape == facts.shape and len(made.test) == 3
        assert len(made.classes) == facts.classes and len(made.mean) == facts.shape[0]
        assert torch.equal(made.train.block(0, 4), data.synthetic(name, 4, 3).train.block(0, 4))
