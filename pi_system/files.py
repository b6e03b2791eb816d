"""Files that are written whole or not at all, and why one could not be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, over the quota, over the limit on a file's size."""


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace ``path`` by ``data`` so that a crash leaves the old or the new file, whole.

    Args:
        mode: of the new file, less what the process's umask takes away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """What is wrong and, where the disk is, what to do about it."""
    text = error.strerror or str(error)
    if error.errno in FULL:
        return f"{text}; make space and try again"
    if error.errno == errno.EROFS:
        return f"{text}; it must be writable"
    return text
