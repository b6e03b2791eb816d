"""ReLU sensitivity from sparse training (SENet, section 3; Dettmers & Zettlemoyer 2019).

The network is trained from random weights at a small global parameter density. Where many
parameters survive, the layer's ReLUs matter little: ``eta_theta(l)`` is kept/all parameters of
the layers that feed ReLU layer l and the sensitivity is ``eta_alpha(l) = 1 - eta_theta(l)``.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi_system.nn import feeding_layers

from . import teacher
from .allocate import fill
from .loop import Run, Stage, derive_seed

log = logging.getLogger(__name__)

OUTPUT = "sensitivity.json"

# Max-normalised eta_alpha of ResNet-18, stem first, implied by SENet's per-layer ReLU lists.
PUBLISHED_RESNET18 = (
    0.0572, 0.1854, 0.2129, 0.2506, 0.2758, 0.3549, 0.4884, 0.5102, 0.5568,
    0.6739, 0.8143, 0.8277, 0.8623, 0.9410, 0.9902, 0.9986, 1.0,
)  # fmt: skip


class SparseWeights:
    """Masks over weight tensors that keep one global number of weights.

    Args:
        weights: tensors by layer name, masked in place.
        density: kept/all over all of them together.
    """

    def __init__(self, weights: dict[str, Tensor], density: float, generator: torch.Generator):
        self.weights = weights
        sizes = [weight.numel() for weight in weights.values()]
        kept = max(1, round(density * sum(sizes)))
        self.masks: dict[str, Tensor] = {}
        counts = fill(kept, sizes, [float(size) for size in sizes])
        for (name, weight), count in zip(weights.items(), counts, strict=True):
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[torch.randperm(weight.numel(), generator=generator)[:count]] = True
            self.masks[name] = mask.view(weight.shape)
        self.apply()

    @property
    def kept(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def apply(self) -> None:
        """Zero the weights outside the masks."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.mul_(self.masks[name])

    def update(self, rate: float, momenta: dict[str, Tensor]) -> None:
        """Prune the smallest ``rate`` of each layer's weights and regrow as many by momentum.

        A layer's share of the regrown weights follows the mean momentum magnitude of the weights
        it kept; inside a layer the missing weights of largest momentum come back, at zero unless
        they were pruned just now.
        """
        pruned, missing, shares = 0, [], []
        for name, weight in self.weights.items():
            mask = self.masks[name].view(-1)
            kept = int(mask.sum())
            count = int(rate * kept)
            magnitude = weight.detach().reshape(-1).abs().masked_fill(~mask, torch.inf)
            mask[torch.argsort(magnitude, stable=True)[:count]] = False
            pruned += count
            missing.append(mask.numel() - kept + count)
            momentum = momenta[name].detach().reshape(-1).abs()
            shares.append(float(momentum[mask].mean()) if kept > count else 0.0)
        for (name, momentum), count in zip(
            ((n, momenta[n]) for n in self.weights),
            fill(pruned, missing, shares),
            strict=True,
        ):
            mask = self.masks[name].view(-1)
            score = momentum.detach().reshape(-1).abs().masked_fill(mask, -1.0)
            mask[torch.argsort(score, descending=True, stable=True)[:count]] = True
        self.apply()


class SensitivityStage(Stage):
    """Sparse training from random weights."""

    name = "sensitivity"

    def __init__(self, run: Run) -> None:
        settings = run.recipe.sensitivity
        super().__init__(run, teacher.fresh(run, self.name), settings.phases, settings.optimizer)
        self._forward = run.compiled(self.model)
        self._sensitivity = settings
        self._parameters = {
            name: module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        }
        generator = torch.Generator().manual_seed(
            derive_seed(run.recipe.seed, f"{self.name}/masks", 0)
        )
        weights: dict[str, Tensor] = dict(self._parameters)
        self.sparse = SparseWeights(weights, settings.density, generator)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._forward(images)
        smoothing = self._sensitivity.label_smoothing
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits

    def after_step(self, step: int, steps: int, epoch: int) -> None:
        updates = self._sensitivity.updates
        if (step + 1) * updates // steps == step * updates // steps:
            self.sparse.apply()
            return
        done = (epoch + (step + 1) / steps) / self.epochs
        momenta = {
            name: self.optimizer.state[weight]["momentum_buffer"]
            for name, weight in self._parameters.items()
        }
        self.sparse.update(self._sensitivity.prune_rate * (1 - done), momenta)

    def extra(self) -> dict[str, Tensor]:
        return {f"mask.{name}": mask for name, mask in self.sparse.masks.items()}


def run_stage(run: Run) -> dict[str, float]:
    """Measure ``eta_alpha`` per ReLU site and write ``sensitivity.json``.

    Returns:
        Site name to sensitivity in [0, 1], in the order of execution.
    """
    stored = run.read_json(OUTPUT, SensitivityStage.name)
    if stored is not None:
        return {layer["site"]: float(layer["eta_alpha"]) for layer in stored["layers"]}
    stage = SensitivityStage(run)
    stage.fit()
    masks = stage.sparse.masks
    layers = []
    for site, feeding in feeding_layers(teacher.masked(run, stage.model)).items():
        kept = sum(int(masks[name].sum()) for name in feeding)
        size = sum(masks[name].numel() for name in feeding)
        theta = kept / size if size else 0.0
        layers.append(
            {
                "site": site,
                "feeding_layers": list(feeding),
                "parameters": size,
                "parameters_kept": kept,
                "eta_theta": theta,
                "eta_alpha": 1 - theta,
            }
        )
    result = {str(layer["site"]): float(str(layer["eta_alpha"])) for layer in layers}
    document = {
        "density": stage.sparse.kept / sum(mask.numel() for mask in masks.values()),
        "layers": layers,
    }
    if run.recipe.arch == "resnet18":
        document["correlation_with_published"] = compare_published(list(result.values()))
    run.write_json(OUTPUT, stage.name, document)
    return result


def compare_published(measured: list[float]) -> float:
    """Log the measured ResNet-18 profile beside the published one; return their correlation."""
    top = max(measured) or 1.0
    for i, (ours, theirs) in enumerate(zip(measured, PUBLISHED_RESNET18, strict=True)):
        log.info("eta_alpha %2d: measured %.4f, published %.4f", i, ours / top, theirs)
    pair = torch.tensor([measured, PUBLISHED_RESNET18], dtype=torch.float64)
    correlation = float(torch.corrcoef(pair)[0, 1])
    log.info("correlation of eta_alpha with the published profile: %.3f", correlation)
    return correlation
