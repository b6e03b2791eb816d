"""The client's images: a ``.npy`` of normalised float32, or of raw bytes to be normalised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .. import models
from ..errors import IntegrityError, UsageError


def read_images(file: IO[bytes], *, name: str) -> npt.NDArray[Any]:
    """Read one array in ``.npy`` format; the file need not be seekable.

    Args:
        name: what to call the source in messages.

    Raises:
        UsageError: not an array of float32 or uint8.
        IntegrityError: corrupt or truncated.
    """
    try:
        images: npt.NDArray[Any] = np.lib.format.read_array(_Stream(file), allow_pickle=False)
    except models.BAD_NPY as error:
        raise IntegrityError(f"{name} is not a whole .npy file: {error}") from error
    if images.dtype not in (np.float32, np.uint8):
        raise UsageError(
            f"{name} holds {images.dtype}; wanted are normalised float32 or raw uint8 images"
        )
    return images


def read_cifar(
    file: IO[bytes], *, name: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read a file of the binary version of CIFAR-10 or CIFAR-100 (https://www.cs.toronto.edu/
    ~kriz/cifar.html): records of one label byte (CIFAR-100: a coarse and a fine one) and 3,072
    of pixels.

    Args:
        name: what to call the source in messages.

    Returns:
        pixels (N, 3, 32, 32) and (fine) labels (N,).

    Raises:
        IntegrityError: it is no whole number of records.
    """
    data = np.frombuffer(file.read(), np.uint8)
    for width in (2, 1):
        if data.size and data.size % (width + 3072) == 0:
            records = data.reshape(-1, width + 3072)
            pixels = np.ascontiguousarray(records[:, width:]).reshape(-1, 3, 32, 32)
            return pixels, records[:, width - 1].astype(np.int64)
    raise IntegrityError(f"{name} is not a whole file of CIFAR's binary version")


def read_labels(path: Path, count: int) -> npt.NDArray[np.int64]:
    """Read ``count`` integers from a ``.npy`` file.

    Raises:
        UsageError: it cannot be read, or holds something else.
        IntegrityError: corrupt or truncated.
    """
    try:
        labels = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except models.BAD_NPY as error:
        raise IntegrityError(f"{path} is not a whole .npy file: {error}") from error
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        raise UsageError(f"{path} holds no integers")
    if labels.shape != (count,):
        raise UsageError(f"{path} holds labels {labels.shape}; the images are {count}")
    return labels.astype(np.int64)


def write_images(file: IO[bytes], images: npt.NDArray[Any]) -> None:
    """Write what :func:`read_images` reads."""
    np.lib.format.write_array(_Stream(file), np.ascontiguousarray(images), allow_pickle=False)
    file.flush()


def normalise(
    images: npt.NDArray[Any], metadata: Mapping[str, Any], shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Normalised float32 images (N, C, H, W).

    Float images are taken as normalised. Bytes, (N, C, H, W) or (N, H, W, C), become
    ``(x / 255 - mean) / std`` by the model's public metadata.

    Args:
        shape: (C, H, W), what the model takes.

    Raises:
        UsageError: the shape is not the model's, or it states no mean and standard deviation.
    """
    if images.dtype == np.float32:
        check_shape(images, shape)
        return np.ascontiguousarray(images)
    if images.ndim == 4 and images.shape[1:] != shape and images.shape[3] == shape[0]:
        images = images.transpose(0, 3, 1, 2)
    check_shape(images, shape)
    return np.ascontiguousarray(models.normalise(images, metadata))


def check_shape(images: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuse images that a model does not take.

    Args:
        shape: of one image.

    Raises:
        UsageError: naming both shapes.
    """
    if images.ndim != len(shape) + 1 or images.shape[1:] != shape or not len(images):
        takes = ", ".join(map(str, ("N", *shape)))
        raise UsageError(f"images of shape {images.shape}; the model takes ({takes})")


class _Stream:
    """A file that can only be read and written: of a real one NumPy asks the position, which a
    pipe lacks."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read
        self.write = file.write
