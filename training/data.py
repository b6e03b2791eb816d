"""A user's own data sets: readers of CIFAR-10/100 and Fashion-MNIST, augmentation, splits.

Images are (N, C, H, W) uint8 tensors, labels int64. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pi_system.errors import IntegrityError, UsageError

_AHEAD = 2


class Source(Protocol):
    """Labelled images, in memory or on disk."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        ...

    def __len__(self) -> int: ...

    def subset(self, index: Tensor) -> Source:
        """The images at ``index``, in that order."""
        ...

    def block(self, start: int, stop: int) -> Tensor:
        """Images ``start`` to ``stop`` without augmentation, (N, C, H, W) uint8."""
        ...

    def crops(
        self, index: Tensor, generator: torch.Generator, *, padding: int, flip: bool, side: int
    ) -> Callable[[], Tensor]:
        """Random crops of the images at ``index``; the result waits for them.

        Args:
            side: of the crop in pixels; 0 keeps the images' own.
        """
        ...


@dataclass(frozen=True)
class Images:
    """Images in memory: ``pixels`` (N, C, H, W) uint8 and ``labels`` (N,) int64.

    Crops are of one size, from the image padded by reflection.
    """

    pixels: Tensor
    labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def block(self, start: int, stop: int) -> Tensor:
        return self.pixels[start:stop]

    def crops(
        self, index: Tensor, generator: torch.Generator, *, padding: int, flip: bool, side: int
    ) -> Callable[[], Tensor]:
        size, (channels, height, width) = len(index), self.shape
        crop_h, crop_w = (side or height), (side or width)
        span_h, span_w = height + 2 * padding - crop_h + 1, width + 2 * padding - crop_w + 1
        if padding >= min(height, width) or min(span_h, span_w) < 1:
            raise UsageError(
                f"no {crop_h}x{crop_w} crop fits images of {height}x{width} padded by {padding}"
            )
        y = torch.randint(span_h, (size, 1), generator=generator) - padding + torch.arange(crop_h)
        x = torch.randint(span_w, (size, 1), generator=generator) - padding + torch.arange(crop_w)
        if flip:
            mirrored = torch.rand((size, 1), generator=generator) < 0.5
            x = torch.where(mirrored, width - 1 - x, x)
        y, x = _reflect(y, height), _reflect(x, width)
        return lambda: self.pixels[
            index[:, None, None, None],
            torch.arange(channels)[None, :, None, None],
            y[:, None, :, None],
            x[:, None, None, :],
        ]


@dataclass(frozen=True)
class Dataset:
    """A data set with its official train/test split and per-channel normalisation in [0, 1]."""

    name: str
    train: Source
    test: Source
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Facts:
    """What is known of a data set without its files; ``images`` are those for training."""

    shape: tuple[int, int, int]
    classes: int
    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


