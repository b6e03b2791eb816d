"""Tiny-ImageNet's and ImageNet's folder layouts, against Pillow; what is wrong is named."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pi_system import checkpoint
from pi_system.errors import IntegrityError, UsageError
from training import data, folders, recipe, senet
from training.folders import StoredImages, random_box
from training.loop import Run

from .test_slimmable import private_run

CLASSES = ("n01", "n02", "n03")


def picture(path: Path, width: int, height: int, *, seed: int = 0) -> Path:
    """Write an image whose left half is darker; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, width, height])
    pixels = rng.integers(100, 200, (height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] //= 2
    Image.fromarray(pixels).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
    return path


def tiny(root: Path, side: int = 64, each: int = 4) -> Path:
    """Tiny-ImageNet's layout, a few images."""
    lines = []
    for i, name in enumerate(CLASSES):
        for j in range(each):
            file = root / "train" / name / "images" / f"{name}_{j}.JPEG"
            picture(file, side, side, seed=10 * i + j)
        # In the file's order, which is not the classes'.
        lines.append(f"val_{2 - i}.JPEG\t{CLASSES[2 - i]}\t0\t0\t62\t62\n")
        picture(root / "val" / "images" / f"val_{i}.JPEG", side, side, seed=100 + i)
        (root / "train" / name / f"{name}_boxes.txt").write_text("boxes\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n02\ttwo, deux\nn01\tone\nn09\tnine\n")
    return root


def large(root: Path, each: int = 4) -> Path:
    """ImageNet's layout, images of many sizes."""
    sizes = [(90, 60), (64, 80), (70, 70), (33, 120)]
    for split in ("train", "val"):
        for name in CLASSES:
            for j in range(each):
                picture(root / split / name / f"{name}_{j}.JPEG", *sizes[j % 4], seed=j)
    return root


def decoded(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_tiny_imagenet_against_pillow(tmp_path: Path) -> None:
    dataset = data.load("tiny-imagenet", tiny(tmp_path))
    assert dataset.classes == ("one", "two, deux", "n03")
    assert dataset.train.shape == (3, 64, 64)
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.test.labels.tolist() == [2, 1, 0]
    first = tmp_path / "train" / "n01" / "images" / "n01_0.JPEG"
    assert torch.equal(dataset.train.block(0, 1)[0], decoded(first))
    last = tmp_path / "val" / "images" / "val_2.JPEG"
    assert torch.equal(dataset.test.block(0, 1)[0], decoded(last))


def test_imagenet_is_read_as_it_is_needed(tmp_path: Path) -> None:
    dataset = data.load("imagenet", large(tmp_path))
    assert isinstance(dataset.train, StoredImages)
    assert dataset.train.shape == (3, 224, 224) and dataset.classes == CLASSES
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(dataset.test) == 12
    half = dataset.train.subset(torch.tensor([11, 0]))
    assert half.labels.tolist() == [2, 0] and half.paths[1].name == "n01_0.JPEG"
    assert half.block(0, 2).shape == (2, 3, 224, 224)
    # The central square, 224/256 of the shorter side, of an image of 90x60.
    side = 60 * 224 / 256
    box = ((90 - side) / 2, (60 - side) / 2, (90 + side) / 2, (60 + side) / 2)
    with Image.open(half.paths[1]) as image:
        expected = image.resize((224, 224), Image.Resampling.BILINEAR, box=box)
    assert torch.equal(half.block(1, 2)[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_random_crops_fit_and_vary() -> None:
    generator = torch.Generator().manual_seed(0)
    areas = []
    for width, height in [(500, 375), (375, 500), (64, 64), (30, 1000), (1, 1)]:
        for draws in torch.rand((200, 10, 4), generator=generator).tolist():
            left, upper, right, lower = random_box(draws, width, height)
            assert 0 <= left < right <= width and 0 <= upper < lower <= height
            if (width, height) == (500, 375):
                areas.append((right - left) * (lower - upper) / (width * height))
                assert 0.74 < (right - left) / (lower - upper) < 1.34
    assert 0.07 < min(areas) < 0.2 and max(areas) > 0.8
    # Nothing that was drawn fits: the central square.
    assert random_box([[0.99, 0.5, 0, 0]], 1000, 30) == (485, 0, 515, 30)


def test_training_crops_repeat_with_their_seed_and_flip(tmp_path: Path) -> None:
    train, _, _ = folders.imagenet(large(tmp_path), 32)
    index = torch.arange(12)

    def crops(seed: int, *, flip: bool, side: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return train.crops(index, generator, padding=0, flip=flip, side=side)()

    plain, flipped = crops(1, flip=False), crops(1, flip=True)
    assert plain.shape == (12, 3, 32, 32) and plain.dtype == torch.uint8
    assert torch.equal(plain, crops(1, flip=False)) and not torch.equal(plain, crops(2, flip=False))
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert any(mirrored) and any(same) and all(a or b for a, b in zip(mirrored, same, strict=True))
    assert crops(1, flip=False, side=16).shape == (12, 3, 16, 16)


def test_batches_from_disk_are_in_the_order_of_the_seed(tmp_path: Path) -> None:
    train, _, _ = folders.imagenet(large(tmp_path), 16)

    def labels(seed: int) -> list[int]:
        found = data.batches(
            train, size=5, mean=(0.5,) * 3, std=(0.5,) * 3, padding=4, flip=True,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return [label for _, batch in found for label in batch.tolist()]

    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    assert labels(7) == train.labels[order[:10]].tolist()


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagenet"])
def test_a_whole_run_on_a_folder(name: str, recipe_path: Path, tmp_path: Path) -> None:
    root = (tiny if name == "tiny-imagenet" else large)(tmp_path / "data")
    read = folders.tiny_imagenet if name == "tiny-imagenet" else folders.imagenet
    side, arch = 64, "resnet10" if name == "tiny-imagenet" else "resnet18_imagenet"
    train, test, classes = read(root, side)
    facts = data.KNOWN[name]
    dataset = data.Dataset(name, train, test, classes, facts.mean, facts.std)
    chosen = dataclasses.replace(
        recipe.load(str(recipe_path)),
        dataset=name, arch=arch, width=2, batch=3, validation=3, relu_budget=200,
    )  # fmt: skip
    run = Run(tmp_path / "run", chosen, dataset)
    _, student = senet.train(run)
    manifest = checkpoint.load(tmp_path / "run" / "student")[1]
    assert student.relu_kept == 200 and student.test_accuracy is not None
    assert manifest.input_shape == (3, side, side) and manifest.classes == classes
    if arch == "resnet18_imagenet":
        # Its max pooling runs privately too.
        pixels = data.normalise(test.block(0, 3), facts.mean, facts.std)
        result = private_run(tmp_path / "run" / "student", pixels, tmp_path)
        assert result["model"]["relu_kept"] == 200
        assert result["accuracy"]["argmax_agreement"] == 1
        assert result["accuracy"]["beyond_stated"] == 0


Damage = Callable[[Path], object]


def remove(name: str) -> Damage:
    def damage(root: Path) -> None:
        path = root / name
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir() if path.is_dir() else path.unlink()

    return damage


def annotate(text: str) -> Damage:
    return lambda root: (root / "val" / "val_annotations.txt").write_text(text)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove("train"), UsageError, "holds no folder train"),
        (remove("train/n02/images"), UsageError, "no images of class n02"),
        (remove("val/val_annotations.txt"), UsageError, "val_annotations"),
        (remove("val/images/val_1.JPEG"), UsageError, r"val_1.JPEG is missing"),
        (annotate(""), IntegrityError, "empty"),
        (annotate("val_0.JPEG n01\n"), IntegrityError, "line 1"),
        (annotate("val_0.JPEG\tn01\t0\n\nval_1.JPEG\tn77\t0\n"), IntegrityError, "line 2"),
        (annotate("../../../etc/passwd\tn01\n"), IntegrityError, "line 1"),
        (annotate("..\tn01\n"), IntegrityError, "line 1"),
        (annotate("\tn01\n"), IntegrityError, "line 1"),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\x00"),
            IntegrityError,
            "no text",
        ),
        (
            lambda root: (root / "train" / "n01" / "images" / "n01_1.JPEG").write_bytes(b"junk"),
            IntegrityError,
            "n01_1.JPEG is no readable image",
        ),
        (
            lambda root: picture(root / "train" / "n01" / "images" / "n01_1.JPEG", 65, 64),
            IntegrityError,
            "65x64, expected 64x64",
        ),
    ],
)
def test_a_damaged_folder_is_named(
    damage: Damage, error: type[Exception], message: str, tmp_path: Path
) -> None:
    root = tiny(tmp_path)
    damage(root)
    with pytest.raises(error, match=message):
        data.load("tiny-imagenet", root)


def test_a_truncated_image_and_other_formats_are_refused(tmp_path: Path) -> None:
    train, _, _ = folders.imagenet(large(tmp_path), 32)
    raw = train.paths[3].read_bytes()
    train.paths[3].write_bytes(raw[: len(raw) // 2])
    with pytest.raises(IntegrityError, match=r"n01_3.JPEG is no readable image"):
        train.block(0, 12)
    Image.new("RGB", (40, 40)).save(train.paths[3], format="BMP")
    with pytest.raises(IntegrityError, match=r"n01_3\.JPEG"):
        train.crops(torch.tensor([3]), torch.Generator(), padding=0, flip=False, side=0)()
    # ImageNet has a PNG, grey images and CMYK ones, all named .JPEG.
    for mode, kind in (("RGB", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG")):
        Image.new(mode, (40, 40)).save(train.paths[3], format=kind)
        assert train.block(3, 4).shape == (1, 3, 32, 32)


def test_imagenet_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        data.load("imagenet", tmp_path / "nowhere")
    archive = tmp_path / "imagenet.tar"
    archive.write_bytes(b"")
    with pytest.raises(UsageError, match="unpack"):
        data.load("imagenet", archive)
    root = large(tmp_path / "data")
    remove("val/n02")(root)
    with pytest.raises(UsageError, match="n02 is only in one"):
        data.load("imagenet", root)
    remove("val")(root)
    with pytest.raises(UsageError, match="no folder val"):
        data.load("imagenet", root)
    remove("train/n01")(root)
    remove("train/n02")(root)
    with pytest.raises(UsageError, match="holds 1 classes"):
        data.load("imagenet", root)


def test_without_pillow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pi-system\[images\]"):
        data.load("imagenet", tmp_path)
