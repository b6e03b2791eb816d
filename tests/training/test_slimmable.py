"""SENet++: several widths in one network, each of them an ordinary one when it is cut out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pi_system import checkpoint, nn
from pi_system.errors import UsageError
from training import data, pictures, recipe, senet
from training.distill import FinetuneStage
from training.loop import Run, accuracy
from training.recipe import Widths
from training.slimmable import Slimmable

from .test_loop import Stop, StopAfter, assert_same

ROOT = Path(__file__).parents[2]
NARROW, FULL = "student-0.5", "student"


def at_widths(run: Run, *fractions: float) -> Run:
    return dataclasses.replace(
        run, recipe=dataclasses.replace(run.recipe, widths=Widths(fractions))
    )


@pytest.fixture(scope="module")
def base(cifar10: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose teacher and sensitivities all runs of this module share."""
    folder = tmp_path_factory.mktemp("widths")
    chosen = recipe.load(str(recipe_path))
    return Run(folder / "run", chosen, data.load("cifar10", cifar10), shared=folder / "shared")


@pytest.fixture(scope="module")
def run(base: Run) -> Run:
    """A finished run at half and at full width."""
    run = at_widths(base, 0.5, 1.0)
    senet.train(run)
    return run


@pytest.fixture(scope="module")
def images(run: Run) -> Tensor:
    return data.normalise(run.dataset.test.pixels, run.dataset.mean, run.dataset.std)


def trained(run: Run) -> Slimmable:
    """The slimmable network of a finished run, from the state of its last epoch."""
    teacher = checkpoint.load(run.folder("teacher") / "teacher")[0]
    stage = FinetuneStage(run, teacher, teacher)
    stage.restore()
    assert stage.done == stage.epochs and isinstance(stage.model, Slimmable)
    return stage.model.eval()


def test_a_width_cut_out_is_the_slimmable_network_at_that_width(run: Run, images: Tensor) -> None:
    whole = trained(run)
    for fraction, name in ((0.5, NARROW), (1.0, FULL)):
        alone, manifest = checkpoint.load(run.directory / name)
        assert manifest.width == 8 * fraction
        with torch.no_grad():
            logits = alone(images)
            assert torch.equal(logits, whole.at(fraction)(images))
        assert len(logits.unique()) > 1
    with torch.no_grad():
        assert torch.equal(logits, whole(images)), "called, it is the full network"


def test_the_narrow_network_is_the_first_channels_of_the_full_one(run: Run) -> None:
    narrow = load_file(run.directory / NARROW / "model.safetensors")
    full = load_file(run.directory / FULL / "model.safetensors")
    assert narrow.keys() == full.keys()
    own = 0
    for name, part in narrow.items():
        first = full[name][tuple(slice(size) for size in part.shape)]
        if "bn" in name or "shortcut.1" in name:
            own += not torch.equal(part, first)
        else:
            assert torch.equal(part, first), name
    assert own, "batch norms are switched, not shared"
    masks = [name for name in narrow if name.endswith("mask")]
    assert len(masks) == 9
    for name in masks:
        assert len(narrow[name]) == len(full[name]) // 2
    assert any(narrow[name].any() for name in masks)


