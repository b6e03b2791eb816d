"""Recipes: all bundled ones parse, bad ones say why, digests follow what a stage depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pi_system.errors import UsageError
from training import methods, recipe
from training.recipe import Schedule

# Of the students of benchmarks/senet.toml at 7,000 ReLUs, seed 1.
PUBLISHED = {
    "uniform-random": "1d081b0768158ce9",
    "senet-random": "efb838b5b68a6b8e",
    "snl": "d33260c21dc1cb20",
    "senet": "2743a288abef592a",
    "senet+": "febd409ab00745aa",
    "senet-mismatch": "ff4734abfb1046d1",
    "taylor-oneshot": "7856330757587adc",
    "taylor-progressive": "3b355f877804de8c",
    "taylor-search-oneshot": "9bd437b28638f181",
}


@pytest.mark.parametrize("name", recipe.bundled())
def test_bundled_recipes_parse(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert len({loaded.digest(stage) for stage in recipe.STAGES}) == len(recipe.STAGES)


def test_the_bundled_set_is_complete() -> None:
    assert {"quick", "cifar100-resnet18-w16", "cifar100-resnet18", "cifar10-resnet18"} <= set(
        recipe.bundled()
    )


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="quick"):
        recipe.load("nothing")
    with pytest.raises(UsageError, match="cannot read"):
        recipe.load("nothing.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("relu_budget = 3000", "relu_budget = -1", "relu_budget"),
        ("width = 8", "widht = 8", "widht"),
        ('arch = "resnet10"', 'arch = "resnet11"', "resnet11"),
        ("batch = 20", "batch = 0", "batch"),
        ("validation = 20", "validation = -1", "validation"),
        ("density = 0.1", "density = 1.5", "density"),
        ('kind = "cosine"', 'kind = "sine"', "sine"),
        ("peak = 0.02", "peak = 0.0", "learning rate"),
        ("[masks]\nepochs = 2", "[masks]\nepochs = 0", "epochs"),
        ("[masks]\n", '[masks]\ngranularity = "row"\n', "granularity"),
        ("seed = 3", 'seed = "3"', "seed"),
    ],
)
def test_bad_values_are_named(
    recipe_path: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = recipe_path.read_text()
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=message):
        recipe.load(str(path))


def test_a_digest_covers_its_stage_and_those_before_it(recipe_path: Path) -> None:
    base = recipe.load(str(recipe_path))
    masks = dataclasses.replace(base, masks=dataclasses.replace(base.masks, ce=0.4))
    assert masks.digest("teacher") == base.digest("teacher")
    assert masks.digest("sensitivity") == base.digest("sensitivity")
    assert masks.digest("masks") != base.digest("masks")
    assert masks.digest("finetune") != base.digest("finetune")
    budget = dataclasses.replace(base, relu_budget=2999)
    assert budget.digest("sensitivity") == base.digest("sensitivity")
    assert budget.digest("masks") != base.digest("masks")
    assert dataclasses.replace(base, seed=4).digest("teacher") != base.digest("teacher")


def test_schedules() -> None:
    cycle = Schedule("one-cycle", 1.0, warmup=0.5, start=0.2, final=0.0)
    assert [cycle.at(x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [0.2, 0.6, 1, 0.5, 0]
    )
    assert [Schedule("constant", 0.3).at(x) for x in (0.0, 0.9)] == [0.3, 0.3]
    cosine = Schedule("cosine", 2.0, final=0.5)
    assert [cosine.at(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 1.5, 1.0])
    steps = Schedule("steps", 1.0, milestones=(0.5, 0.75), decay=0.1)
    assert [steps.at(x) for x in (0.0, 0.5, 0.8)] == pytest.approx([1.0, 0.1, 0.01])


def test_digests_of_published_results_stay() -> None:
    """Results name the digest of their recipe: a setting added later must not change it."""
    assert [recipe.load("cifar100-resnet10-w16").digest(stage)[:16] for stage in recipe.STAGES] == [
        "3516b7b3afa5084d",
        "b9eeda8d3ea48c91",
        "bc4c10d5a9f0f519",
        "77fdbd1aaefd9875",
    ]
    demo = recipe.load("cifar100-resnet18-w16")
    assert demo.digest("finetune")[:16] == "baad350b0e85f3c5"
    base = recipe.load("cifar100-resnet10-w16")
    found = {m: methods.apply(base, m, 7000, 1).digest("finetune")[:16] for m in PUBLISHED}
    assert found == PUBLISHED


def test_widths_belong_to_fine_tuning_alone(recipe_path: Path) -> None:
    base = recipe.load(str(recipe_path))
    wide = dataclasses.replace(base, widths=recipe.Widths((0.5, 1.0)))
    for stage in recipe.STAGES[:3]:
        assert wide.digest(stage) == base.digest(stage)
    assert wide.digest("finetune") != base.digest("finetune")


def test_a_base_gives_what_a_recipe_leaves_out(recipe_path: Path, tmp_path: Path) -> None:
    base = recipe.load(str(recipe_path))
    path = tmp_path / "child.toml"
    path.write_text(
        f'base = "{recipe_path}"\nname = "child"\n[finetune]\nepochs = 7\n'
        '[finetune.optimizer]\nschedule = { kind = "steps", peak = 0.5 }\n'
    )
    child = recipe.load(str(path))
    optimizer = dataclasses.replace(base.finetune.optimizer, schedule=Schedule("steps", 0.5))
    finetune = dataclasses.replace(base.finetune, epochs=7, optimizer=optimizer)
    assert child == dataclasses.replace(base, name="child", finetune=finetune)
    (tmp_path / "grandchild.toml").write_text('base = "child.toml"\nseed = 9\n')
    assert recipe.load(str(tmp_path / "grandchild.toml")) == dataclasses.replace(child, seed=9)
    for text, message in [
        ('base = "child.toml"\n', "its own base"),
        ('base = "nothing"\n', "bundled"),
        ("base = 3\n", "base: expected"),
        ('base = "quick"\nwidht = 8\n', "widht"),
        ('base = "quick"\nteacher = 3\n', "expected a table"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            recipe.load(str(path))
