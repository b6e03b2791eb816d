"""Checkpoints: one directory with ``model.safetensors`` and ``manifest.json``. Never a pickle.

The manifest records architecture, data set, normalisation, budget, accuracy, recipe, seed and
source; the masks are boolean tensors of the network itself. The manifest holds the tensors'
SHA-256, so a mixed-up pair is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, fx

from . import config, nn
from .errors import IntegrityError, UsageError
from .files import write_atomic as write_atomic

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is. Accuracies are fractions of 1, ``None`` where not measured."""

    arch: str
    width: int
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    dataset: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    relu_budget: int
    relu_kept: int
    method: str
    recipe: str
    seed: int
    source: str
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    version: int = MANIFEST_VERSION


def build_masked(manifest: Manifest) -> fx.GraphModule:
    """The manifest's architecture with full masks and fresh weights."""
    model = nn.build(
        manifest.arch,
        classes=len(manifest.classes),
        width=manifest.width,
        in_channels=manifest.input_shape[0],
    )
    return nn.linearize(model, torch.zeros(2, *manifest.input_shape))


def save(directory: Path, model: torch.nn.Module, manifest: Manifest) -> Manifest:
    """Write a checkpoint; both files appear whole or not at all.

    Raises:
        UsageError: the network keeps more ReLUs than the manifest's budget.
    """
    kept = nn.count_relus(model).kept
    if kept > manifest.relu_budget:
        raise UsageError(f"{kept} ReLUs kept, over the budget of {manifest.relu_budget}; not saved")
    manifest = dataclasses.replace(manifest, relu_kept=kept)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    data = dump_tensors(tensors)
    document: dict[str, Any] = dataclasses.asdict(manifest)
    document["sha256"] = hashlib.sha256(data).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "model.safetensors", data)
    write_atomic(directory / "manifest.json", (json.dumps(document, indent=2) + "\n").encode())
    return manifest


def load(directory: Path) -> tuple[fx.GraphModule, Manifest]:
    """Read a checkpoint into a masked network in evaluation mode.

    Raises:
        UsageError: there is no checkpoint.
        IntegrityError: a file is corrupt, truncated or of another checkpoint.
    """
    manifest_path, tensors_path = directory / "manifest.json", directory / "model.safetensors"
    try:
        document = json.loads(manifest_path.read_bytes())
        data = tensors_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{directory} holds no checkpoint: {error.filename} is missing") from error
    except ValueError as error:
        raise IntegrityError(f"{manifest_path} is corrupt: {error}") from error
    if not isinstance(document, dict) or document.get("version") != MANIFEST_VERSION:
        raise IntegrityError(f"{manifest_path} is not a manifest of version {MANIFEST_VERSION}")
    if hashlib.sha256(data).hexdigest() != document.pop("sha256", None):
        raise IntegrityError(f"{tensors_path} is corrupt, truncated or of another checkpoint")
    try:
        manifest = config.from_mapping(document, Manifest, where=str(manifest_path))
    except UsageError as error:
        raise IntegrityError(str(error)) from error
    try:
        tensors: dict[str, Tensor] = load_tensors(data)
        model = build_masked(manifest)
        model.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"{tensors_path} does not fit its manifest: {error}") from error
    kept = nn.count_relus(model).kept
    if kept != manifest.relu_kept or kept > manifest.relu_budget:
        raise IntegrityError(
            f"{tensors_path} keeps {kept} ReLUs, its manifest says {manifest.relu_kept}"
        )
    model.eval()
    return model, manifest
