"""The client's images: a ``.npy`` of normalised float32, or of raw bytes to be normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

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
    except (ValueError, EOFError, MemoryError) as error:
        raise IntegrityError(f"{name} is not a whole .npy file: {error}") from error
    if images.dtype not in (np.float32, np.uint8):
        raise UsageError(
            f"{name} holds {images.dtype}; wanted are normalised float32 or raw uint8 images"
        )
    return images


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
        UsageError: the model states no mean and standard deviation.
    """
    if images.dtype == np.float32:
        return np.ascontiguousarray(images, np.float32)
    if images.ndim == 4 and images.shape[1:] != shape and images.shape[3] == shape[0]:
        images = images.transpose(0, 3, 1, 2)
    mean, std = metadata.get("mean"), metadata.get("std")
    if not _per_channel(mean, shape) or not _per_channel(std, shape) or 0 in (std or ()):
        raise UsageError("the model states no normalisation; give normalised float32 images")
    if images.ndim != 4 or images.shape[1] != shape[0]:
        return images.astype(np.float32)  # the wrong shape is refused with both named
    means, stds = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (mean, std))
    return np.ascontiguousarray((images.astype(np.float32) / 255 - means) / stds)


class _Stream:
    """A file that can only be read and written: of a real one NumPy asks the position, which a
    pipe lacks."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read
        self.write = file.write


def _per_channel(values: Any, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == shape[0]
        and all(isinstance(value, int | float) for value in values)
    )
