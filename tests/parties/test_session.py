"""Sessions within one process: three threads, real sockets, toy backend."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pi_system.errors import PeerError, ProtocolError, RefusedError, UsageError
from pi_system.net.listen import Listener, connect
from pi_system.net.meter import Meter
from pi_system.parties import commands, handshake
from pi_system.parties.address import Address
from pi_system.parties.classify import classify
from pi_system.parties.client import Client, ClientSettings
from pi_system.parties.commands import Command
from pi_system.parties.dealer import Dealer
from pi_system.parties.public import receive_public
from pi_system.parties.server import ServerSettings, serve_once
from pi_system.parties.serving import ServingSettings
from pi_system.parties.timeouts import Timeouts

PATIENT = Timeouts(step=20.0, prepare=20.0, idle=20.0, hello=10.0)
HASTY = Timeouts(step=1.0, prepare=1.0, idle=3.0, hello=1.0)


class Stage:
    """A server and a dealer in threads, and the settings of a client."""

    def __init__(
        self, toys: ModuleType, pool: ThreadPoolExecutor, backend: str, timeouts: Timeouts
    ) -> None:
        self.timeouts = timeouts
        self.graph = toys.toy_graph()
        self.backend = getattr(toys, backend)()
        self.listeners = Listener("127.0.0.1", 0), Listener("127.0.0.1", 0)
        self.server_at, self.dealer_at = (Address(x.host, x.port) for x in self.listeners)
        server = ServerSettings(
            model=self.graph,
            sha256=self.graph.sha256(),
            backend=self.backend,
            backend_name="toy",
            dealers=(self.dealer_at,),
            timeouts=timeouts,
            log_frames=True,
        )
        dealer = ServingSettings(self.backend, "toy", timeouts=timeouts, log_frames=True)
        self.dealer: Future[Meter] = pool.submit(Dealer(self.listeners[1], dealer).serve_once)
        self.server: Future[Meter] = pool.submit(serve_once, self.listeners[0], server)

    def end(self) -> None:
        """Wake whoever still waits for a connection."""
        for address in (self.server_at, self.dealer_at):
            with contextlib.suppress(PeerError):
                connect(*address, retry_for=0).close()
        for future in (self.server, self.dealer):
            future.exception(10)
        for listener in self.listeners:
            listener.close()

    def client(self, **changes: Any) -> ClientSettings:
        values: dict[str, Any] = {
            "server": self.server_at,
            "dealers": (self.dealer_at,),
            "backend": self.backend,
            "backend_name": "toy",
            "timeouts": self.timeouts,
        }
        return ClientSettings(**{**values, **changes})


@pytest.fixture
def stage(toys: ModuleType) -> Iterator[Callable[..., Stage]]:
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:

        def build(backend: str = "Plain", timeouts: Timeouts = PATIENT) -> Stage:
            made = Stage(toys, pool, backend, timeouts)
            stack.callback(made.end)
            return made

        yield build


def test_the_client_gets_plaintext_answers_and_every_byte_is_counted_on_both_sides(
    stage: Callable[..., Stage], toys: ModuleType, toy_images: npt.NDArray[np.float32]
) -> None:
    made = stage()
    report = classify(made.client(batch=2), toy_images, repeat=3, warmup=1)
    assert [inference.images for inference in report.inferences] == [(0, 1), (2,), (0, 1)]
    expected = toys.forward(made.graph, toy_images)
    for inference in report.inferences:
        assert_allclose(inference.logits, expected[list(inference.images)], rtol=1e-4)
    assert report.sha256 == made.graph.sha256()

    server, dealer = made.server.result(5), made.dealer.result(5)
    client = report.meter["events"]

    def total(events: Any, peer: str, direction: str) -> int:
        return sum(e[5] for e in events if e[3] == peer and e[4] == direction)

    for one, name, other, peer in (
        (client, "client", server.events, "server"),
        (client, "client", dealer.events, "dealer"),
        (server.events, "server", dealer.events, "dealer"),
    ):
        assert total(one, peer, "sent") == total(other, name, "received") > 0
        assert total(one, peer, "received") == total(other, name, "sent") > 0
    ours = [(e[0], e[1], e[5]) for e in client if e[3] == "server" and e[4] == "sent"]
    theirs = [(e[0], e[1], e[5]) for e in server.events if e[3:5] == ("client", "received")]
    assert ours == theirs  # the same phase and inference on both sides, message by message


def test_the_client_learns_architecture_and_masks_but_no_weight(
    stage: Callable[..., Stage],
) -> None:
    made = stage()
    with Client(made.client()) as client:
        public = client.model.graph
        assert public.nodes == made.graph.nodes and public.metadata == made.graph.metadata
        assert set(public.tensors) == {"relu1.mask", "relu2.mask"}
        for name, mask in public.tensors.items():
            assert_array_equal(mask, made.graph.tensors[name])


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (3, 8, 8), (0, 3, 8, 8)])
def test_images_of_a_wrong_shape_are_refused_before_they_leave(
    stage: Callable[..., Stage], shape: tuple[int, ...]
) -> None:
    made = stage()
    with pytest.raises(UsageError, match=r"the model takes \(N, 3, 8, 8\)"):
        classify(made.client(), np.zeros(shape, np.float32))
    with pytest.raises(PeerError, match="the client gave up: images of shape"):
        made.server.result(5)


def test_a_client_with_another_backend_is_refused(stage: Callable[..., Stage]) -> None:
    made = stage()
    with pytest.raises(RefusedError, match="backend 'toy' here, 'other' at the client"):
        Client(made.client(backend_name="other"))


def test_a_server_whose_dealer_never_comes_tells_the_client(
    stage: Callable[..., Stage],
) -> None:
    made = stage(timeouts=HASTY)
    connect(*made.dealer_at, peer="dealer").close()  # which the dealer takes for a session
    assert made.dealer.exception(5) is not None
    made.listeners[1].close()
    with (
        Listener("127.0.0.1", 0) as other,  # for the client alone, so that it asks the server
        pytest.raises(PeerError, match="the server gave up: cannot reach the dealer"),
    ):
        Client(made.client(dealers=(Address(other.host, other.port),)))
    with pytest.raises(PeerError, match="cannot reach the dealer"):
        made.server.result(5)


def test_a_dealer_tells_the_one_that_the_other_did_not_come(stage: Callable[..., Stage]) -> None:
    made = stage(timeouts=HASTY)
    with connect(*made.dealer_at, timeout=5, peer="dealer") as lonely:
        handshake.say(lonely, handshake.Hello("client", "0" * 32, "toy", 1))
        with pytest.raises(PeerError, match="the dealer gave up: the server did not come"):
            lonely.recv()
    assert made.dealer.exception(5) is not None


def test_a_dealer_refuses_two_that_disagree_on_the_batch(stage: Callable[..., Stage]) -> None:
    made = stage()
    with (
        connect(*made.dealer_at, timeout=5, peer="dealer") as first,
        connect(*made.dealer_at, timeout=5, peer="dealer") as second,
    ):
        handshake.say(first, handshake.Hello("client", "0" * 32, "toy", 1))
        handshake.say(second, handshake.Hello("server", "0" * 32, "toy", 2))
        for channel in (first, second):
            with pytest.raises(RefusedError, match="batch 1 at the client, 2 at the server"):
                channel.recv()


@pytest.mark.parametrize(
    ("orders", "reason"),
    [
        ([Command("online", 0)], "online at the wrong time"),
        ([Command("offline", 1)], "offline at the wrong time"),
        ([Command("setup"), Command("setup")], "setup at the wrong time"),
        ([Command("setup"), Command("online", 0)], "there is material for 0"),
        ([Command("setup"), Command("offline", 0)], "material of 0 inferences"),
        ([Command("setup"), Command("offline", 2), Command("online", 1)], "inference 1; 0 are"),
    ],
)
def test_commands_out_of_turn_are_refused(
    stage: Callable[..., Stage], orders: list[Command], reason: str
) -> None:
    made = stage()
    with (
        connect(*made.dealer_at, timeout=5, peer="dealer") as dealer,
        connect(*made.server_at, timeout=5, peer="server") as server,
    ):
        mine = handshake.Hello("client", "0" * 32, "toy", 1, ("dealer:1",))
        handshake.say(dealer, mine)
        handshake.greet(server, mine, role="server")
        handshake.hear(dealer, mine, role="dealer")
        receive_public(server)
        *allowed, last = orders
        for order in allowed:
            commands.send(server, order)
            commands.await_done(server)
        commands.send(server, last)
        with pytest.raises(ProtocolError, match=reason):
            made.server.result(5)


def test_one_time_material_is_needed_and_not_used_twice(
    stage: Callable[..., Stage], toy_images: npt.NDArray[np.float32]
) -> None:
    made = stage()
    with Client(made.client()) as client:
        client.setup()
        with pytest.raises(UsageError, match="no one-time material left"):
            client.online(toy_images[:1])
        client.offline(2)
        client.online(toy_images[:1])
        client.online(toy_images[1:2])
        with pytest.raises(UsageError, match="no one-time material left"):
            client.online(toy_images[:1])
        with pytest.raises(UsageError, match="the session takes"):
            client.online(toy_images)


def test_a_silent_peer_ends_the_session_in_time(
    stage: Callable[..., Stage], toy_images: npt.NDArray[np.float32]
) -> None:
    made = stage("SilentDealer", HASTY)
    started = time.monotonic()
    with pytest.raises(PeerError):
        classify(made.client(), toy_images)
    assert time.monotonic() - started < 5
    assert isinstance(made.dealer.exception(10), PeerError)


def test_a_bug_in_a_backend_closes_the_session_without_its_details(
    stage: Callable[..., Stage], toy_images: npt.NDArray[np.float32]
) -> None:
    made = stage("Buggy")
    with pytest.raises(PeerError, match="the server gave up: an internal error"):
        classify(made.client(), toy_images)
    assert isinstance(made.server.exception(5), ZeroDivisionError)


def test_raw_images_are_normalised_by_the_public_metadata(
    stage: Callable[..., Stage], toys: ModuleType
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    metadata = toys.toy_graph().metadata
    mean, std = (np.array(metadata[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    expected = toys.forward(toys.toy_graph(), (pixels / 255 - mean) / std)
    for images in (pixels, pixels.transpose(0, 2, 3, 1)):
        report = classify(stage().client(), images)
        logits = [inference.logits[0] for inference in report.inferences]
        assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_toy_model_is_what_the_file_says(toy_model: Path, toys: ModuleType) -> None:
    from pi_system.models import resolve

    assert resolve(str(toy_model)).sha256() == toys.toy_graph().sha256()