def test_counts_of_each_width_are_its_own(run: Run) -> None:
    teacher, narrow, full = senet.train(run)
    assert (narrow.model, full.model) == (NARROW, FULL)
    assert full.relu_kept == 3000 and narrow.relu_total == full.relu_total // 2 == 19456
    masks = load_file(run.directory / "masks.safetensors")
    assert narrow.relu_kept == sum(int(m[: len(m) // 2].sum()) for m in masks.values())
    assert checkpoint.load(run.directory / NARROW)[1].relu_kept == narrow.relu_kept < 3000
    # Convolutions of 3x3, then the shortcuts, then the linear layer of resnet10 on 32x32.
    for result, w in ((narrow, 4), (full, 8)):
        convs = 3 * w * 9 * 1024 + 2 * w * w * 9 * 1024
        for size, c in ((256, 2 * w), (64, 4 * w), (16, 8 * w)):
            convs += (c // 2 * c * 9 + c * c * 9 + c // 2 * c) * size
        assert result.macs == convs + 8 * w * 10
    assert teacher.macs == full.macs
    for result in (narrow, full):
        model, _ = checkpoint.load(run.directory / result.model)
        assert result.test_accuracy == accuracy(model, run.dataset.test, run.dataset)
        assert result.validation_accuracy == accuracy(model, run.split()[1], run.dataset)
    document = json.loads((run.directory / "finetune.json").read_text())
    assert [row["relu_kept"] for row in document["widths"]] == [narrow.relu_kept, 3000]


def test_the_narrow_width_learns(run: Run, base: Run, tmp_path: Path) -> None:
    """Its loss falls too: the gradients of both widths reach the shared weights."""
    teacher, start = senet.find_masks(base)
    stage = FinetuneStage(dataclasses.replace(run, directory=tmp_path), teacher, start)
    train, _ = run.split()
    pixels = data.normalise(train.pixels[:20], run.dataset.mean, run.dataset.std)
    stage.model.train()
    loss, _ = stage.loss(pixels, train.labels[:20])
    loss.backward()  # type: ignore[no-untyped-call]
    assert isinstance(stage.model, Slimmable)
    both = stage.model.full.get_submodule("conv1").weight.grad
    parts = []
    for part in stage._step.parts:  # type: ignore[attr-defined]
        stage.model.zero_grad()
        logits, acts = stage._teacher(pixels)
        part(pixels, train.labels[:20], logits, acts)[0].backward()
        parts.append(stage.model.full.get_submodule("conv1").weight.grad.clone())
    assert parts[0][:4].any() and not parts[0][4:].any()
    assert torch.allclose(both, parts[0] + parts[1], rtol=1e-4, atol=1e-6)


def test_full_width_alone_is_ordinary_training(base: Run, tmp_path: Path) -> None:
    plain = dataclasses.replace(base, directory=tmp_path / "plain")
    one = at_widths(dataclasses.replace(base, directory=tmp_path / "one"), 1.0)
    assert senet.train(plain)[1] == senet.train(one)[1]
    weights = [load_file(r.directory / FULL / "model.safetensors") for r in (plain, one)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert [path.name for path in one.directory.glob("student*")] == [FULL]


@pytest.mark.parametrize("inside", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(run: Run, tmp_path: Path, inside: bool) -> None:
    stopped = dataclasses.replace(
        run, directory=tmp_path / "run", reporter=StopAfter(3, inside=inside)
    )
    with pytest.raises(Stop):
        senet.train(stopped)
    assert (stopped.directory / "finetune.state.safetensors").exists()
    assert not (stopped.directory / NARROW).exists()
    senet.train(dataclasses.replace(stopped, reporter=run.reporter))
    assert_same(stopped.directory, run.directory)


def test_the_picture(run: Run, tmp_path: Path) -> None:
    results = [senet.figures(directory) for directory in senet.students(run)]
    pictures.widths(results, tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 1000


def private_run(checkpoint: Path, images: Tensor, folder: Path) -> dict[str, Any]:
    """Export a checkpoint and classify normalised images (N, C, H, W) in three processes."""
    model, file = str(folder / "model"), str(folder / "images.npy")
    np.save(file, images.numpy())
    times = str(len(images))
    for arguments in (
        ["export", str(checkpoint), "-o", model],
        ["bench", "run", "--model", model, "--images-file", file, "--repeat", times,
         "--format", "json"],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", f"pi_system.cli.{arguments[0]}", *arguments[1:]],
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["accuracy"]["answers"] == len(images)
    return result


def test_a_narrow_student_runs_privately(run: Run, images: Tensor, tmp_path: Path) -> None:
    result = private_run(run.directory / NARROW, images[:6], tmp_path)
    kept = nn.count_relus(checkpoint.load(run.directory / NARROW)[0]).kept
    assert result["model"]["relu_kept"] == kept and result["model"]["relu_total"] == 19456
    assert result["accuracy"]["argmax_agreement"] == 1
    assert 0 < result["accuracy"]["max_abs_error"] < 0.05


@pytest.mark.parametrize(
    "fractions", [(), (0.5,), (1.0, 0.5), (0.5, 0.5, 1.0), (0.0, 1.0), (-0.5, 1.0), (0.3, 1.0)]
)
def test_bad_widths_are_refused(base: Run, fractions: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"fractions|whole number"):
        at_widths(base, *fractions)


@pytest.mark.parametrize("arch", ["resnet10", "wrn22_8", "vgg16"])
def test_every_architecture_has_widths(base: Run, arch: str) -> None:
    chosen = dataclasses.replace(base.recipe, arch=arch, width=4, widths=Widths((0.25, 1.0)))
    run = dataclasses.replace(base, recipe=chosen)
    from training import teacher

    full = teacher.masked(run, teacher.fresh(run, "teacher"))
    whole = Slimmable(run, full, (0.25, 1.0)).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(whole.at(0.25)(x), whole.cut(0.25)(x))
        assert torch.equal(whole(x), full(x))
