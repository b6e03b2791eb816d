"""Fine-tuning with frozen masks: distillation and activation mismatch (SENet, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pi_system import checkpoint
from pi_system.nn import relu_sites, with_activations

from . import teacher as teacher_module
from .loop import Run, Stage
from .masks import channels_last, distillation, student_of
from .recipe import Phase

FOLDER = "student"
OUTPUT = "finetune.json"


def stage_sites(model: nn.Module) -> tuple[str, ...]:
    """The stage outputs: the last site before the resolution changes, and the last of all."""
    sites = list(relu_sites(model).items())
    return tuple(
        name
        for i, (name, site) in enumerate(sites)
        if i + 1 == len(sites) or sites[i + 1][1].mask.shape[1:] != site.mask.shape[1:]
    )


def attention(activation: Tensor) -> Tensor:
    """The unit-norm map of mean squares over channels: (N, C, H, W) to (N, H*W)."""
    return F.normalize(activation.pow(2).mean(1).flatten(1), dim=1)


def pram(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Post-ReLU activation mismatch: mean squared difference of the maps, summed over stages."""
    total = student[0].new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        total = total + (attention(ours) - attention(theirs)).pow(2).mean()
    return total


class _DistillStep(nn.Module):
    """Loss and logits in one graph."""

    def __init__(
        self, student: nn.Module, ce: float, kl: float, pram: float, temperature: float
    ) -> None:
        super().__init__()
        self.student = student
        self.ce, self.kl, self.pram, self.temperature = ce, kl, pram, temperature

    def forward(
        self, images: Tensor, labels: Tensor, logits_ar: Tensor, acts_ar: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits, acts = self.student(images)
        loss = (
            self.ce * F.cross_entropy(logits, labels)
            + self.kl * distillation(logits, logits_ar, self.temperature)
            + self.pram * pram(acts, acts_ar)
        )
        return loss, logits.detach()


class FinetuneStage(Stage):
    """``ce * CE + kl * KL + pram * PRAM`` with masks that no longer move.

    Args:
        teacher: the all-ReLU network, in evaluation mode.
        start: the network of the mask search; it is copied.
    """

    name = "finetune"

    def __init__(self, run: Run, teacher: fx.GraphModule, start: fx.GraphModule) -> None:
        settings = run.recipe.finetune
        student = student_of(run, start)
        super().__init__(run, student, (Phase(settings.epochs),), settings.optimizer)
        sites = stage_sites(student)
        self._step = run.compiled(
            _DistillStep(
                with_activations(student, sites),
                settings.ce,
                settings.kl,
                settings.pram,
                settings.temperature,
            )
        )
        teacher.to(memory_format=run.recipe.memory_format)  # type: ignore[call-overload]
        channels_last(teacher)
        self._teacher = run.compiled(with_activations(teacher.eval(), sites))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_ar, acts_ar = self._teacher(images)
        loss, logits = self._step(images, labels, logits_ar, acts_ar)
        return loss, logits


def run_stage(run: Run, teacher: fx.GraphModule, start: fx.GraphModule) -> fx.GraphModule:
    """Fine-tune, write ``finetune.json`` and save the student in ``student/``.

    Returns:
        The student in evaluation mode.
    """
    stage = FinetuneStage(run, teacher, start)
    stage.fit()
    path = run.directory / FOLDER
    if not (path / "manifest.json").exists():
        checkpoint.save(
            path,
            stage.model,
            teacher_module.manifest(
                run,
                budget=run.recipe.relu_budget,
                method="senet",
                source="distilled from the teacher of the same recipe",
                validation_accuracy=stage.rows[-1].validation_accuracy,
            ),
        )
    model, manifest = checkpoint.load(path)
    run.write_json(
        OUTPUT,
        {
            "stage": stage.name,
            "digest": run.recipe.digest(stage.name),
            "stage_sites": list(stage_sites(model)),
            "relu_kept": manifest.relu_kept,
            "validation_accuracy": manifest.validation_accuracy,
        },
    )
    return model
