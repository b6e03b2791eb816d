"""kill -9 of real parties at any moment, then a restart on the same stores: no id is used twice.

The test stands between client and server and keeps a record of its own: of every inference the
id and a hash of what followed on the wire.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_party
from fss_networks import images, planned, residual

from pi_system.backends.base import Database
from pi_system.backends.fss.store import Store
from pi_system.graph import serialize
from pi_system.graph.execute import run
from pi_system.net.framing import ABORT, BEAT, HEADER

TRIALS = 24


class Wire:
    """Relays one connection; after frame ``strike`` of both directions together, calls ``hit``.

    Attributes:
        used: per inference seen, its id and the hash of the client's first message.
        frames: relayed so far.
    """

    def __init__(self, port: int, strike: int, hit: Any) -> None:
        self.used: list[tuple[int, str]] = []
        self.frames = 0
        self._strike, self._hit = strike, hit
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._to = port
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        try:
            client, _ = self._listener.accept()
            self._sockets.append(client)
            server = socket.create_connection(("127.0.0.1", self._to))
            self._sockets.append(server)
        except OSError:  # the server was killed before it listened, or nobody came
            self._end()
            return
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=self._relay, args=(server, client, False), daemon=True)
        self._threads.append(back)
        back.start()
        self._relay(client, server, True)

    def _relay(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        expected = False
        with contextlib.suppress(OSError):
            stream = source.makefile("rb")
            while len(head := stream.read(HEADER.size)) == HEADER.size:
                (size,) = HEADER.unpack(head)
                if size == BEAT:
                    target.sendall(head)
                    continue
                if size == ABORT:
                    head += stream.read(HEADER.size)
                    (size,) = HEADER.unpack(head[-HEADER.size :])
                payload = stream.read(size)
                if from_client and expected:
                    digest = hashlib.sha256(payload[8:]).hexdigest()
                    self.used.append((int.from_bytes(payload[:8], "little"), digest))
                expected = from_client and payload.startswith(b"online ")
                with self._lock:
                    self.frames += 1
                    if self.frames == self._strike:
                        self._hit()
                target.sendall(head + payload)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _end(self) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def close(self) -> None:
        self._end()
        for thread in self._threads:
            thread.join(5)


class Trial:
    """The stores, and the parties started on them again and again."""

    def __init__(self, folder: Path, server: Path | Database | None = None) -> None:
        self.folder = folder
        self.server = server or folder / "server"
        graph, _ = planned(residual(side=4))
        serialize.save(folder / "model", graph)
        x = images(graph, 1)
        np.save(folder / "x.npy", x)
        np.save(folder / "logits.npy", run(graph, x))
        self.spawn = multiprocessing.get_context("forkserver")
        self.spawn.set_forkserver_preload(
            ["pi_system.backends.fss.party", "pi_system.parties.server", "pi_system.parties.client"]
        )
        self.record: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def dealer(self) -> Iterator[None]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.dealer_port = listening.getsockname()[1]
            process = self._start(store_party.dealer, listening)
            listening.close()
            try:
                yield
            finally:
                process.kill()
                process.join()

    def session(self, victim: str = "", strike: int = 0, after: float = 0.0) -> tuple[int, int]:
        """One session; exit codes of client and server.

        Args:
            strike: kill the victim when so many frames have passed, before the last is delivered.
            after: or so many seconds after the start.
        """
        processes: dict[str, BaseProcess] = {}
        all_started = threading.Event()

        def hit() -> None:
            # The client may be heard of before its start has returned here.
            all_started.wait()
            processes[victim].kill()

        with (
            socket.create_server(("127.0.0.1", 0)) as listening,
            contextlib.closing(Wire(listening.getsockname()[1], strike, hit)) as wire,
        ):
            processes["server"] = self._start(
                store_party.server, listening, self.dealer_port,
                str(self.folder / "model"), self.server,
            )  # fmt: skip
            listening.close()  # so that a connection the server does not accept ends with it
            processes["client"] = self._start(
                store_party.client, wire.port, self.dealer_port, str(self.folder / "client"),
                str(self.folder / "x.npy"), str(self.folder / "logits.npy"),
            )  # fmt: skip
            all_started.set()
            if after:
                time.sleep(after)
                hit()
            started = time.monotonic()
            for process in (processes["client"], processes["server"]):
                process.join(store_party.PATIENCE)
                assert process.exitcode is not None, "a party hangs"
            # Told by the end of the connection: no wait has lasted for its limit.
            assert time.monotonic() - started < store_party.PATIENCE - 5
        self.record += wire.used
        self.frames = wire.frames
        return processes["client"].exitcode or 0, processes["server"].exitcode or 0

    def _start(self, target: Any, *arguments: Any) -> BaseProcess:
        process = self.spawn.Process(target=target, args=arguments)
        process.start()
        return process


@pytest.mark.parametrize(("kind", "trials"), [("disk", TRIALS), ("postgres", TRIALS // 3)])
def test_no_id_is_used_twice_however_the_parties_are_killed(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, trials: int
) -> None:
    shared = request.getfixturevalue("database") if kind == "postgres" else None
    trial = Trial(tmp_path, shared)
    rng = random.Random(4)
    with trial.dealer():
        started = time.monotonic()
        assert trial.session() == (0, 0)
        seconds, frames = min(time.monotonic() - started, 2.0), trial.frames
        killed = 0
        for number in range(trials):
            victim = ("client", "server")[number % 2]
            if number % 4 < 3:
                codes = trial.session(victim, strike=rng.randrange(8, frames))
            else:
                codes = trial.session(victim, after=rng.uniform(0.02, seconds))
            victims, others = codes if victim == "client" else codes[::-1]
            killed += victims == -signal.SIGKILL
            assert victims in (0, -signal.SIGKILL) and others in (0, store_party.LOST), codes
        assert trial.session() == (0, 0)
    assert killed > trials // 2
    ids = [inference for inference, _ in trial.record]
    assert len(ids) > store_party.INFERENCES * 3
    assert all(a < b for a, b in itertools.pairwise(ids)), ids
    assert len({digest for _, digest in trial.record}) == len(ids)
    for role, where in (("client", tmp_path / "client"), ("server", trial.server)):
        with Store(where, role) as kept:
            (pair,) = kept.ledger.pairs()
            entry = kept.ledger.get(pair)
            assert entry is not None and entry.burnt >= max(ids)


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_store_put_back_while_nobody_ran_is_refused_with_its_exit_code(
    tmp_path: Path, role: str
) -> None:
    trial = Trial(tmp_path)
    with trial.dealer():
        assert trial.session() == (0, 0)
        files = [path for path in (tmp_path / role).iterdir() if path.is_file()]
        before = {path: path.read_bytes() for path in files}
        assert trial.session() == (0, 0)
        for path, content in before.items():
            with open(path, "r+b") as target:  # the same file, an older content
                target.truncate()
                target.write(content)
        client, server = trial.session()
    assert (client, server) == (store_party.REFUSED, store_party.REFUSED)
