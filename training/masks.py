"""Mask identification: which positions keep their ReLU (SENet, section 3, stage 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pi_system.errors import UsageError
from pi_system.nn import MaskedReLU, relu_sites, with_activations

from . import teacher as teacher_module
from .data import Source, normalise
from .loop import Run, Stage, derive_seed
from .losses import distillation
from .recipe import Phase


def top(scores: Tensor, count: int) -> Tensor:
    """The boolean mask of exactly ``count`` largest scores; the earlier position wins a tie.

    Raises:
        UsageError: there are fewer than ``count`` positions.
    """
    if not 0 <= count <= scores.numel():
        raise UsageError(f"cannot keep {count} of {scores.numel()} positions")
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores.reshape(-1), descending=True, stable=True)[:count]] = True
    return mask.view(scores.shape)


def top_channels(scores: Tensor, count: int) -> Tensor:
    """As :func:`top`, in whole channels of (C, ...) scores: the largest sums are kept."""
    area = scores[0].numel()
    if count % area:
        raise UsageError(f"{count} positions are no whole number of channels of {area}")
    chosen = top(scores.reshape(len(scores), -1).sum(1), count // area)
    return chosen.view(-1, *[1] * (scores.dim() - 1)).expand(scores.shape).clone()


def random_mask(
    shape: tuple[int, ...], count: int, granularity: str, generator: torch.Generator
) -> Tensor:
    """The start of the search: exactly ``count`` of the positions of (C, H, W).

    Pixel-wise it is one random H x W mask copied over the channels (the last pixel takes what
    does not fill all channels); channel-wise it is random channels.
    """
    if granularity == "channel":
        scores = torch.rand(shape[0], generator=generator).view(-1, *[1] * (len(shape) - 1))
        return top_channels(scores.expand(shape), count)
    channels = shape[0]
    pixels = 1
    for side in shape[1:]:
        pixels *= side
    order = torch.randperm(pixels, generator=generator)
    mask = torch.zeros(channels, pixels, dtype=torch.bool)
    whole, rest = divmod(count, channels)
    mask[:, order[:whole]] = True
    if rest:
        mask[torch.randperm(channels, generator=generator)[:rest], order[whole]] = True
    return mask.view(shape)


def random_positions(
    shape: tuple[int, ...], count: int, granularity: str, generator: torch.Generator
) -> Tensor:
    """Exactly ``count`` positions of (C, H, W), each set as likely; or whole random channels."""
    if granularity == "channel":
        return random_mask(shape, count, granularity, generator)
    return top(torch.rand(shape, generator=generator), count)


def linearization_losses(
    teacher: fx.GraphModule, sites: tuple[str, ...], train: Source, run: Run, count: int
) -> list[Tensor]:
    """Per site, sum |relu(x) - x| over ``count`` images: what the ReLU there removes."""
    view = with_activations(teacher.eval(), sites, before=True)
    sums: list[Tensor] = []
    size = run.recipe.batch
    with torch.no_grad():
        for start in range(0, min(count, len(train)), size):
            pixels = train.block(start, min(start + size, count, len(train)))
            entering = view(normalise(pixels, run.dataset.mean, run.dataset.std))[1]
            parts = [(-x).clamp(min=0).sum(0) for x in entering]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    return sums


def hamming(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """The fraction of all positions in which two sets of masks differ."""
    different = sum(int((old[name] != new[name]).sum()) for name in old)
    return different / sum(mask.numel() for mask in old.values())


def channels_last(model: nn.Module) -> None:
    """Lay the masks out like the activations, which makes training faster."""
    for site in relu_sites(model).values():
        if site.mask.dim() == 3:
            site.mask = site.mask.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def student_of(run: Run, teacher: fx.GraphModule) -> fx.GraphModule:
    """A copy of the teacher: same weights, full masks."""
    model = teacher_module.masked(run, teacher_module.fresh(run, "student"))
    model.load_state_dict(teacher.state_dict())
    channels_last(model)
    return model


class _SearchStep(nn.Module):
    """Loss, logits and per-site mismatch sums in one graph.

    Args:
        student: returns (logits, activations): what leaves the sites, or what enters them, which
            is what would leave them without their ReLU.
    """

    def __init__(self, student: nn.Module, ce: float, kl: float, temperature: float) -> None:
        super().__init__()
        self.student = student
        self.ce, self.kl, self.temperature = ce, kl, temperature

    def forward(
        self, images: Tensor, labels: Tensor, logits_ar: Tensor, acts_ar: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        logits, acts = self.student(images)
        loss = self.ce * F.cross_entropy(logits, labels) + self.kl * distillation(
            logits, logits_ar, self.temperature
        )
        mismatch = [
            (ar.float() - pr.detach().float()).abs().sum(0)
            for ar, pr in zip(acts_ar, acts, strict=True)
        ]
        return loss, logits.detach(), mismatch


class MaskStage(Stage):
    """Train with fixed masks for an epoch, then keep the positions that missed ReLU the most.

    Args:
        teacher: the all-ReLU network, in evaluation mode.
        budgets: ReLUs to keep, by site.
    """

    name = "masks"

    def __init__(self, run: Run, teacher: fx.GraphModule, budgets: Mapping[str, int]) -> None:
        settings = run.recipe.masks
        student = student_of(run, teacher)
        super().__init__(run, student, (Phase(settings.epochs),), settings.optimizer)
        self.sites: dict[str, MaskedReLU] = relu_sites(student)
        self.budgets = budgets
        self._granularity = settings.granularity
        generator = torch.Generator().manual_seed(
            derive_seed(run.recipe.seed_of(self.name), f"{self.name}/start", 0)
        )
        for name, site in self.sites.items():
            shape = tuple(site.mask.shape)
            site.set_mask(random_mask(shape, budgets[name], self._granularity, generator))
        names = tuple(self.sites)
        self._all_relu = teacher
        self._step = run.compiled(
            _SearchStep(
                with_activations(student, names, before=settings.score == "linearized"),
                settings.ce,
                settings.kl,
                settings.temperature,
            )
        )
        teacher.to(memory_format=run.recipe.layout(self.name))  # type: ignore[call-overload]
        channels_last(teacher)
        self._teacher = run.compiled(with_activations(teacher.eval(), names), trained=False)
        self._mismatch: list[Tensor] = []

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_ar, acts_ar = self._teacher(images)
        loss, logits, mismatch = self._step(images, labels, logits_ar, acts_ar)
        if not self._mismatch:
            self._mismatch = [torch.zeros_like(part) for part in mismatch]
        for total, part in zip(self._mismatch, mismatch, strict=True):
            total += part
        return loss, logits

    def before_first(self, train: Source) -> None:
        settings = self.run.recipe.masks
        if settings.start == "teacher":
            losses = linearization_losses(
                self._all_relu, tuple(self.sites), train, self.run, settings.start_images
            )
            self._choose(losses)

    def after_epoch(self, epoch: int) -> float | None:
        old = {name: site.mask.clone() for name, site in self.sites.items()}
        self.run.ranks.sum(self._mismatch)
        self._choose(self._mismatch)
        self._mismatch = []
        return hamming(old, {name: site.mask for name, site in self.sites.items()})

    def _choose(self, scores: list[Tensor]) -> None:
        choose = top_channels if self._granularity == "channel" else top
        for (name, site), score in zip(self.sites.items(), scores, strict=True):
            site.set_mask(choose(score, self.budgets[name]))
