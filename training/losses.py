"""What the students minimise: cross-entropy, distillation and activation mismatch (PRAM)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softened logits (N, K), batch mean, scaled by T^2."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )


def attention(activation: Tensor) -> Tensor:
    """The unit-norm map of mean squares over channels: (N, C, H, W) to (N, H*W)."""
    return F.normalize(activation.float().pow(2).mean(1).flatten(1), dim=1)


def pram(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Post-ReLU activation mismatch: mean squared difference of the maps, summed over stages."""
    total = torch.zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        total = total + (attention(ours) - attention(theirs)).pow(2).mean()
    return total


class Distill(nn.Module):
    """``ce * CE + kl * KL + pram * PRAM`` and the logits, in one graph.

    Args:
        student: returns (logits, the activations PRAM compares).
    """

    def __init__(
        self, student: nn.Module, ce: float, kl: float, temperature: float, pram: float = 0.0
    ) -> None:
        super().__init__()
        self.student = student
        self.ce, self.kl, self.temperature, self.pram = ce, kl, temperature, pram

    def forward(
        self, images: Tensor, labels: Tensor, logits_ar: Tensor, acts_ar: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits, acts = self.student(images)
        loss = self.ce * F.cross_entropy(logits, labels) + self.kl * distillation(
            logits, logits_ar, self.temperature
        )
        if self.pram:
            loss = loss + self.pram * pram(acts, acts_ar)
        return loss, logits.detach()


class DistillAll(nn.Module):
    """The sum of the losses of networks of several widths, and the logits of the last."""

    def __init__(self, parts: list[Distill]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(
        self, images: Tensor, labels: Tensor, logits_ar: Tensor, acts_ar: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        total, logits = torch.zeros(()), logits_ar
        for part in self.parts:
            loss, logits = part(images, labels, logits_ar, acts_ar)
            total = total + loss
        return total, logits
