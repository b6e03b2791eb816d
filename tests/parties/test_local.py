"""The launcher with real processes: results, first causes, and nobody left behind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose

from pi_system.errors import IntegrityError, PeerError, PiError, UsageError
from pi_system.net.meter import events_from_json
from pi_system.parties.local import LocalRun, run_local
from pi_system.parties.timeouts import Timeouts

Parties = Callable[[], dict[str, int]]
LAUNCH = Path(__file__).with_name("launch.py")
ROLES = ("server", "client", "dealer")


def test_three_processes_give_plaintext_answers(
    parties: Parties, toy_model: Path, toys: ModuleType, toy_images: npt.NDArray[np.float32]
) -> None:
    run = LocalRun(str(toy_model), "toy_backends:Plain", toy_images, batch=2, repeat=3, warmup=1)
    result = run_local(run)
    assert not parties()
    expected = toys.forward(toys.toy_graph(), toy_images)
    assert len(result.client["inferences"]) == 3
    for inference in result.client["inferences"]:
        assert_allclose(inference["logits"], expected[inference["images"]], rtol=1e-4)
        assert 0 < inference["online_seconds"] < 60 and 0 < inference["offline_seconds"] < 60
    assert result.client["sha256"] == toys.toy_graph().sha256()
    client = events_from_json(result.client["meter"])
    server = events_from_json(result.server["meter"])
    sent = sum(e.bytes for e in client if e.peer == "server" and e.direction == "sent")
    assert sent == sum(e.bytes for e in server if e.peer == "client" and e.direction == "received")
    for report in (result.client, result.server, result.dealer):
        assert 10e6 < report["peak_memory"] < 10e9


def corrupt(model: Path, tmp_path: Path) -> str:
    copy = tmp_path / "corrupt"
    shutil.copytree(model, copy)
    tensors = copy / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    return str(copy)


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("missing model", UsageError, "no model 'nowhere'"),
        ("corrupt model", IntegrityError, "corrupt"),
        ("wrong shape", UsageError, r"images of shape \(1, 3, 9, 9\); the model takes"),
        ("unknown backend", UsageError, "unknown backend 'none'"),
        ("no such package", UsageError, "needs the package 'toy_no_such_package'"),
        ("bug", PiError, "unexpected ZeroDivisionError: a bug"),
        ("silent dealer", PeerError, "sent nothing within 1 s"),
    ],
)
def test_the_first_cause_is_what_the_user_sees(
    parties: Parties,
    toy_model: Path,
    tmp_path: Path,
    case: str,
    error: type[PiError],
    text: str,
) -> None:
    model = {"missing model": "nowhere"}.get(case, str(toy_model))
    if case == "corrupt model":
        model = corrupt(toy_model, tmp_path)
    backend = {
        "unknown backend": "none",
        "no such package": "toy_no_such_package:Backend",
        "bug": "toy_backends:Buggy",
        "silent dealer": "toy_backends:SilentDealer",
    }.get(case, "toy_backends:Plain")
    size = 9 if case == "wrong shape" else 8
    timeouts = Timeouts(step=1.0, prepare=1.0)
    images = np.zeros((1, 3, size, size), np.float32)
    with pytest.raises(PiError, match=text) as caught:
        run_local(LocalRun(model, backend, images, timeouts=timeouts))
    assert caught.value.exit_code == error.exit_code
    assert "\n" not in str(caught.value)
    assert not parties()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("moment", ["starting", "running"])
def test_a_party_killed_at_any_moment_ends_all_in_time(
    parties: Parties, toy_model: Path, role: str, moment: str
) -> None:
    backend = "toy_backends:SlowServer"
    run = LocalRun(str(toy_model), backend, np.zeros((1, 3, 8, 8), np.float32), repeat=1000)
    with ThreadPoolExecutor() as pool:
        future = pool.submit(run_local, run)
        wait_for_all(parties)
        if moment == "running":
            wait_until_connected(parties()["client"])
            time.sleep(random.uniform(0, 0.5))
        os.kill(parties()[role], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(PeerError, match=f"the {role} was killed by SIGKILL"):
            future.result(30)
        assert time.monotonic() - killed < 10
    assert not parties()


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_the_end_of_the_launcher_is_the_end_of_the_parties(
    parties: Parties, toy_model: Path, number: int, code: int, line: str
) -> None:
    command = [sys.executable, str(LAUNCH), str(toy_model), "toy_backends:SlowServer"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        wait_for_all(parties)
        wait_until_connected(parties()["client"])
        launcher.send_signal(number)
        _, errors = launcher.communicate(timeout=10)
    assert launcher.returncode == code
    assert errors.strip() == line
    deadline = time.monotonic() + 5
    while parties() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not parties()


def wait_for_all(parties: Parties) -> None:
    deadline = time.monotonic() + 60
    while set(parties()) != set(ROLES):
        assert time.monotonic() < deadline, f"only {parties()} came"
        time.sleep(0.02)


def wait_until_connected(process: int) -> None:
    """Wait until a process has two sockets: the client, once it talks to server and dealer."""
    deadline = time.monotonic() + 60
    while True:
        links = []
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                links.append(os.readlink(entry))
        if sum(link.startswith("socket:") for link in links) == 2:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)
