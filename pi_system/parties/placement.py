"""Processors of their own for parties that share a machine, as they have on machines of their own.

Left alone, the scheduler may put a party that a message wakes on the processor of the one that
sent it, where it waits until the sender pauses.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final

SHARED: Final = ("server", "client")
"""The roles that get half of the processors each; any other may use them all."""


def shares(threads: int) -> dict[str, list[int]]:
    """Processors of server and client; none where a half has fewer than ``threads``, or the system
    cannot be told. Hardware threads of one core stay together where there are two cores or more.
    """
    if sys.platform != "linux":
        return {}
    usable = sorted(os.sched_getaffinity(0), key=lambda number: (_core(number), number))
    half = len(usable) // 2
    if half < threads:
        return {}
    halves = usable[:half], usable[-half:]
    return {role: sorted(part) for role, part in zip(SHARED, halves, strict=True)}


def place(process: int, role: str, threads: int) -> None:
    """Keep a process that was just started, and what it will start, to its role's processors."""
    processors = shares(threads).get(role)
    if processors and sys.platform == "linux":
        with contextlib.suppress(OSError):  # it has ended, or the system does not let us
            os.sched_setaffinity(process, processors)


def _core(number: int) -> int:
    """The first of the hardware threads that share a core with this one."""
    folder = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
    for name in ("core_cpus_list", "thread_siblings_list"):
        with contextlib.suppress(OSError, ValueError):
            text = (folder / name).read_text()
            return int(text.replace("-", ",").partition(",")[0])
    return number
