"""Gates: the masked ReLU with a differentiable mask, which the rivals of SENet's search learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from pi_system.nn import relu_sites, with_activations

from .allocate import Rule
from .loop import Run, Stage
from .losses import Distill
from .masks import channels_last, hamming, student_of, top
from .recipe import Phase


class Gate(nn.Module):
    """y = x + g * relu(-x), one g per position: ReLU where g is 1, identity where it is 0."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(mask.to(torch.float32, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate.to(x.dtype) * (-x).clamp(min=0)


def gated(model: fx.GraphModule) -> dict[str, Gate]:
    """Put a gate in the place of every masked ReLU of ``model``; returns them by site."""
    result = {}
    for name, site in relu_sites(model).items():
        result[name] = Gate(site.mask)
        model.set_submodule(name, result[name])
    return result


def top_together(scores: dict[str, Tensor], count: int, minimum: int = 0) -> dict[str, Tensor]:
    """The masks of exactly ``count`` largest scores over all sites together.

    Args:
        minimum: a site with fewer keeps none, the one with the fewest first, as long as the
            others have room for what it leaves.
    """
    kept = dict(scores)
    while True:
        chosen = top(torch.cat([score.reshape(-1) for score in kept.values()]), count)
        parts = torch.split(chosen, [score.numel() for score in kept.values()])
        sizes = {name: int(part.sum()) for name, part in zip(kept, parts, strict=True)}
        room = sum(score.numel() for score in kept.values()) - count
        small = [n for n, size in sizes.items() if 0 < size < minimum and kept[n].numel() <= room]
        if not small:
            break
        del kept[min(small, key=lambda name: sizes[name])]
    found = {name: part.view(kept[name].shape) for name, part in zip(kept, parts, strict=True)}
    return {
        name: found.get(name, torch.zeros_like(score, dtype=chosen.dtype))
        for name, score in scores.items()
    }


class GateStage(Stage):
    """A mask search that trains with gates; subclasses move them.

    Args:
        teacher: the all-ReLU network, in evaluation mode.
        rule: layer budgets for any budget.
    """

    name = "masks"

    def __init__(self, run: Run, teacher: fx.GraphModule, rule: Rule) -> None:
        settings = run.recipe.masks
        student = student_of(run, teacher)
        self.gates = gated(student)
        super().__init__(run, student, (Phase(settings.epochs),), settings.optimizer)
        self.rule = rule
        self.target = run.recipe.searched(rule.count.total)
        self.minimum = run.recipe.allocate.min_relus
        self._all_relu = teacher
        view = with_activations(student, ())
        self._step = run.compiled(Distill(view, settings.ce, settings.kl, settings.temperature))
        teacher.to(memory_format=run.recipe.layout(self.name))  # type: ignore[call-overload]
        channels_last(teacher)
        self._teacher = run.compiled(teacher.eval(), trained=False)
        self._before: dict[str, Tensor] = {}

    def groups(self) -> list[dict[str, Any]]:
        """The weights; the gates are no weights."""
        gates = {id(gate.gate) for gate in self.gates.values()}
        return [{"params": [p for p in self.model.parameters() if id(p) not in gates]}]

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._before:
            self._before = self.open()
        with torch.no_grad():
            logits_ar = self._teacher(images)
        loss, logits = self._step(images, labels, logits_ar, [])
        return loss, logits

    def open(self) -> dict[str, Tensor]:
        """The positions whose gates are not closed."""
        return {name: gate.gate.detach() > 0.01 for name, gate in self.gates.items()}

    def after_epoch(self, epoch: int) -> float | None:
        before, self._before = self._before, {}
        return hamming(before, self.open())

    def masks(self) -> dict[str, Tensor]:
        """The masks found; at most ``target`` positions."""
        raise NotImplementedError

    def result(self) -> fx.GraphModule:
        """The trained weights under the masks found."""
        student = student_of(self.run, self._all_relu)
        gates = {f"{name}.gate" for name in self.gates}
        weights = {k: v for k, v in self.model.state_dict().items() if k not in gates}
        student.load_state_dict(weights, strict=False)
        for name, mask in self.masks().items():
            relu_sites(student)[name].set_mask(mask)
        return student


def due(step: int, steps: int, updates: int) -> bool:
    """Whether one of ``updates`` evenly spaced moments of an epoch is after this step."""
    return (step + 1) * updates // steps != step * updates // steps