KNOWN = {
    "cifar10": Facts((3, 32, 32), 10, 50_000, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Facts((3, 32, 32), 100, 50_000, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion-mnist": Facts((1, 28, 28), 10, 60_000, (0.2860,), (0.3530,)),
    "tiny-imagenet": Facts(
        (3, 64, 64), 200, 100_000, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    ),
    "imagenet": Facts((3, 224, 224), 1000, 1_281_167, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def load(name: str, path: Path) -> Dataset:
    """Read data set ``name`` from ``path``: its official archive or the unpacked folder.

    CIFAR: the binary version (``*.bin``) or the python version; Fashion-MNIST: a folder of idx
    files, plain or gzipped; Tiny-ImageNet and ImageNet: see :mod:`training.folders`.

    Raises:
        UsageError: an unknown name, or files that are not there.
        IntegrityError: files of the wrong length or content.
    """
    facts = _facts(name)
    if not path.exists():
        raise UsageError(f"{path} does not exist; give the {name} archive or its folder")
    train: Source
    test: Source
    if name in ("tiny-imagenet", "imagenet"):
        from . import folders

        read = folders.tiny_imagenet if name == "tiny-imagenet" else folders.imagenet
        train, test, classes = read(path, facts.shape[1])
    elif name == "fashion-mnist":
        train, test, classes = _fashion(_Files(path))
    else:
        train, test, classes = _cifar(_Files(path), hundred=name == "cifar100")
    return Dataset(name, train, test, classes, facts.mean, facts.std)


def synthetic(name: str, train: int, test: int) -> Dataset:
    """Random images of data set ``name``'s shape, so many of each split.

    Raises:
        UsageError: an unknown name.
    """
    facts = _facts(name)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Images:
        pixels = torch.randint(256, (count, *facts.shape), generator=generator, dtype=torch.uint8)
        return Images(pixels, torch.arange(count) % facts.classes)

    classes = tuple(f"class {i}" for i in range(facts.classes))
    return Dataset(name, draw(train), draw(test), classes, facts.mean, facts.std)


def _facts(name: str) -> Facts:
    if name not in KNOWN:
        raise UsageError(f"unknown data set {name!r}; known: {', '.join(KNOWN)}")
    return KNOWN[name]


def split(images: Source, validation: int, seed: int) -> tuple[Source, Source]:
    """Split off ``validation`` images, drawn once by ``seed``: (train, validation).

    Raises:
        UsageError: the split leaves no training image.
    """
    if not 0 <= validation < len(images):
        raise UsageError(f"cannot hold {validation} of {len(images)} training images out")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[validation:]), images.subset(order[:validation])


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, C, H, W) to float32 with the data set's statistics."""
    shape = (1, -1, 1, 1)
    return (pixels.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def batches(
    images: Source,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    padding: int,
    flip: bool,
    resolution: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches in random order; an incomplete last batch is dropped.

    Args:
        padding: reflection padding of the random crop, in pixels.
        resolution: side of the crop; ``None`` keeps the images' own.

    Yields:
        (N, C, H, W) float32 in channels-last memory and (N,) labels.

    Raises:
        UsageError: the padding or the crop is larger than the images allow.
    """
    order = torch.randperm(len(images), generator=generator)
    # The next batches are read from disk while one is trained on.
    ahead: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def first() -> tuple[Tensor, Tensor]:
        index, crops = ahead.popleft()
        pixels = normalise(crops(), mean, std).contiguous(memory_format=torch.channels_last)
        return pixels, images.labels[index]

    for start in range(0, len(images) - size + 1, size):
        index = order[start : start + size]
        crops = images.crops(index, generator, padding=padding, flip=flip, side=resolution or 0)
        ahead.append((index, crops))
        if len(ahead) > _AHEAD:
            yield first()
    while ahead:
        yield first()


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


class _Files:
    """Members of a folder or a tar archive by base name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: dict[str, bytes] | None = None
        if path.is_file():
            try:
                with tarfile.open(path) as archive:
                    self._data = {}
                    for member in archive:
                        file = archive.extractfile(member)
                        if file is not None:
                            self._data[Path(member.name).name] = file.read()
            except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
                raise IntegrityError(f"{path} is not a readable tar archive: {error}") from error

    def get(self, name: str) -> bytes | None:
        if self._data is not None:
            return self._data.get(name)
        found = sorted(self.path.rglob(name))
        return found[0].read_bytes() if found else None

    def need(self, name: str) -> bytes:
        data = self.get(name)
        if data is None:
            raise UsageError(f"{self.path} holds no file {name}; is it the official layout?")
        return data


def _cifar(files: _Files, *, hundred: bool) -> tuple[Images, Images, tuple[str, ...]]:
    parts: list[Images]
    binary: tuple[str, ...]
    python: tuple[str, ...]
    if hundred:
        binary, python, label_bytes = ("train.bin", "test.bin"), ("train", "test"), 2
        names_binary, names_python = "fine_label_names.txt", ("meta", b"fine_label_names")
        label_key = b"fine_labels"
    else:
        binary = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
        python, label_bytes = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"), 1
        names_binary, names_python = "batches.meta.txt", ("batches.meta", b"label_names")
        label_key = b"labels"
    count = 100 if hundred else 10
    if files.get(binary[0]) is not None:
        parts = [_cifar_binary(files.need(n), label_bytes, f"{files.path}: {n}") for n in binary]
        text = files.need(names_binary).decode()
        classes = tuple(line.strip() for line in text.splitlines() if line.strip())
    else:
        parts = []
        for name in python:
            where = f"{files.path}: {name}"
            parts.append(_cifar_python(files.need(name), label_key, where))
        where = f"{files.path}: {names_python[0]}"
        names = _unpickle(files.need(names_python[0]), where).get(names_python[1], [])
        classes = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names)
    for part in parts:
        if len(part) == 0 or not 0 <= int(part.labels.min()) <= int(part.labels.max()) < count:
            raise IntegrityError(f"{files.path}: a label is outside 0..{count - 1}")
    if len(classes) != count:
        raise IntegrityError(f"{files.path}: {len(classes)} class names, expected {count}")
    train = Images(
        torch.cat([p.pixels for p in parts[:-1]]), torch.cat([p.labels for p in parts[:-1]])
    )
    return train, parts[-1], classes


def _cifar_binary(data: bytes, label_bytes: int, where: str) -> Images:
    record = label_bytes + 3072
    if not data or len(data) % record:
        raise IntegrityError(
            f"{where}: {len(data)} bytes is no whole number of {record}-byte records"
        )
    table = np.frombuffer(data, np.uint8).reshape(-1, record)
    pixels = torch.from_numpy(table[:, label_bytes:].copy()).view(-1, 3, 32, 32)
    return Images(pixels, torch.from_numpy(table[:, label_bytes - 1].astype(np.int64)))


class _ArrayUnpickler(pickle.Unpickler):
    """The official python version of CIFAR is pickled: allow its arrays and nothing else."""

    _ALLOWED: ClassVar = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _cifar_python(data: bytes, label_key: bytes, where: str) -> Images:
    table = _unpickle(data, where)
    try:
        pixels = np.array(table[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = torch.tensor(table[label_key], dtype=torch.int64)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise IntegrityError(f"{where}: not a CIFAR batch: {error}") from error
    if labels.shape != (len(pixels),):
        raise IntegrityError(f"{where}: {len(pixels)} images but {labels.numel()} labels")
    return Images(torch.from_numpy(pixels), labels)


def _unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    try:
        table = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:
        raise IntegrityError(f"{where}: not a CIFAR batch: {error}") from error
    if not isinstance(table, dict):
        raise IntegrityError(f"{where}: not a CIFAR batch")
    return {k if isinstance(k, bytes) else str(k).encode(): v for k, v in table.items()}


def _fashion(files: _Files) -> tuple[Images, Images, tuple[str, ...]]:
    def read(stem: str, dimensions: int) -> np.ndarray[Any, Any]:
        data = files.get(stem)
        if data is None:
            try:
                data = gzip.decompress(files.need(stem + ".gz"))
            except (OSError, EOFError, zlib.error) as error:
                raise IntegrityError(f"{files.path}: {stem}.gz: {error}") from error
        header = 4 + 4 * dimensions
        if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
            raise IntegrityError(
                f"{files.path}: {stem} is not an idx file of {dimensions} dimensions"
            )
        shape = np.frombuffer(data, ">u4", dimensions, 4).astype(int)
        if len(data) != header + int(shape.prod()):
            raise IntegrityError(f"{files.path}: {stem} is truncated")
        return np.frombuffer(data, np.uint8, offset=header).reshape(shape)

    parts = []
    for stem in ("train", "t10k"):
        pixels = torch.from_numpy(read(f"{stem}-images-idx3-ubyte", 3).copy())[:, None]
        labels = torch.from_numpy(read(f"{stem}-labels-idx1-ubyte", 1).astype(np.int64))
        if len(pixels) != len(labels) or not len(labels) or int(labels.max()) >= 10:
            raise IntegrityError(f"{files.path}: the {stem} labels do not fit their images")
        parts.append(Images(pixels, labels))
    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    return parts[0], parts[1], classes
