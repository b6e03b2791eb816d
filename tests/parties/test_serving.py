"""Server and dealer as processes with many clients: limits, queues, half-open peers, the end."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose

from pi_system.errors import BusyError, PeerError, RefusedError
from pi_system.net import certificates
from pi_system.net.listen import connect
from pi_system.net.tls import Identity
from pi_system.parties import commands, handshake
from pi_system.parties.admission import Admission, Limits
from pi_system.parties.classify import classify
from pi_system.parties.client import Client
from pi_system.parties.commands import Command
from pi_system.parties.journal import FIELDS, Journal

Images = npt.NDArray[np.float32]
Deploy = Callable[..., Any]
Connected = Callable[[Any], Client]


def ready(client: Client) -> Client:
    client.setup()
    client.offline(1)
    return client


@pytest.fixture
def connected(deploy: Deploy) -> Iterator[Connected]:
    """A client of a deployment, ready for an inference, that is closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect(made: Any) -> Client:
            client = Client(made.client())
            stack.callback(client.close)
            return ready(client)

        yield connect


def test_a_client_is_served_while_others_hold_sessions_and_half_open_connections(
    deploy: Deploy, toys: ModuleType, toy_images: Images
) -> None:
    made = deploy()
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            ready(stack.enter_context(Client(made.client())))
        for party in (made.server, made.dealer):
            for words in (b"", b"\x07", b"\xff\x00\x00\x00{"):  # who says nothing, and too little
                slow = stack.enter_context(socket.create_connection(party.at))
                slow.sendall(words)
        started = time.monotonic()
        report = classify(made.client(), toy_images)
        assert time.monotonic() - started < 1.5  # less than the hello is waited for
    expected = toys.forward(toys.toy_graph(), toy_images)
    for inference in report.inferences:
        assert_allclose(inference.logits, expected[list(inference.images)], rtol=1e-4)


