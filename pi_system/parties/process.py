"""What a party needs of its process: an end with its parent, few threads, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import threading

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that limit the numerical libraries to ``threads`` threads."""
    return {name: str(threads) for name in _THREAD_VARIABLES}


def exit_with_parent() -> None:
    """End this process as soon as its standard input closes, as the parent's death closes it.

    The bytes on standard input are ignored from here on.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(5)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()


def release_memory() -> None:
    """Give back to the system what the C library keeps of freed memory, where it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # getrusage keeps the size of the parent that forked; this does not.
        with open("/proc/self/status") as file:
            line = next((line for line in file if line.startswith("VmHWM:")), "")
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
