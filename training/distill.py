"""Fine-tuning with frozen masks: distillation and activation mismatch (SENet, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from pi_system import checkpoint
from pi_system.nn import count_relus, relu_sites, with_activations

from . import teacher as teacher_module
from .loop import Run, Stage, accuracy
from .losses import Distill, DistillAll
from .masks import channels_last, student_of
from .recipe import Phase
from .slimmable import Slimmable

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


def folder(fraction: float) -> str:
    """The checkpoint of the student that runs at a fraction of the channels."""
    return FOLDER if fraction == 1 else f"{FOLDER}-{fraction:g}"


class FinetuneStage(Stage):
    """``ce * CE + kl * KL + pram * PRAM`` with masks that no longer move.

    With several widths, each batch minimises the sum of their losses.

    Args:
        teacher: the all-ReLU network, in evaluation mode.
        start: the network of the mask search; it is copied.
    """

    name = "finetune"

    def __init__(self, run: Run, teacher: fx.GraphModule, start: fx.GraphModule) -> None:
        settings, widths = run.recipe.finetune, run.recipe.widths
        student = student_of(run, start)
        model: nn.Module = student
        self.networks = [student]
        if widths is not None:
            model = Slimmable(run, student, widths.fractions)
            channels_last(model)
            self.networks = [model.at(fraction) for fraction in widths.fractions]
        super().__init__(run, model, (Phase(settings.epochs),), settings.optimizer)
        sites = stage_sites(student) if settings.pram else ()
        losses = [
            Distill(
                with_activations(network, sites),
                settings.ce,
                settings.kl,
                settings.temperature,
                settings.pram,
            )
            for network in self.networks
        ]
        self._step = run.compiled(losses[0] if widths is None else DistillAll(losses))
        teacher.to(memory_format=run.recipe.layout(self.name))  # type: ignore[call-overload]
        channels_last(teacher)
        self._teacher = run.compiled(with_activations(teacher.eval(), sites), trained=False)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_ar, acts_ar = self._teacher(images)
        loss, logits = self._step(images, labels, logits_ar, acts_ar)
        return loss, logits

    def students(self) -> list[fx.GraphModule]:
        """An ordinary network for each of the recipe's fractions."""
        if isinstance(self.model, Slimmable):
            return [self.model.cut(fraction) for fraction in self.run.recipe.fractions]
        return self.networks


def run_stage(run: Run, teacher: fx.GraphModule, start: fx.GraphModule) -> fx.GraphModule:
    """Fine-tune, write ``finetune.json`` and save the student in ``student/``.

    A student of a smaller width is saved beside it, ``student-0.5/`` for half the channels.

    Returns:
        The student in evaluation mode.
    """
    recipe = run.recipe
    if run.read_json(OUTPUT, FinetuneStage.name) is None:
        stage = FinetuneStage(run, teacher, start)
        stage.fit()
        validation = run.split()[1]
        widths = []
        for fraction, student in zip(recipe.fractions, stage.students(), strict=True):
            measured = stage.rows[-1].validation_accuracy
            if fraction != 1 and len(validation):
                measured = accuracy(student, validation, run.dataset)
            kept = count_relus(student).kept
            teacher_module.save(
                run,
                run.directory / folder(fraction),
                student,
                budget=recipe.relu_budget if fraction == 1 else kept,
                method=recipe.method,
                source="distilled from the teacher of the same recipe",
                validation_accuracy=measured,
                width=recipe.channels_at(fraction),
            )
            widths.append(
                {"fraction": fraction, "relu_kept": kept, "validation_accuracy": measured}
            )
        run.write_json(
            OUTPUT,
            stage.name,
            {
                "stage_sites": list(stage_sites(student)),
                "relu_kept": widths[-1]["relu_kept"],
                "validation_accuracy": widths[-1]["validation_accuracy"],
            }
            | ({} if recipe.widths is None else {"widths": widths}),
        )
    return checkpoint.load(run.directory / FOLDER)[0]