def test_clients_at_once_get_their_own_answers(
    deploy: Deploy, toys: ModuleType, toy_images: Images
) -> None:
    made = deploy("--per-client", "8", dealer=("--per-client", "8"))
    expected = toys.forward(toys.toy_graph(), toy_images)

    def one(number: int) -> None:
        with Client(made.client()) as client:
            client.setup()
            for turn in range(10):
                client.offline(1)
                row = (number + turn) % 3
                logits = client.online(toy_images[row : row + 1])
                assert_allclose(logits[0], expected[row], rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    code, events = made.server.stop()
    assert code == 0
    ended = [event for event in events if event["event"] == "ended"]
    assert len(ended) == 8 and all(event["inferences"] == 10 for event in ended)


def test_beyond_the_limit_a_client_waits_and_beyond_the_queue_it_is_told(
    deploy: Deploy, toy_images: Images
) -> None:
    made = deploy("--sessions", "1", "--queue", "1")
    first = Client(made.client())
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(Client, made.client())
        time.sleep(0.5)  # it waits in the queue now
        with pytest.raises(BusyError, match="the server is busy: 1 sessions run and 1 wait"):
            Client(made.client())
        assert not second.done()
        first.close()
        with second.result(5) as client:  # its turn has come
            ready(client).online(toy_images[:1])
            # Nobody's turn comes while this session lasts.
            with pytest.raises(BusyError, match=r"1 sessions run, and none ended within 2\.4 s"):
                Client(made.client())
    assert BusyError.exit_code == 5


def test_one_client_cannot_take_all_places(deploy: Deploy) -> None:
    made = deploy("--per-client", "1")
    with Client(made.client()), pytest.raises(BusyError, match="1 sessions of this client"):
        Client(made.client())
    for _ in range(5):  # at once, before the server knows that the last one has left
        ready(Client(made.client())).close()


def test_a_busy_dealer_is_named_to_the_client(deploy: Deploy) -> None:
    made = deploy(dealer=("--per-client", "1"))
    with Client(made.client()), pytest.raises(BusyError, match="the dealer is busy: 1 sessions"):
        Client(made.client())


def test_sigterm_lets_a_running_inference_end_and_an_idle_session_not(
    deploy: Deploy, connected: Connected, toys: ModuleType, toy_images: Images
) -> None:
    made = deploy()
    idle, busy = connected(made), connected(made)
    commands.send(busy._server, Command("online", 0))
    time.sleep(0.3)  # the server waits for the image now
    made.server.process.terminate()
    time.sleep(0.5)
    with pytest.raises(BusyError, match="the server is busy: it is shutting down"):
        idle.ping()
    with pytest.raises(PeerError):
        Client(made.client(timeouts=made.client().timeouts.__class__(step=0.3)))
    logits = busy._session.online(toy_images[:1])
    assert_allclose(logits, toys.forward(toys.toy_graph(), toy_images[:1]), rtol=1e-4)
    code, events = made.server.end()
    assert code == 0
    names = [event["event"] for event in events]
    assert names.index("stopping") < names.index("stopped") == len(names) - 1
    code, _ = made.dealer.stop()
    assert code == 0


def test_what_does_not_end_in_time_is_cut_off_and_a_second_signal_ends_at_once(
    deploy: Deploy, connected: Connected
) -> None:
    made = deploy("--drain", "0.3")
    stuck = connected(made)
    commands.send(stuck._server, Command("online", 0))
    time.sleep(0.2)
    started = time.monotonic()
    code, events = made.server.stop()
    assert code == 0 and time.monotonic() - started < 3
    assert [event["event"] for event in events][-3:] == ["stopping", "failed", "stopped"]

    made = deploy()
    stuck = connected(made)
    commands.send(stuck._server, Command("online", 0))
    time.sleep(0.2)
    made.server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert made.server.process.poll() is None
    made.server.process.send_signal(signal.SIGTERM)
    assert made.server.end(2)[0] == 143


def test_many_that_say_nothing_do_not_keep_others_out(deploy: Deploy) -> None:
    made = deploy()
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(made.server.at))
        started = time.monotonic()
        ready(Client(made.client())).close()
        assert time.monotonic() - started < 6


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment's certificates, and in ``other/`` a second client's."""
    directory = tmp_path_factory.mktemp("certs")
    certificates.make(directory)
    (directory / "other").mkdir()
    for name in ("authority.pem", "authority.key"):
        shutil.copy(directory / name, directory / "other")
    certificates.make(directory / "other", roles=["client"])
    return directory


def test_over_tls_silent_connections_hold_nobody_and_clients_are_told_apart(
    deploy: Deploy, certs: Path
) -> None:
    made = deploy("--per-client", "1", certs=certs)
    one, other = (
        made.client(identity=Identity.of(folder, "client")) for folder in (certs, certs / "other")
    )
    with contextlib.ExitStack() as stack:
        for party in (made.server, made.dealer):
            for _ in range(100):  # more than may be about to say hello
                stack.enter_context(socket.create_connection(party.at))
        ready(stack.enter_context(Client(one)))
        with pytest.raises(BusyError, match="1 sessions of this client"):
            Client(one)
        ready(stack.enter_context(Client(other)))
    code, events = made.server.stop()
    assert code == 0
    names = [e["who"] for e in events if e["event"] == "session"]
    assert len(set(names)) == 2 and all(re.fullmatch("cert:[0-9a-f]{16}", n) for n in names)


def test_a_dealer_bounds_those_who_wait_for_their_peer(deploy: Deploy) -> None:
    made = deploy(dealer=("--sessions", "1", "--queue", "0"))
    with contextlib.ExitStack() as stack:
        lonely = []
        for number in range(3):
            channel = stack.enter_context(connect(*made.dealer.at, peer="dealer"))
            hello = handshake.Hello("client", f"{number:032x}", "toy_backends:Plain", 1)
            handshake.say(channel, hello)
            lonely.append(channel)
            time.sleep(0.2)
        with pytest.raises(BusyError, match="2 parties wait for their peers already"):
            lonely[2].recv()


def test_places_are_given_in_the_order_of_coming_and_all_come_back() -> None:
    admission = Admission(Limits(sessions=2, queue=100, per_client=100, patience=20))
    order: list[int] = []
    most = 0

    def one(number: int) -> None:
        nonlocal most
        with admission.place("x"):
            most = max(most, admission.running)
            order.append(number)
            time.sleep(0.002)

    with admission.place("y"), admission.place("y"):
        threads = []
        for number in range(20):
            threads.append(threading.Thread(target=one, args=(number,)))
            threads[-1].start()
            while admission.waiting <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert most == 2 and admission.running == admission.waiting == 0
    assert sorted(order) == list(range(20))
    assert all(abs(place - number) <= 1 for place, number in enumerate(order))


def test_a_log_holds_no_share_key_pixel_or_logit(
    deploy: Deploy, toy_images: Images, toys: ModuleType
) -> None:
    made = deploy(backend="fss")
    report = classify(made.client(), toy_images)
    with pytest.raises(RefusedError), Client(made.client(backend_name="other")):
        pass
    for party in (made.server, made.dealer):
        code, events = party.stop()
        assert code == 0 and len(events) > 4
        allowed = {name for name in FIELDS}
        for event in events:
            assert set(event) <= allowed and event["role"] in ("server", "dealer")
        text = " ".join(str(value) for event in events for value in event.values())
        assert not re.search("[0-9a-f]{17}", text)  # no seed, key or whole name of a session
        secret = [*toy_images.ravel()[:200], *np.ravel([i.logits for i in report.inferences])]
        for value in secret:  # times have three decimals
            assert f"{abs(value):.5f}"[:-1] not in text


@pytest.mark.parametrize("value", [np.zeros(3), b"key", [1], np.float32(1)])
def test_a_journal_takes_no_arrays_and_no_unknown_fields(value: Any) -> None:
    journal = Journal("server")
    with pytest.raises(TypeError, match="no field error"):
        journal.write("x", error=value)
    with pytest.raises(TypeError, match="no field pixels"):
        journal.write("x", pixels="1")
