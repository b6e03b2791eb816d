"""Servers that share one ledger, behind a balancer, and dealers that fill its stock together."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose

from pi_system.backends import base
from pi_system.backends.base import Database
from pi_system.backends.fss.store import Store
from pi_system.errors import UsageError
from pi_system.net.tap import Tape
from pi_system.parties import client as client_party
from pi_system.parties import handshake
from pi_system.parties.address import Address, parse_addresses
from pi_system.parties.classify import prepare
from pi_system.parties.client import Client, ClientSettings
from pi_system.parties.timeouts import Timeouts


class Balancer:
    """Hands connections to servers in turns; knows nothing of what they say."""

    def __init__(self, servers: list[Address]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.at = Address("127.0.0.1", self._listener.getsockname()[1])
        self._turns = itertools.cycle(servers)
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(next(self._turns))
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def alternating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients take the dealers in turns and not at random."""
    turn = itertools.count()

    def order(dealers: int) -> list[int]:
        first = next(turn) % dealers
        return [*range(first, dealers), *range(first)]

    monkeypatch.setattr(client_party, "order", order)


class Deployment:
    """Two servers on one database behind a balancer, and two dealers."""

    def __init__(self, start: Callable[..., Any], model: Path, database: Database) -> None:
        common = ("--listen", "127.0.0.1:0", "--insecure")
        self.dealers = [start("dealer", *common) for _ in range(2)]
        at = ",".join(str(dealer.at) for dealer in self.dealers)
        self.servers = [
            start("server", "--model", str(model), "--dealer", at, "--ledger", database.url,
                  "--metrics", "0", *common)
            for _ in range(2)
        ]  # fmt: skip
        self.balancer = Balancer([server.at for server in self.servers])

    def settings(self, store: Path | None, **changes: Any) -> ClientSettings:
        backend = base.get("fss")
        if store is not None:
            base.open_store(backend, store, "client")
        values: dict[str, Any] = {
            "server": self.balancer.at,
            "dealers": tuple(dealer.at for dealer in self.dealers),
            "backend": backend,
            "backend_name": "fss",
            "timeouts": Timeouts(step=8.0, prepare=20.0),
        }
        return ClientSettings(**{**values, **changes})


@pytest.fixture
def deployment(
    parties: Any, launch: Callable[..., Any], toy_model: Path, database: Database,
) -> Iterator[Deployment]:  # fmt: skip
    made = Deployment(launch, toy_model, database)
    yield made
    made.balancer.close()


def made_by(log: list[dict[str, Any]]) -> int:
    """Inferences whose material a dealer handed out."""
    return sum(line["count"] for line in log if line.get("request", "").startswith("material"))


def test_replicas_and_dealers_serve_one_stock(
    deployment: Deployment, database: Database, alternating: None, tmp_path: Path,
    toys: ModuleType, toy_images: npt.NDArray[np.float32],
) -> None:  # fmt: skip
    """Three clients at once lay in at either server from either dealer, and use at the other."""
    expected = toys.forward(toys.toy_graph(), toy_images)
    used: list[tuple[int, int]] = []
    failures: list[BaseException] = []

    def live(number: int) -> None:
        try:
            settings = deployment.settings(tmp_path / str(number))
            for round_ in range(1, 4):
                assert prepare(settings, 2) == 2 * round_
            alone = deployment.settings(None, dealers=(), backend=settings.backend)
            for left in (4, 2, 0):
                tape = Tape()
                with Client(alone) as client:
                    client.setup()
                    tape.attach(client._channels["server"])
                    for _ in range(2):
                        client.offline(1)
                        logits = client.online(toy_images[number : number + 1])
                        assert_allclose(logits[0], expected[number], atol=0.05)
                    assert client.stock == left
                used.extend(
                    (number, int.from_bytes(frame.data[:8], "little"))
                    for frame in tape.frames
                    if (frame.phase, frame.direction, frame.layer) == ("online", "sent", "input")
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert len(used) == 18 and max(Counter(used).values()) == 1
    with Store(database, "server") as store:
        assert store.count() == 0 and len(store.ledger.pairs()) == 3
    answered = []
    for server in deployment.servers:
        code, log = server.stop()
        assert code == 0
        answered.append(sum(str(line.get("request")).startswith("online") for line in log))
    assert sum(answered) == 18 and min(answered) > 0
    material = [made_by(dealer.stop()[1]) for dealer in deployment.dealers]
    assert sum(material) == 18 and min(material) > 0


def test_a_server_and_a_dealer_that_are_gone_do_not_matter(
    deployment: Deployment, alternating: None, tmp_path: Path,
    toy_images: npt.NDArray[np.float32],
) -> None:  # fmt: skip
    first = deployment.servers[0]
    settings = deployment.settings(tmp_path / "client", server=first.at)
    assert prepare(settings, 1) == 1
    for lost in (first, deployment.dealers[0]):
        lost.process.kill()
        lost.process.wait()
    other = deployment.settings(
        None, server=deployment.servers[1].at, backend=settings.backend,
        timeouts=Timeouts(step=1.0, prepare=20.0),
    )  # fmt: skip
    for stock in (2, 3):
        assert prepare(other, 1) == stock
    with Client(other) as client:
        client.setup()
        client.offline(3)
        assert client.online(toy_images[:1]).shape == (1, 10)


def test_a_session_names_its_dealer() -> None:
    for dealers in (1, 2, 3, 7):
        for chosen in range(dealers):
            names = {handshake.new_session(chosen, dealers) for _ in range(20)}
            assert len(names) == 20 and all(len(name) == 32 for name in names)
            assert {handshake.dealer_of(name, dealers) for name in names} == {chosen}
    assert {client_party.order(2)[0] for _ in range(60)} == {0, 1}


def test_several_addresses_are_separated_by_commas() -> None:
    assert parse_addresses("a:1, [::1]:2") == (Address("a", 1), Address("::1", 2))
    with pytest.raises(UsageError, match="is no address"):
        parse_addresses("a:1,")
