"""Parties whose disk is full or read-only: one line that says so, nothing lost but what is burnt.

The disk is a file system of its own, 512 kB in memory, mounted where only the parties of the test
see it. Where that needs rights that are missing, a limit on the size of files stands for it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi_system.backends.fss.store import Store
from pi_system.parties.classify import classify

PARTY = [sys.executable, "-m", "pi_system.cli.party"]
SIZE = 512 << 10
Launch = Callable[..., Any]
Deploy = Callable[..., Any]
Images = npt.NDArray[np.float32]


class Disk:
    """A small file system in a mount namespace of its own.

    Attributes:
        path: where parties inside see it.
        inside: before a command line: run it in there.
        files: the same folder as this process sees it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = f"mount -t tmpfs -o size={SIZE},mode=700 none '{path}' && echo ready && exec cat"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", mount], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            pytest.skip(f"no file system can be mounted here: {self._holder.communicate()[1]}")
        self.inside = ("nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt")
        self.files = Path(f"/proc/{self._holder.pid}/root{path}")

    def fill(self, leave: int = 0) -> None:
        """Until so many bytes are left."""
        with open(self.files / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while (room := self.room() - leave) > 0:
                file.write(bytes(min(room, 4096)))

    def free(self) -> None:
        (self.files / "filler").unlink(missing_ok=True)

    def room(self) -> int:
        at = os.statvfs(self.files)
        return at.f_bavail * at.f_bsize

    def remount(self, how: str) -> None:
        command = [*self.inside, "mount", "-o", f"remount,{how}", str(self.path)]
        subprocess.run(command, check=True)

    def close(self) -> None:
        self._holder.communicate()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


class Commands:
    """``pi-party client`` against a server and a dealer, from inside a disk or not."""

    def __init__(
        self, server: Any, dealer: Any, images: Path, inside: tuple[str, ...] = ()
    ) -> None:
        self._at = ("--server", str(server.at), "--dealer", str(dealer.at))
        self._images, self._inside = images, inside

    def __call__(self, *options: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*self._inside, *PARTY, "client", *self._at, "--insecure", "--format", "csv", *options],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.stderr.count("\n") == (done.returncode != 0), done.stderr
        return done.returncode, done.stdout, done.stderr

    def prepare(self, store: Path, count: int) -> tuple[int, str, str]:
        return self("--store", str(store), "--prepare", str(count))

    def use(self, store: Path | None) -> tuple[int, str, str]:
        more = () if store is None else ("--store", str(store))
        return self("--images", str(self._images), *more)


@pytest.fixture
def image(tmp_path: Path, toy_images: Images) -> Path:
    np.save(tmp_path / "x.npy", toy_images[:1])
    return tmp_path / "x.npy"


def stock(count: int) -> tuple[int, str, str]:
    return 0, f"stock\n{count}\n", ""


def entry(store: Path) -> tuple[int, int]:
    """``next`` and ``burnt`` of the one pair of a store that nobody uses now."""
    with tempfile.TemporaryDirectory() as copy:
        for file in store.glob("ledger.sqlite*"):
            shutil.copy(file, copy)
        with contextlib.closing(sqlite3.connect(Path(copy) / "ledger.sqlite")) as book:
            (found,) = book.execute("SELECT next, burnt FROM pair").fetchall()
    return int(found[0]), int(found[1])


def test_a_client_on_a_full_disk_says_so_and_goes_on_after_space_is_made(
    disk: Disk, deploy: Deploy, image: Path, tmp_path: Path
) -> None:
    made = deploy("--store", str(tmp_path / "server"), backend="fss")
    client = Commands(made.server, made.dealer, image, disk.inside)
    store = disk.path / "store"
    disk.fill()
    code, out, err = client.prepare(store, 2)
    assert (code, out) == (1, "") and "full; make space and try again" in err
    assert err.startswith(f"error: {store}: ")
    disk.free()
    assert client.prepare(store, 2) == stock(2)  # what was left of the first try does no harm

    disk.fill(leave=140_000)  # in the middle: two more items go in, not thirty
    code, out, err = client.prepare(store, 30)
    assert (code, out) == (1, "") and err.startswith(f"error: cannot write {store}/")
    assert err.endswith(".item: No space left on device; make space and try again\n")
    assert not list(disk.files.rglob("*.tmp"))
    whole = len(list(disk.files.rglob("*.item")))
    assert 2 <= whole < 32 and entry(disk.files / "store") == (32, -1)  # no id is given out again

    disk.fill()
    code, out, err = client.use(store)
    assert (code, out) == (1, "") and "cannot write the ledger: the disk is full; make" in err
    disk.free()
    code, out, err = client.use(store)
    assert (code, err) == (0, "") and out.count("\n") == 2
    # Whether the refused claim burnt its item is the ledger's to say; the answer burnt one more.
    given, burnt = entry(disk.files / "store")
    assert given == 32 and burnt in (0, 1)
    assert client.prepare(store, 1) == stock(whole - burnt)
    assert entry(disk.files / "store") == (33, burnt)
    made.server.stop()
    with Store(tmp_path / "server", "server") as kept:
        (pair,) = kept.ledger.pairs()
        same = kept.ledger.get(pair)
        assert same is not None and (same.next, same.burnt) == (33, burnt)


def test_a_server_on_a_full_disk_refuses_who_needs_it_and_serves_the_rest(
    disk: Disk, launch: Launch, toy_model: Path, image: Path, tmp_path: Path
) -> None:
    dealer = launch("dealer", "--listen", "127.0.0.1:0", "--insecure")
    options = (
        "--model", str(toy_model), "--listen", "127.0.0.1:0", "--dealer", str(dealer.at),
        "--insecure", "--store", str(disk.path / "store"),
    )  # fmt: skip
    disk.fill()
    done = subprocess.run(
        [*disk.inside, *PARTY, "server", *options], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "full; make space and try again" in done.stderr
    disk.free()
    server = launch("server", *options, inside=disk.inside)
    client = Commands(server, dealer, image)
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert client.prepare(mine, 2) == stock(2)
    disk.fill()
    for refused in (client.prepare(mine, 2), client.use(mine), client.use(other)):
        assert refused[:2] == (5, "") and "the server gave up: " in refused[2]
        assert "cannot write the ledger: the disk is full; make space" in refused[2]
    code, out, err = client.use(None)
    assert (code, err) == (0, "") and out.count("\n") == 2
    disk.free()
    code, out, err = client.use(mine)  # the same process serves on
    assert (code, err) == (0, "") and out.count("\n") == 2

    disk.fill(leave=110_000)
    code, out, err = client.prepare(mine, 30)
    assert (code, out) == (5, "") and ".item: No space left on device; make space" in err
    disk.free()
    code, out, err = client.prepare(mine, 1)
    assert (code, err) == (0, "") and 1 <= int(out.split()[1]) < 10
    code, events = server.stop()
    assert code == 0 and not list(disk.files.rglob("*.tmp"))
    kinds = [event["kind"] for event in events if event["event"] == "failed"]
    assert kinds == ["PiError"] * 4
    assert entry(disk.files / "store") == entry(mine)


def test_a_store_that_is_read_only(disk: Disk, deploy: Deploy, image: Path, tmp_path: Path) -> None:
    made = deploy("--store", str(tmp_path / "server"), backend="fss")
    client = Commands(made.server, made.dealer, image, disk.inside)
    assert client.prepare(disk.path / "store", 1) == stock(1)
    (disk.files / "empty").mkdir(mode=0o700)
    disk.remount("ro")
    for name, text in (
        ("store", "cannot write the ledger: it is read-only here; the store must be writable"),
        ("empty", "Read-only file system; it must be writable"),
        ("new", "Read-only file system; it must be writable"),
    ):
        code, out, err = client.prepare(disk.path / name, 1)
        assert (code, out) == (1, "") and text in err and str(disk.path / name) in err
    code, out, err = client.use(disk.path / "store")
    assert (code, out) == (1, "") and "must be writable" in err
    disk.remount("rw")
    code, out, err = client.use(disk.path / "store")
    assert (code, err) == (0, "")


def test_a_limit_on_files_stands_for_a_full_disk_of_a_running_server(
    deploy: Deploy, image: Path, tmp_path: Path
) -> None:
    made = deploy("--store", str(tmp_path / "server"), backend="fss")
    client = Commands(made.server, made.dealer, image)
    mine = tmp_path / "mine"
    assert client.prepare(mine, 1) == stock(1)
    process = made.server.process.pid
    usual = resource.prlimit(process, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    code, out, err = client.prepare(mine, 1)
    assert (code, out) == (5, "") and "cannot write" in err and "full" in err
    assert client.use(None)[0] == 0
    resource.prlimit(process, resource.RLIMIT_FSIZE, usual)
    code, out, err = client.use(mine)
    assert (code, err) == (0, "")
    assert made.server.stop()[0] == 0


def test_certificates_that_do_not_fit_are_not_left_half_made(tmp_path: Path, disk: Disk) -> None:
    disk.fill(leave=3 * 4096)
    command = [*disk.inside, *PARTY, "certs", str(disk.path / "certs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "No space left on device; make space and try again" in done.stderr
    assert not list((disk.files / "certs").iterdir())
    disk.free()
    assert subprocess.run(command, capture_output=True).returncode == 0


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_log_on_a_full_disk_does_not_stop_a_server(deploy: Deploy, toy_images: Images) -> None:
    with open(FULL, "w") as full:
        made = deploy(stderr=full)
        report = classify(made.client(), toy_images)
        assert len(report.inferences) == 3
        for party in (made.server, made.dealer):
            party.process.terminate()
            assert party.process.wait(10) == 0


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "command", [("--help",), ("dealer", "--listen", "127.0.0.1:0", "--insecure")]
)
def test_a_full_disk_behind_standard_output(command: tuple[str, ...]) -> None:
    with open(FULL, "w") as full:
        done = subprocess.run(
            [*PARTY, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr == (
        "error: cannot write the output: No space left on device; make space and try again\n"
    )
