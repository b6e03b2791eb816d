"""A synthetic CIFAR-10 in the official binary layout and a recipe that trains in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

RECIPE = """
name = "tiny"
dataset = "cifar10"
arch = "resnet10"
width = 8
relu_budget = 3000
seed = 3
validation = 20
batch = 20
threads = 1
compile = false

[teacher]
phases = [{ epochs = 1, resolution = 24 }, { epochs = 1 }]
label_smoothing = 0.1
optimizer = { schedule = { kind = "one-cycle", peak = 0.1, warmup = 0.5 } }

[sensitivity]
phases = [{ epochs = 2, resolution = 16 }]
density = 0.1
updates = 2
optimizer = { schedule = { kind = "constant", peak = 0.05 } }

[masks]
epochs = 2
optimizer = { schedule = { kind = "constant", peak = 0.05 } }

[finetune]
epochs = 2
optimizer = { schedule = { kind = "cosine", peak = 0.02 } }
"""


def write_cifar10(folder: Path, per_batch: int = 20) -> Path:
    """Write ``5 * per_batch`` training and ``per_batch`` test images with a learnable colour."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        labels = rng.integers(0, 10, per_batch, dtype=np.uint8)
        pixels = rng.integers(0, 100, (per_batch, 3072), dtype=np.uint8)
        pixels[:, :1024] += (labels * 15)[:, None]
        (folder / name).write_bytes(np.hstack([labels[:, None], pixels]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n")
    return folder


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a synthetic CIFAR-10."""
    return write_cifar10(tmp_path_factory.mktemp("data") / "cifar10")


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the tiny recipe."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path
