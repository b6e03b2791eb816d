"""Two gloo processes against one with the same global batch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.loop import stored_rows
from training.ranks import Ranks

ROOT = Path(__file__).parents[2]


def train(recipe: Path, data: Path, run: Path, ranks: int) -> list[dict[str, object]]:
    """``pi-train senet`` in so many processes; returns what it prints."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(command if ranks > 1 else []), "-m"]
    command += [*(["--"] if ranks > 1 else []), "training.cli", "senet", "--format", "json"]
    command += ["--recipe", str(recipe), "--data", str(data), "--run", str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("method", ["senet", "taylor"])
def test_two_ranks_equal_one(cifar10: Path, recipe_path: Path, tmp_path: Path, method: str) -> None:
    path = tmp_path / "recipe.toml"
    text = recipe_path.read_text()
    # One gentle epoch per stage: rounding differs, and training makes it grow.
    text = text.replace("epochs = 2", "epochs = 1").replace(", { epochs = 1 }]", "]")
    text = text.replace("peak = 0.1", "peak = 0.01").replace("peak = 0.05", "peak = 0.01")
    taylor = "taylor = { updates = 1, progressive = false }"
    text = text.replace("[masks]\n", f'[masks]\nmethod = "{method}"\n{taylor}\n')
    path.write_text(text.replace("[finetune]\n", "[finetune]\npram = 1.0\n"))
    for ranks in (1, 2):
        printed = train(path, cifar10, tmp_path / str(ranks), ranks)
        assert [row["relu_kept"] for row in printed] == [38912, 3000]
    one, two = tmp_path / "1", tmp_path / "2"
    for ours, theirs in zip(stored_rows(one), stored_rows(two), strict=True):
        ours, theirs = (dataclasses.asdict(row) for row in (ours, theirs))
        for name in ("stage", "epoch", "lr"):
            assert ours[name] == theirs[name]
        # Fine-tuning starts from masks that differ a little, see below.
        close = 2e-2 if ours["stage"] == "finetune" else 1e-3
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=close), ours["stage"]
    weights = [load_file(d / "teacher" / "model.safetensors") for d in (one, two)]
    for name, tensor in weights[0].items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, weights[1][name], atol=1e-3, rtol=1e-3), name
    masks = [load_file(d / "masks.safetensors") for d in (one, two)]
    kept = [sum(int(m.sum()) for m in part.values()) for part in masks]
    assert kept == [3000, 3000]
    moved = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0])
    # Scores that rounding makes change places; gradients have many near 0.
    assert moved < (60 if method == "senet" else 600)


def test_the_parts_of_a_batch_are_the_batch() -> None:
    batch = torch.arange(12).view(6, 2)
    parts = [Ranks(rank, 3).part(batch) for rank in range(3)]
    assert torch.equal(torch.cat(parts), batch)
