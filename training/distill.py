"""Fine-tuning with frozen masks: distillation and activation mismatch (SENet, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from pi_system import checkpoint
from pi_system.nn import count_relus, relu_sites, with_activations

from . import teacher as teacher_module
from .loop import Run, Stage
from .losses import Distill
from .masks import channels_last, student_of
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
        sites = stage_sites(student) if settings.pram else ()
        self._step = run.compiled(
            Distill(
                with_activations(student, sites),
                settings.ce,
                settings.kl,
                settings.temperature,
                settings.pram,
            )
        )
        teacher.to(memory_format=run.recipe.memory_format)  # type: ignore[call-overload]
        channels_last(teacher)
        self._teacher = run.compiled(with_activations(teacher.eval(), sites), trained=False)

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
    path = run.directory / FOLDER
    if run.read_json(OUTPUT, FinetuneStage.name) is None:
        stage = FinetuneStage(run, teacher, start)
        stage.fit()
        measured = stage.rows[-1].validation_accuracy
        teacher_module.save(
            run,
            path,
            stage.model,
            budget=run.recipe.relu_budget,
            method=run.recipe.method,
            source="distilled from the teacher of the same recipe",
            validation_accuracy=measured,
        )
        run.write_json(
            OUTPUT,
            stage.name,
            {
                "stage_sites": list(stage_sites(stage.model)),
                "relu_kept": count_relus(stage.model).kept,
                "validation_accuracy": measured,
            },
        )
    return checkpoint.load(path)[0]
