"""Accuracy of a checkpoint on a user's data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pi_system import checkpoint
from pi_system.errors import UsageError
from pi_system.nn import count_relus

from .data import Dataset, Source
from .loop import accuracy


@dataclass(frozen=True)
class Evaluation:
    """``accuracy`` is a fraction of 1; ReLU counts include the stem (SENet's convention)."""

    arch: str
    dataset: str
    split: str
    images: int
    accuracy: float
    relu_kept: int
    relu_total: int


def evaluate(directory: Path, dataset: Dataset, images: Source, split: str) -> Evaluation:
    """Classify ``images`` with the checkpoint in ``directory``.

    Args:
        split: what to call these images.

    Raises:
        UsageError: no checkpoint, no images, or a checkpoint for another data set.
    """
    model, manifest = checkpoint.load(directory)
    if manifest.dataset != dataset.name:
        raise UsageError(f"{directory} was trained on {manifest.dataset}, not on {dataset.name}")
    if not len(images):
        raise UsageError(f"the {split} split is empty")
    count = count_relus(model)
    return Evaluation(
        arch=f"{manifest.arch}-w{manifest.width}",
        dataset=dataset.name,
        split=split,
        images=len(images),
        accuracy=accuracy(model, images, dataset),
        relu_kept=count.kept,
        relu_total=count.total,
    )


def record_test(directory: Path, dataset: Dataset) -> float:
    """Measure the test accuracy once and keep it in the manifest; later calls read it there."""
    model, manifest = checkpoint.load(directory)
    if manifest.test_accuracy is None:
        measured = accuracy(model, dataset.test, dataset)
        manifest = dataclasses.replace(manifest, test_accuracy=measured)
        checkpoint.save(directory, model, manifest)
    assert manifest.test_accuracy is not None
    return manifest.test_accuracy


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one image (C, H, W).

    Twice as many are the FLOPs of publications.
    """
    total = 0

    def add(layer: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return total
