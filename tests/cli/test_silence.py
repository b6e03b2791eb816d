"""Peers that are there and say nothing: within 10 s, by default, whoever waits for one has ended.

All cases run at once, over TLS and with no limit changed: parties that are stopped (SIGSTOP) in
every phase, and strangers who fall silent at every step of coming in, or talk rubbish. And one that
computes for longer than that, and is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi_system.errors import PiError
from pi_system.net import certificates
from pi_system.net.channel import Channel
from pi_system.net.listen import connect
from pi_system.net.tls import Identity
from pi_system.parties import handshake
from pi_system.parties.address import Address, parse_address
from pi_system.parties.handshake import Hello

PHASES = ("setup", "offline", "idle")
ROLES = ("client", "server", "dealer")
LIMIT = 10.0
BUSY = 11.0
SESSION = "5" * 32
RUBBISH = random.Random(5).randbytes(4096)


class Party:
    """A process, and when it said what on stderr."""

    def __init__(self, *arguments: str, stop: str = "", compute: str = "") -> None:
        root = Path(__file__).resolve().parents[2]
        script = [sys.executable, str(Path(__file__).with_name("stopping_party.py"))]
        self.process = subprocess.Popen(
            [*script, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "STOP_AT": stop, "COMPUTE": compute, "PYTHONPATH": str(root)},
        )  # fmt: skip
        self.said: list[tuple[float, str]] = []
        self.ended = 0.0
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append((time.monotonic(), line.rstrip()))
        self.process.wait()
        self.ended = time.monotonic()

    @property
    def at(self) -> str:
        """Where it listens; to be asked once."""
        assert self.process.stdout is not None
        ready = json.loads(self.process.stdout.readline())
        return f"{ready['host']}:{ready['port']}"

    def stopped(self) -> float:
        """Wait until it is; the time."""
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "T":
                return time.monotonic()
            time.sleep(0.01)
        raise AssertionError(("it never stopped", self.said))

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self, seconds: float = 20) -> tuple[int, str]:
        """Its exit code and last line, once it has ended by itself."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code, (self.said or [(0.0, "")])[-1][1]

    def failures(self) -> list[tuple[float, dict[str, Any]]]:
        """Of its sessions: when, and the event."""
        events = [(when, json.loads(line)) for when, line in self.said]
        return [(when, event) for when, event in events if event["event"] in ("failed", "refused")]

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@dataclass
class Case:
    """A party that stopped in a phase, and its session's client (itself, or who waits for it)."""

    party: Party
    client: Party
    stopped: float
    store: Path


@dataclass
class Found:
    """What came of everything."""

    cases: dict[tuple[str, str], Case]
    silences: dict[str, tuple[float, str]]
    server: Party
    dealer: Party
    before: tuple[int, int]
    after: tuple[int, int]
    client: Callable[..., Party]
    server_store: Path
    patient: tuple[float, int, str]


