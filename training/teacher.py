"""The teacher: the all-ReLU network that budgets, masks and distillation refer to."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pi_system import checkpoint
from pi_system.checkpoint import Manifest
from pi_system.nn import build, count_relus, linearize

from .loop import Run, Stage, derive_seed

FOLDER = "teacher"
OUTPUT = "teacher.json"


class TeacherStage(Stage):
    """Cross-entropy from random weights.

    The network trains with ordinary ReLUs, which run faster than full masks, and becomes a
    masked one when it is saved.
    """

    name = "teacher"

    def __init__(self, run: Run) -> None:
        settings = run.recipe.teacher
        super().__init__(run, fresh(run, self.name), settings.phases, settings.optimizer)
        self._forward = run.compiled(self.model)
        self._smoothing = settings.label_smoothing

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._forward(images)
        return F.cross_entropy(logits, labels, label_smoothing=self._smoothing), logits


def fresh(run: Run, stage: str, width: int | None = None) -> nn.Module:
    """The recipe's network, or one of another width, with weights drawn from (seed, ``stage``)."""
    recipe = run.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, f"{stage}/init", 0))
        return build(
            recipe.arch,
            classes=len(run.dataset.classes),
            width=recipe.width if width is None else width,
            in_channels=run.dataset.train.shape[0],
        )


def masked(run: Run, model: nn.Module) -> fx.GraphModule:
    """``model`` as a masked network with full masks; parameters are shared."""
    return linearize(model, torch.zeros(2, *run.dataset.train.shape))


def train(run: Run) -> fx.GraphModule:
    """Train the teacher, or go on with it, and save it in ``teacher/``.

    Returns:
        The masked network with full masks, in evaluation mode.
    """
    path = run.folder(TeacherStage.name) / FOLDER
    if run.read_json(OUTPUT, TeacherStage.name) is None:
        stage = TeacherStage(run)
        stage.fit()
        model = masked(run, stage.model).eval()
        measured = stage.rows[-1].validation_accuracy
        save(
            run,
            path,
            model,
            budget=count_relus(model).total,
            method="teacher",
            source="trained from random weights",
            validation_accuracy=measured,
        )
        run.write_json(OUTPUT, stage.name, {"validation_accuracy": measured})
    return checkpoint.load(path)[0]


def save(
    run: Run,
    path: Path,
    model: nn.Module,
    *,
    budget: int,
    method: str,
    source: str,
    validation_accuracy: float | None,
    width: int | None = None,
) -> None:
    """Save ``model`` as a checkpoint of this run.

    Args:
        width: its channels where they are not the recipe's.

    Raises:
        UsageError: it keeps more ReLUs than ``budget``.
    """
    recipe = run.recipe
    manifest = Manifest(
        arch=recipe.arch,
        width=recipe.channels if width is None else width,
        classes=run.dataset.classes,
        input_shape=run.dataset.train.shape,
        dataset=recipe.dataset,
        mean=run.dataset.mean,
        std=run.dataset.std,
        relu_budget=budget,
        relu_kept=0,
        method=method,
        recipe=recipe.name,
        seed=recipe.seed_of("teacher" if method == "teacher" else "finetune"),
        source=source,
        validation_accuracy=validation_accuracy,
    )
    with run.writing() as mine:
        if mine:
            checkpoint.save(path, model, manifest)
