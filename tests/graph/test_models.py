"""Models by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from pi_system import checkpoint, models, nn
from pi_system.errors import IntegrityError, UsageError
from pi_system.graph import execute, serialize

MANIFEST = checkpoint.Manifest(
    arch="resnet10", width=2, classes=("cat", "dog"), input_shape=(3, 32, 32),
    dataset="cifar100", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), relu_budget=9728,
    relu_kept=0, method="test", recipe="none", seed=0, source="test",
)  # fmt: skip


@pytest.mark.parametrize(
    "name,total,kept",
    [
        ("random:resnet18w4@3000", 34_816, 3000),
        ("random:resnet18w4@0", 34_816, 0),
        ("random:resnet18w4@all", 34_816, 34_816),
        ("random:resnet34w2@1", 30_208, 1),
        ("random:wrn22_8w1@5000", 87_040, 5000),
        ("random:vgg16w4@10000", 17_280, 10_000),
    ],
)
def test_random_models(name: str, total: int, kept: int) -> None:
    graph = models.resolve(name)
    assert (graph.relu_total, graph.relu_kept) == (total, kept)
    assert graph.metadata["name"] == name and graph.output.shape == (100,)
    images = models.random_images(8, graph.input.shape, seed=5)
    edges = execute.run(graph, images, all_edges=True)
    # What a trained network's activations are like, on other images than it was scaled by.
    for node in graph:
        assert np.abs(edges[node.name]).max() < (32 if node is graph.output else 16), node.name
        if node.op in ("conv", "affine"):
            assert 0.25 < edges[node.name].std() < 2, node.name
    assert 1 < edges[graph.output.name].std() < 6


def test_layer_budgets_rise_with_depth() -> None:
    graph = models.resolve("random:resnet18w16@12500")
    kept = [graph.kept(node) for node in graph.relus]
    assert sum(kept) == 12_500 and kept == sorted(kept) and kept[0] < kept[-1] / 10


def test_random_models_do_not_depend_on_the_state_of_torch() -> None:
    here = models.resolve("random:resnet10w4@500").sha256()
    torch.manual_seed(99)
    assert models.resolve("random:resnet10w4@500").sha256() == here
    assert models.resolve("random:resnet10w4@501").sha256() != here


@pytest.mark.parametrize(
    "name,message",
    [
        ("random:resnet18", "not random:ARCH@RELUS"),
        ("random:resnet18@-1", "not random:ARCH@RELUS"),
        ("random:resnet18@1e5", "not random:ARCH@RELUS"),
        ("random:alexnet@all", "unknown architecture 'alexnet'"),
        ("random:resnet10w2@9729", "outside 0 to 9728"),
        ("random:resnet10w0@all", "width"),
        ("no/such/model", "no model"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.resolve(name)


def test_exported_directories_and_checkpoints(tmp_path: Path) -> None:
    graph = models.random_graph("resnet10", width=2)
    serialize.save(tmp_path / "exported", graph)
    assert models.resolve(str(tmp_path / "exported")).sha256() == graph.sha256()
    model = checkpoint.build_masked(MANIFEST)
    for site in nn.relu_sites(model).values():
        site.set_mask(torch.rand(site.mask.shape) < 0.3)
    saved = checkpoint.save(tmp_path / "checkpoint", model, MANIFEST)
    exported = models.from_checkpoint(tmp_path / "checkpoint")
    assert exported.relu_kept == saved.relu_kept
    assert exported.metadata["classes"] == ["cat", "dog"]
    assert exported.metadata["name"] == f"resnet10-cifar100-{saved.relu_kept}"
    serialize.save(tmp_path / "again", exported)
    assert serialize.load(tmp_path / "again").metadata == exported.metadata
    with pytest.raises(UsageError, match="is a checkpoint; export it first"):
        models.resolve(str(tmp_path / "checkpoint"))


def test_bundled_models_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.resources, "files", lambda package: tmp_path)
    for missing in ("demo", "demo-teacher"):
        with pytest.raises(UsageError, match="this installation has no demo"):
            models.resolve(missing)
    with pytest.raises(UsageError, match="no bundled images"):
        models.demo_images()
    model = checkpoint.build_masked(MANIFEST)
    checkpoint.save(tmp_path / "demo" / "student", model, MANIFEST)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    labels = np.array([1, 0, 1, 1])
    path = tmp_path / "demo" / "images.safetensors"
    path.write_bytes(safetensors.numpy.save({"pixels": pixels, "labels": labels}))
    graph = models.resolve("demo")
    assert graph.metadata["name"] == "demo" and graph.relu_kept == 9728
    images, found = models.images(graph, 6)
    assert (
        images.shape == (6, 3, 32, 32) and found is not None and list(found[:5]) == [1, 0, 1, 1, 1]
    )
    assert (images[4] == models.normalise(pixels[:1], graph.metadata)[0]).all()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="corrupt"):
        models.demo_images()


def test_pixels_are_normalised_by_channel() -> None:
    pixels = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2)
    metadata = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.125]}
    got = models.normalise(pixels, metadata)
    assert got.dtype == np.float32
    assert got[1, 2, 0, 1] == pytest.approx((pixels[1, 2, 0, 1] / 255 - 0.3) / 0.125, rel=1e-5)
    for bad in ({}, {"mean": [0], "std": [1]}, {"mean": "x", "std": [1]},
                {"mean": [0, 0, 0], "std": [1, 0, 1]}):  # fmt: skip
        with pytest.raises(UsageError):
            models.normalise(pixels, bad)


def test_image_files(tmp_path: Path) -> None:
    graph = models.random_graph("resnet10", width=2)
    images = models.random_images(2, graph.input.shape)
    path = tmp_path / "x.npy"
    np.save(path, images)
    assert (models.read_images(path, graph) == images).all()
    np.save(path, images[0].astype(np.float64))
    assert models.read_images(path, graph).shape == (1, 3, 32, 32)
    for bad in (images[:, :2], np.array(["a"]), images.astype(int), images * np.inf,
                np.zeros((0, 3, 32, 32)), np.zeros((1, 3, 32, 32), np.uint8)):  # fmt: skip
        np.save(path, bad)
        with pytest.raises(UsageError):
            models.read_images(path, graph)
    path.write_bytes(b"not an array")
    with pytest.raises(UsageError, match=r"not a \.npy file"):
        models.read_images(path, graph)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"not a \.npy file"):
        models.read_images(path, graph)
    with pytest.raises(UsageError, match="cannot read"):
        models.read_images(tmp_path / "none.npy", graph)