def ledger(store: Path) -> dict[str, tuple[int, int]]:
    """For every pair of a store the next id and the last one burnt, from a copy: it is in use."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            if (store / name).exists():
                shutil.copy(store / name, copy)
        with contextlib.closing(sqlite3.connect(Path(copy) / "ledger.sqlite")) as book:
            rows = book.execute("SELECT pair, next, burnt FROM pair").fetchall()
    return {pair: (next_id, burnt) for pair, next_id, burnt in rows}


def until_dropped(begin: Callable[[], socket.socket | Channel]) -> tuple[float, str]:
    """How long a stranger is borne who falls silent after ``begin``, and what it is told."""
    with begin() as stranger:
        started, told = time.monotonic(), ""
        try:
            if isinstance(stranger, Channel):
                while True:
                    stranger.recv()
            stranger.settimeout(3 * LIMIT)
            while stranger.recv(1 << 10):
                pass
        except (OSError, PiError) as error:
            told = str(error)
        return time.monotonic() - started, told


def strangers(role: str, at: Address, certs: Path) -> dict[str, Callable[[], Any]]:
    """Who falls silent at the ``role``, and where, or talks rubbish."""
    client, server = (Identity.of(certs, name) for name in ("client", "server"))

    def raw(words: bytes) -> socket.socket:
        sock = socket.create_connection(at)
        sock.sendall(words)
        return sock

    def secure(identity: Identity = client) -> Channel:
        return connect(*at, peer=role, identity=identity, timeout=3 * LIMIT)

    def greeting() -> Channel:
        channel = secure()
        handshake.greet(channel, Hello("client", "7" * 32, "fss", 1), role="server")
        return channel

    def lonely() -> Channel:
        channel = secure()
        handshake.say(channel, Hello("client", "8" * 32, "fss", 1, ("x:1",)))
        return channel

    def paired() -> Channel:
        one, other = secure(), secure(server)
        for channel, name in ((one, "client"), (other, "server")):
            handshake.say(channel, Hello(name, SESSION, "fss", 1, ("x:1",)))
        threading.Thread(target=until_dropped, args=(lambda: one,)).start()
        return other

    def rubbish(begin: Callable[[], Channel]) -> Channel:
        channel = begin()
        channel.send(RUBBISH)
        return channel

    steps: dict[str, Callable[[], Any]] = {
        "connected": lambda: raw(b""), "in TLS": lambda: raw(b"\x16\x03\x01"), "after TLS": secure,
        "rubbish": lambda: raw(RUBBISH), "rubbish after TLS": lambda: rubbish(secure),
    }  # fmt: skip
    if role == "server":
        later = {"after hello": greeting, "rubbish after hello": lambda: rubbish(greeting)}
        return {**steps, **later}
    return {**steps, "alone after hello": lonely, "paired after hello": paired}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Iterator[Found]:
    folder = tmp_path_factory.mktemp("silence")
    images: npt.NDArray[np.float32] = (
        np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)
    )
    np.save(folder / "x.npy", images)
    certs = folder / "certs"
    certificates.make(certs)
    links = ("--certs", str(certs), "--per-client", "8")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(24) as pool:

        def start(*arguments: str, **how: str) -> Party:
            party = Party(*arguments, **how)
            stack.callback(party.close)
            return party

        def dealer(stop: str = "") -> Party:
            return start("dealer", "--listen", "127.0.0.1:0", *links, stop=stop)

        def server(dealers: list[str], stop: str = "", compute: str = "") -> Party:
            model = ("--model", str(toy_model), "--dealer", ",".join(dealers))
            store = ("--store", str(folder / f"server {stop}{compute}".strip()))
            return start(
                "server",
                "--listen",
                "127.0.0.1:0",
                *model,
                *links,
                *store,
                stop=stop,
                compute=compute,
            )

        def client(server: str, dealer: str, store: Path, stop: str = "") -> Party:
            at = ("--server", server, "--dealer", dealer, "--images", str(folder / "x.npy"))
            secure = ("--certs", str(certs), "--store", str(store))
            return start("client", *at, *secure, "--format", "csv", stop=stop)

        dealers = {stop: dealer(stop) for stop in ("", *PHASES)}
        dealers_at = {stop: party.at for stop, party in dealers.items()}
        known = list(dealers_at.values())
        servers = {stop: server(known[:1] if stop else known, stop) for stop in ("", *PHASES)}
        servers_at = {stop: party.at for stop, party in servers.items()}

        def measured() -> tuple[int, int]:
            return servers[""].descriptors(), dealers[""].descriptors()

        def case(role: str, stop: str) -> Case:
            store = folder / f"client {role} {stop}"
            at = (
                servers_at[stop if role == "server" else ""],
                dealers_at[stop if role == "dealer" else ""],
            )
            asking = client(*at, store, stop if role == "client" else "")
            party = {"client": asking, "server": servers[stop], "dealer": dealers[stop]}[role]
            stopped = party.stopped()
            if role != "client":
                asking.process.wait(3 * LIMIT)
            return Case(party, asking, stopped, store)

        def patient() -> tuple[float, int, str]:
            started = time.monotonic()
            asking = client(slow.at, dealers_at[""], folder / "patient")
            code, line = asking.end(4 * LIMIT)
            return asking.ended - started, code, line

        slow = server(known[:1], compute=str(BUSY))
        before = measured()
        waiting = pool.submit(patient)
        silences: dict[str, Future[tuple[float, str]]] = {}
        for role, at in (("server", servers_at[""]), ("dealer", dealers_at[""])):
            for step, begin in strangers(role, parse_address(at), certs).items():
                silences[f"{role}: {step}"] = pool.submit(until_dropped, begin)
        running = {
            (role, stop): pool.submit(case, role, stop) for role in ROLES for stop in PHASES
        }  # fmt: skip
        cases = {key: future.result() for key, future in running.items()}
        waited = waiting.result()
        dropped = {name: future.result() for name, future in silences.items()}
        until = max(one.stopped for one in cases.values()) + LIMIT
        while measured() > before and time.monotonic() < until:
            time.sleep(0.05)
        after = measured()
        for one in cases.values():
            one.party.go_on()
        yield Found(
            cases, dropped, servers[""], dealers[""], before, after,
            lambda store: client(servers_at[""], dealers_at[""], store), folder / "server",
            waited,
        )  # fmt: skip


each_phase = pytest.mark.parametrize("phase", PHASES)


@each_phase
@pytest.mark.parametrize("role", ["server", "dealer"])
def test_a_client_whose_peer_stops_ends_in_time(found: Found, role: str, phase: str) -> None:
    case = found.cases[role, phase]
    code, line = case.client.end()
    assert code == 5 and f"the {role} gave no sign of life for 8 s" in line, line
    assert case.client.ended - case.stopped < LIMIT
    assert len(case.client.said) == 1


@each_phase
def test_server_and_dealer_end_the_session_of_a_client_that_stops(found: Found, phase: str) -> None:
    """Both, each within the time: one by itself, the other by that or by what it is told."""
    case = found.cases["client", phase]
    for party in (found.server, found.dealer):
        near = [
            event
            for when, event in party.failures()
            if 3 < when - case.stopped < LIMIT
            and "the client gave no sign of life for 8 s" in event["error"]
        ]
        assert near, party.failures()
        assert all(event["kind"] in ("PeerTimeout", "PeerError") for event in near)


@each_phase
@pytest.mark.parametrize("role", ROLES)
def test_who_goes_on_afterwards_finds_its_session_over(found: Found, role: str, phase: str) -> None:
    party = found.cases[role, phase].party
    if role == "client":
        code, line = party.end()
        assert code == 5 and line.startswith("error: "), line
        assert len(party.said) == 1
        return
    until = time.monotonic() + LIMIT
    while not party.failures() and time.monotonic() < until:
        time.sleep(0.02)
    (_, event), *more = party.failures()
    assert not more and event["kind"].startswith("Peer"), event
    party.process.terminate()
    code, _ = party.end()
    assert code == 0 and not any("Traceback" in line for _, line in party.said)


def test_a_peer_that_computes_for_longer_is_waited_for(found: Found) -> None:
    seconds, code, line = found.patient
    assert code == 0, line
    assert seconds > BUSY


def test_nothing_is_held_open(found: Found) -> None:
    """Sockets, files and all, of a server and a dealer that were let down by six peers each."""
    assert found.after == found.before


@pytest.mark.parametrize("phase", ["offline", "idle"])
@pytest.mark.parametrize("role", ROLES)
def test_material_that_was_begun_is_burnt_and_others_are_served(
    found: Found, role: str, phase: str
) -> None:
    store = found.cases[role, phase].store
    ((pair, (claimed, burnt)),) = ledger(store).items()
    assert claimed > 0 and burnt == claimed - 1  # all that was ever numbered
    if role != "server":
        there, burnt_there = ledger(found.server_store)[pair]
        assert burnt_there == there - 1 >= 0
        # A client that went on may have begun one more, for a server that was gone by then.
        assert claimed - there in ((0, 1) if (role, phase) == ("client", "idle") else (0,))
    if (role, phase) == ("client", "offline"):
        again = found.client(store)
        code, line = again.end()
        assert code == 0, line
        assert ledger(store) == {pair: (claimed + 4, burnt + 4)}
        assert ledger(found.server_store)[pair] == (claimed + 4, burnt + 4)


@pytest.mark.parametrize("at", ["server", "dealer"])
def test_strangers_who_fall_silent_are_dropped(found: Found, at: str) -> None:
    mine = {name: one for name, one in found.silences.items() if name.startswith(at)}
    assert len(mine) >= 6
    for name, (seconds, told) in mine.items():
        assert seconds < LIMIT, (name, seconds, told)
        if "hello" not in name:
            assert seconds < 5, (name, seconds, told)
    assert "no valid JSON" in mine[f"{at}: rubbish after TLS"][1]
    if at == "server":
        told = mine["server: after hello"][1]
        assert told == "the server gave up: the client gave no sign of life for 8 s"
    else:
        assert "the server did not come within 8 s" in mine["dealer: alone after hello"][1]
        told = mine["dealer: paired after hello"][1]
        assert told == "the dealer gave up: the server gave no sign of life for 8 s"
