"""Readers against archives built here, augmentation against its definition."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pi_system.errors import IntegrityError, UsageError
from training import data


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def cifar100_binary(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, fine labels) of the training file written."""
    folder.mkdir(exist_ok=True)
    for name, count in (("test.bin", 3), ("train.bin", 7)):
        coarse = rng().integers(0, 20, (count, 1), dtype=np.uint8)
        fine = rng().integers(0, 100, (count, 1), dtype=np.uint8)
        pixels = rng().integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(np.hstack([coarse, fine, pixels]).tobytes())
    (folder / "fine_label_names.txt").write_text("".join(f"n{i}\n" for i in range(100)))
    return pixels.reshape(-1, 3, 32, 32), fine[:, 0]


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def fashion(folder: Path, compress: bool) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    for stem, count in (("t10k", 2), ("train", 4)):
        pixels = rng().integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in (
            (f"{stem}-images-idx3-ubyte", pixels),
            (f"{stem}-labels-idx1-ubyte", np.arange(count)),
        ):
            raw = idx(array)
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
    return pixels


def cifar10_python(folder: Path, *, protocol: int = 2) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = rng().integers(0, 256, (3, 3072), dtype=np.uint8)
        table = {b"data": pixels, b"labels": [1, 2, 3], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(table, protocol))
    names = {b"label_names": [f"c{i}".encode() for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    return pixels.reshape(-1, 3, 32, 32)


def test_cifar100_binary_folder_and_archive(tmp_path: Path) -> None:
    pixels, fine = cifar100_binary(tmp_path / "cifar")
    archive = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar", "cifar-100-binary")
    for path in (tmp_path / "cifar", archive):
        dataset = data.load("cifar100", path)
        assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (7, 3, 100)
        assert np.array_equal(dataset.train.pixels.numpy(), pixels)
        assert dataset.train.labels.tolist() == fine.tolist()


def test_cifar10_python_layout(tmp_path: Path) -> None:
    pixels = cifar10_python(tmp_path / "c")
    dataset = data.load("cifar10", tmp_path / "c")
    assert len(dataset.train) == 15 and dataset.classes[3] == "c3"
    assert np.array_equal(dataset.train.pixels[:3].numpy(), pixels)
    assert dataset.test.labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist(tmp_path: Path, compress: bool) -> None:
    pixels = fashion(tmp_path / "f", compress)
    dataset = data.load("fashion-mnist", tmp_path / "f")
    assert dataset.train.pixels.shape == (4, 1, 28, 28)
    assert np.array_equal(dataset.train.pixels[:, 0].numpy(), pixels)
    assert dataset.test.labels.tolist() == [0, 1]


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    cifar100_binary(tmp_path / "c")
    path = tmp_path / "c" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="whole number"):
        data.load("cifar100", tmp_path / "c")

    fashion(tmp_path / "f", compress=False)
    path = tmp_path / "f" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="truncated"):
        data.load("fashion-mnist", tmp_path / "f")

    fashion(tmp_path / "g", compress=True)
    path = tmp_path / "g" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(IntegrityError):
        data.load("fashion-mnist", tmp_path / "g")

    archive = tmp_path / "c.tar.gz"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(tmp_path / "c", "c")
    archive.write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(IntegrityError, match="tar"):
        data.load("cifar100", archive)

    cifar10_python(tmp_path / "p")
    path = tmp_path / "p" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match="data_batch_2"):
        data.load("cifar10", tmp_path / "p")


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    cifar100_binary(tmp_path / "c")
    path = tmp_path / "c" / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[1] = 100
    path.write_bytes(bytes(raw))
    with pytest.raises(IntegrityError, match="label"):
        data.load("cifar100", tmp_path / "c")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    cifar10_python(tmp_path / "c")
    target = tmp_path / "executed"
    (tmp_path / "c" / "data_batch_1").write_bytes(pickle.dumps({b"data": Malicious(target)}))
    with pytest.raises(IntegrityError, match="refused"):
        data.load("cifar10", tmp_path / "c")
    assert not target.exists()


def test_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown data set"):
        data.load("svhn", tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        data.load("cifar10", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="official layout"):
        data.load("cifar10", tmp_path)


def images(count: int = 12) -> data.Images:
    """Every pixel value names its position, so that a crop can be recognised."""
    plane = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    return data.Images(plane.repeat(count, 3, 1, 1), torch.arange(count))


def epoch(seed: int = 0, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings: dict[str, object] = {"size": 4, "padding": 2, "flip": True, "resolution": None}
    return list(
        data.batches(
            images(),
            mean=(0.0, 0.0, 0.0),
            std=(1 / 255, 1 / 255, 1 / 255),
            generator=torch.Generator().manual_seed(seed),
            **(settings | options),  # type: ignore[arg-type]
        )
    )


def test_an_epoch_shows_every_image_once_and_repeats_by_seed() -> None:
    first, second = epoch(), epoch()
    labels = torch.cat([label for _, label in first])
    assert sorted(labels.tolist()) == list(range(12))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(first, epoch(1), strict=True))
    assert len(epoch(size=5)) == 2, "an incomplete batch is dropped"


@pytest.mark.parametrize("resolution", [None, 6, 12])
def test_crops_are_windows_of_the_reflected_image(resolution: int | None) -> None:
    side = resolution or 8
    padded = np.pad(np.arange(64).reshape(8, 8), 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side)).reshape(-1, side, side)
    allowed = {w.tobytes() for w in windows.astype(np.int64)}
    allowed |= {w[:, ::-1].tobytes() for w in windows.astype(np.int64)}
    for batch, _ in epoch(resolution=resolution):
        assert batch.shape == (4, 3, side, side)
        for image in batch.round().long().numpy():
            assert np.ascontiguousarray(image[0]).tobytes() in allowed
            assert np.array_equal(image[0], image[1])


def test_without_padding_and_flip_nothing_changes() -> None:
    for batch, _ in epoch(padding=0, flip=False):
        assert torch.equal(batch.round().long(), images(4).pixels.long())


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(UsageError, match="crop"):
        epoch(resolution=13)
    with pytest.raises(UsageError, match="crop"):
        epoch(padding=8)


def test_split_is_a_partition_by_seed() -> None:
    train, held = data.split(images(), 5, seed=1)
    assert sorted(train.labels.tolist() + held.labels.tolist()) == list(range(12))
    assert torch.equal(held.labels, data.split(images(), 5, seed=1)[1].labels)
    with pytest.raises(UsageError, match="hold"):
        data.split(images(), 12, seed=1)
