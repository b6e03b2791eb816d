"""Which processors the parties of one machine get, by the system's own word."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pi_system.parties import placement

LAUNCH = Path(__file__).with_name("launch.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot be told")


def of_cores(monkeypatch: pytest.MonkeyPatch, usable: set[int], cores: dict[int, int]) -> None:
    """A machine with these processors, on these cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: usable)
    monkeypatch.setattr(placement, "_core", lambda number: cores[number])


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_server_and_client_share_no_processor(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    of_cores(monkeypatch, set(range(count)), {number: number for number in range(count)})
    found = placement.shares(1)
    assert sorted(found) == ["client", "server"]
    assert not set(found["client"]) & set(found["server"])
    assert len(found["client"]) == len(found["server"]) == count // 2


def test_threads_of_one_core_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux numbers them: the second threads of all cores after all the first."""
    of_cores(monkeypatch, set(range(8)), {number: number % 4 for number in range(8)})
    assert placement.shares(1) == {"server": [0, 1, 4, 5], "client": [2, 3, 6, 7]}


@pytest.mark.parametrize(("usable", "threads"), [({3}, 1), ({0, 1}, 2), ({0, 1, 2, 3, 4}, 3)])
def test_too_few_are_left_to_the_scheduler(
    monkeypatch: pytest.MonkeyPatch, usable: set[int], threads: int
) -> None:
    of_cores(monkeypatch, usable, {number: number for number in usable})
    assert placement.shares(threads) == {}


def test_a_process_that_is_gone_is_no_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    placement.place(child.pid, "server", 1)


def test_every_thread_of_the_parties_stays_where_it_was_put(
    parties: Callable[[], dict[str, int]], toy_model: Path
) -> None:
    expected = placement.shares(1)
    if not expected:
        pytest.skip("one processor cannot be shared out")
    command = [sys.executable, str(LAUNCH), str(toy_model), "toy_backends:SlowServer"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher:
        try:
            deadline = time.monotonic() + 30
            while threads(parties().get("client", 0)) < 2 or threads(parties()["server"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            allowed = {role: processors(process) for role, process in parties().items()}
        finally:
            launcher.send_signal(signal.SIGTERM)
    everywhere = tuple(sorted(os.sched_getaffinity(0)))
    assert allowed == {
        "server": {tuple(expected["server"])},
        "client": {tuple(expected["client"])},
        "dealer": {everywhere},
    }


def tasks(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir(f"/proc/{process}/task")]
    return []


def threads(process: int) -> int:
    return len(tasks(process))


def processors(process: int) -> set[tuple[int, ...]]:
    """What the threads of a process may run on."""
    return {tuple(sorted(os.sched_getaffinity(task))) for task in tasks(process)}
