"""Parties whose clock is years off, or is set in the middle of a session.

Their C library's calls for the time of day are answered with an offset that the test sets, for
Python and OpenSSL alike; the monotonic clock is left alone, as it is when a real clock is set.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi_system.backends import base
from pi_system.errors import PeerError, RefusedError
from pi_system.net import certificates
from pi_system.net.tls import Identity
from pi_system.parties.classify import classify, prepare
from pi_system.parties.client import Client

ROOT = Path(__file__).resolve().parents[2]
YEAR = 365 * 24 * 3600
Images = npt.NDArray[np.float32]
Deploy = Callable[..., Any]

SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long offset(void) {
    long long seconds = 0;
    int file = open(getenv("TEST_CLOCK"), O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    if (pread(file, &seconds, 8, 0) != 8) seconds = 0;
    close(file);
    return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = (int)syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        at->tv_sec += offset();
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


class WrongClock:
    """An offset of the time of day.

    Attributes:
        inside: before a command line: run it with this clock.
    """

    def __init__(self, library: Path, file: Path) -> None:
        self._file = file
        self.set(0)
        self.inside = ("env", f"LD_PRELOAD={library}", f"TEST_CLOCK={file}")

    def set(self, seconds: int) -> None:
        """From now on the processes with this clock are so far ahead."""
        self._file.write_bytes(struct.pack("=q", seconds))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(SOURCE)
    made = folder / "clock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(made), str(folder / "clock.c")], check=True
    )
    return made


@pytest.fixture
def clock(library: Path, tmp_path: Path) -> WrongClock:
    return WrongClock(library, tmp_path / "offset")


def year(event: dict[str, Any]) -> int:
    return datetime.fromisoformat(event["time"]).year


@pytest.mark.parametrize("years", [-9, 9])
def test_material_and_sessions_know_no_time_of_day(
    deploy: Deploy, clock: WrongClock, toy_images: Images, tmp_path: Path, years: int
) -> None:
    clock.set(years * YEAR)
    made = deploy("--store", str(tmp_path / "server"), backend="fss", inside=clock.inside)
    backend = base.get("fss")
    base.open_store(backend, tmp_path / "client", "client")
    assert prepare(made.client(backend=backend), 2) == 2
    clock.set(-years * YEAR)
    assert len(classify(made.client(backend=backend), toy_images).inferences) == 3
    code, events = made.server.stop()
    assert code == 0 and not [e for e in events if e["event"] in ("failed", "refused")]
    now = datetime.now(UTC).year  # it was this clock that they ran with
    assert {year(e) - now > 0 for e in events} == {True, False}
    assert all(abs(year(e) - now) >= 8 for e in events)
    times = [e["ms"] for e in events if "ms" in e]
    assert times and all(0 <= ms < 60_000 for ms in times)


def test_a_clock_that_is_set_during_a_session_neither_ends_nor_prolongs_it(
    deploy: Deploy, clock: WrongClock, toy_images: Images
) -> None:
    made = deploy("--idle-timeout", "2", inside=clock.inside, dealer=("--idle-timeout", "2"))
    with Client(made.client()) as client:
        client.setup()
        for jump in (1, -1, 0):
            clock.set(jump * YEAR)
            client.offline(1)
            clock.set(-jump * YEAR)
            client.online(toy_images[:1])
    silent = Client(made.client())
    silent.setup()
    started = time.monotonic()
    clock.set(-YEAR)  # a limit of this clock would now be a year away
    with pytest.raises(PeerError):
        silent._server.recv()
    assert 0.5 < time.monotonic() - started < 8
    silent.close()
    code, events = made.server.stop()
    assert code == 0
    assert [e["inferences"] for e in events if e["event"] == "ended"] == [3]


@pytest.mark.parametrize(("years", "reason"), [(9, "has expired"), (-9, "is not yet valid")])
def test_a_clock_that_is_off_refuses_certificates_and_is_named_until_it_is_set_right(
    deploy: Deploy, clock: WrongClock, toy_images: Images, tmp_path: Path, years: int, reason: str
) -> None:
    certificates.make(tmp_path / "certs")
    made = deploy(certs=tmp_path / "certs", inside=clock.inside)
    mine = made.client(identity=Identity.of(tmp_path / "certs", "client"))
    clock.set(years * YEAR)
    with pytest.raises(RefusedError):
        Client(mine)
    clock.set(0)
    assert len(classify(mine, toy_images).inferences) == 3
    texts = []
    for party in (made.server, made.dealer):
        code, events = party.stop()
        assert code == 0
        texts += [e["error"] for e in events if e["event"] == "refused"]
    wanted = f"'s certificate: certificate {reason} (or the clock of this machine is wrong)"
    assert texts and all(text.endswith(wanted) for text in texts)


WALL = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow|today)\(|\bdate\.today\(")
TELLS_THE_TIME = {
    "pi_system/net/certificates.py",  # how long a new certificate holds
    "pi_system/parties/journal.py",  # when an event was
}


def test_no_limit_is_of_the_time_of_day() -> None:
    folders = ("net", "parties", "backends", "cli")
    sources = [path for name in folders for path in (ROOT / "pi_system" / name).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in sources if WALL.search(path.read_text())}
    assert found == TELLS_THE_TIME
