"""The machine and software behind a figure. No host names, user names or paths."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from .. import __version__
from ..backends.fss import kernels, ringconv

_PACKAGES: Final = ("torch", "numpy", "crypten", "cryptography")
_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_CPU_FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512ifma", "aes", "vaes", "asimd")


def describe() -> dict[str, Any]:
    """JSON-able facts that a figure depends on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pi_system": __version__,
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "kernels": {"gates": kernels.describe(), "convolutions": ringconv.features()},
        "cores": os.cpu_count() or 1,
        "cores_usable": _usable_cores(),
        "memory_mb": _memory_mb(),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "thread_settings": {name: os.environ.get(name) for name in _VARIABLES},
        "tcp_congestion_control": _first_line("/proc/sys/net/ipv4/tcp_congestion_control"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _first_line(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().partition("\n")[0].strip()
    return None


def _cpu_info(key: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() == key:
                return value.strip()
    return None


def _cpu_model() -> str:
    model = _cpu_info("model name")
    if model is None and sys.platform == "darwin":
        model = _output("sysctl", "-n", "machdep.cpu.brand_string")
    return model or platform.processor() or "unknown"


def _cpu_flags() -> list[str]:
    flags = (_cpu_info("flags") or _cpu_info("features") or "").split()
    return [flag for flag in _CPU_FLAGS if flag in flags]


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _os_name() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"{platform.system()} {platform.release()}"


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _commit() -> str | None:
    """The commit of a checkout, marked if there are changes to the package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--", "pi_system")
    return commit + ("" if changes == "" else "+changes")


def _output(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None
