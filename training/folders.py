"""Readers for folders of images: Tiny-ImageNet's layout and ImageNet's.

Tiny-ImageNet: ``train/CLASS/images/*.JPEG``, and ``val/images/*.JPEG`` whose classes are in
``val/val_annotations.txt``; held in memory. ImageNet: ``train/CLASS/*.JPEG`` and
``val/CLASS/*.JPEG``; read as training goes. The official validation images, the only labelled
ones beside those for training, are the test split here. Classes are named as in ``words.txt``
(``CLASS<tab>NAME``) where the folder has one. Pillow is the ``images`` extra.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi_system.errors import IntegrityError, UsageError

from .data import Images

SUFFIXES = (".jpeg", ".jpg", ".png")
# Random crops of ImageNet (Szegedy et al., CVPR 2015): their part of the area, their proportions.
AREA, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
# Evaluation: the shorter side against the side of the central crop.
MARGIN = 256 / 224

Box = tuple[float, float, float, float]
Split = tuple[list[Path], list[int]]


@dataclass(frozen=True)
class StoredImages:
    """Images in files, decoded when they are needed.

    Training crops have random size and proportions; without augmentation the central square is
    taken. Both are scaled to ``side`` pixels.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    side: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.side, self.side)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Tensor) -> StoredImages:
        paths = tuple(self.paths[i] for i in index.tolist())
        return StoredImages(paths, self.labels[index], self.side)

    def block(self, start: int, stop: int) -> Tensor:
        side = self.side
        return torch.stack(
            list(_readers().map(lambda p: scaled(p, side, centre), self.paths[start:stop]))
        )

    def crops(
        self, index: Tensor, generator: torch.Generator, *, padding: int, flip: bool, side: int
    ) -> Callable[[], Tensor]:
        drawn = torch.rand((len(index), ATTEMPTS, 4), generator=generator).tolist()
        mirrored = torch.rand(len(index), generator=generator) < (0.5 if flip else 0.0)
        waiting = [
            _readers().submit(
                scaled, self.paths[i], side or self.side, functools.partial(random_box, draws)
            )
            for i, draws in zip(index.tolist(), drawn, strict=True)
        ]

        def collect() -> Tensor:
            pixels = torch.stack([future.result() for future in waiting])
            return torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)

        return collect


def random_box(draws: Sequence[Sequence[float]], width: int, height: int) -> Box:
    """The first of the drawn crops that fits the image, else its largest central square.

    Args:
        draws: per attempt four numbers in [0, 1): area, proportions, place across and down.
    """
    for area, ratio, x, y in draws:
        size = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        proportion = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(size * proportion)), round(math.sqrt(size / proportion))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(x * (width - w + 1)), int(y * (height - h + 1))
            return (left, upper, left + w, upper + h)
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return (left, upper, left + side, upper + side)


def centre(width: int, height: int) -> Box:
    """The central square of evaluation, with the usual margin."""
    side = min(width, height) / MARGIN
    left, upper = (width - side) / 2, (height - side) / 2
    return (left, upper, left + side, upper + side)


def scaled(path: Path, side: int, box: Callable[[int, int], Box]) -> Tensor:
    """The part ``box(width, height)`` of an image, scaled to (3, side, side) uint8.

    Raises:
        IntegrityError: the file is no image.
    """
    image = _open(path)
    pillow = _pillow()
    part = image.resize((side, side), pillow.Resampling.BILINEAR, box=box(*image.size))
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).contiguous()


def tiny_imagenet(root: Path, side: int) -> tuple[Images, Images, tuple[str, ...]]:
    """(train, test, class names) of Tiny-ImageNet.

    Raises:
        UsageError: the folder has another layout, or Pillow is missing.
        IntegrityError: a file in it is corrupt.
    """
    names = _classes(root)
    train = _listed({n: root / "train" / n / "images" for n in names})
    test = _annotated(root, {name: i for i, name in enumerate(names)})
    return _in_memory(train, side), _in_memory(test, side), _titles(root, names)


def imagenet(root: Path, side: int) -> tuple[StoredImages, StoredImages, tuple[str, ...]]:
    """(train, test, class names) of ImageNet.

    Raises:
        UsageError: the folder has another layout, or Pillow is missing.
    """
    names = _classes(root)
    held = _folders(root / "val")
    if names != held:
        odd = sorted(set(names) ^ set(held))[0]
        raise UsageError(f"{root}: class {odd} is only in one of train and val")
    parts = []
    for split in ("train", "val"):
        paths, labels = _listed({name: root / split / name for name in names})
        parts.append(StoredImages(tuple(paths), torch.tensor(labels), side))
    return parts[0], parts[1], _titles(root, names)


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; unpack the archive and give its folder")
    _pillow()
    names = _folders(root / "train")
    if len(names) < 2:
        raise UsageError(f"{root / 'train'} holds {len(names)} classes; is it the official layout?")
    return names


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UsageError(f"{folder.parent} holds no folder {folder.name}; is it unpacked whole?")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _listed(folders: dict[str, Path]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, (name, folder) in enumerate(folders.items()):
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
        if not found:
            raise UsageError(f"{folder} holds no images of class {name}; is it unpacked whole?")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _annotated(root: Path, classes: dict[str, int]) -> Split:
    file = root / "val" / "val_annotations.txt"
    if not file.is_file():
        raise UsageError(f"{root / 'val'} holds no {file.name}; is it the official layout?")
    paths: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(_lines(file), 1):
        name, _, rest = line.partition("\t")
        label = classes.get(rest.partition("\t")[0])
        # A name with a path in it would lead out of the folder.
        if label is None or name in ("", "..") or Path(name).name != name:
            raise IntegrityError(f"{file}, line {number}: expected IMAGE<tab>CLASS, got {line!r}")
        paths.append(root / "val" / "images" / name)
        labels.append(label)
    if not paths:
        raise IntegrityError(f"{file} is empty")
    return paths, labels


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise IntegrityError(f"{file} is no text: {error}") from error


def _titles(root: Path, names: list[str]) -> tuple[str, ...]:
    file = root / "words.txt"
    pairs = (line.split("\t", 1) for line in (_lines(file) if file.is_file() else []))
    titles = {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
    return tuple(titles.get(name, name) for name in names)


def _in_memory(split: Split, side: int) -> Images:
    def read(path: Path) -> Tensor:
        image = _open(path)
        if image.size != (side, side):
            width, height = image.size
            raise IntegrityError(f"{path} is {width}x{height}, expected {side}x{side}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    paths, labels = split
    pixels = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    for i, image in enumerate(_readers().map(read, paths)):
        pixels[i] = image
    return Images(pixels, torch.tensor(labels))


def _open(path: Path) -> Any:
    """The decoded image, in RGB."""
    pillow = _pillow()
    try:
        with pillow.open(path, formats=("JPEG", "PNG")) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; is the data set unpacked whole?") from error
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        raise IntegrityError(f"{path} is no readable image: {error}") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("image folders need Pillow: pip install 'pi-system[images]'") from error
    return Image


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="images")
