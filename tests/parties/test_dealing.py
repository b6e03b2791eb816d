"""What a dealer gives one client within an hour, and what it makes ahead."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose

from pi_system.errors import BusyError, PiError
from pi_system.net.tap import Tape
from pi_system.parties.client import Client
from pi_system.parties.quota import HOUR, Quota


def test_an_hour_after_it_was_taken_material_can_be_had_again() -> None:
    now = 0.0
    quota = Quota(5, lambda: now)
    quota.take("a", 3)
    now = 10.0
    with pytest.raises(BusyError, match="3 inferences is over the quota: 2 of 5 an hour are left"):
        quota.take("a", 3)
    quota.take("a", 2)
    quota.take("b", 5)
    now = HOUR + 1  # the three are an hour old, the two are not
    quota.take("a", 3)
    with pytest.raises(BusyError):
        quota.take("a", 1)
    now = 3 * HOUR
    quota.take("a", 5)


def test_no_race_gives_more() -> None:
    quota, given = Quota(100), []

    def ask() -> None:
        for _ in range(50):
            try:
                quota.take("a", 1)
            except BusyError:
                return
            given.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == 100


def test_a_dealer_refuses_what_is_over_the_quota_in_a_later_session_too(
    deploy: Callable[..., Any], toy_images: npt.NDArray[np.float32]
) -> None:
    made = deploy(backend="fss", dealer=("--quota", "3"))
    with Client(made.client()) as client:
        client.setup()
        client.offline(2)
        client.online(toy_images[:1])
    refused = pytest.raises(BusyError, match="2 inferences is over the quota: 1 of 3 an hour are")
    with refused, Client(made.client()) as client:
        client.setup()
        client.offline(2)
    with Client(made.client()) as client:
        client.setup()
        client.offline(1)
        client.online(toy_images[:1])
    code, events = made.dealer.stop()
    assert code == 0
    assert sum(event["count"] for event in events if event["event"] == "request") == 3


@pytest.mark.parametrize(
    ("count", "why"),
    [(-9, "material of -9 inferences"), (0, "material of 0"), (True, "no request for material")],
)
def test_a_request_for_no_number_of_inferences_is_refused_and_earns_nothing(
    deploy: Callable[..., Any], count: int, why: str
) -> None:
    made = deploy(backend="fss", dealer=("--quota", "3"))
    refused = pytest.raises(PiError, match=why)
    with refused, Client(made.client()) as client:
        client.setup()
        session: Any = client._session
        dealer = client._channels["dealer"]
        dealer.send_json({"count": count, "first": 0, "digest": session._ready().digest})
        dealer.recv()
    busy = pytest.raises(BusyError, match="4 inferences is over the quota: 3 of 3 an hour are")
    with busy, Client(made.client()) as client:
        client.setup()
        client.offline(4)
    assert made.dealer.stop()[0] == 0


def test_material_made_ahead_gives_the_same_answers_and_no_seed_twice(
    deploy: Callable[..., Any], toys: ModuleType, toy_images: npt.NDArray[np.float32]
) -> None:
    made = deploy(backend="fss")
    expected = toys.forward(toys.toy_graph(), toy_images)
    tape = Tape()
    with Client(made.client(ahead=2)) as client:
        tape.attach(client._channels["dealer"])
        client.setup()
        for turn in range(6):
            client.offline(1 + turn % 2)
            for row in range(1 + turn % 2):
                logits = client.online(toy_images[row : row + 1])
                assert_allclose(logits[0], expected[row], atol=0.05)
            time.sleep(0.05)  # the dealer is idle, and makes the next
    sent = [frame.data for frame in tape.frames if frame.direction == "sent"]
    requests = [json.loads(data) for data in sent if data.startswith(b"{")]
    announced = {i: seed for request in requests for i, seed in request["ahead"]}
    used = {int.from_bytes(data[:8], "little"): data[8:].hex() for data in sent if len(data) == 24}
    assert len(used) == len(set(used.values())) == 9
    assert all(announced[i] == seed for i, seed in used.items() if i)  # all but the first
    assert len(announced) == len(set(announced.values()))
    assert made.dealer.stop()[0] == 0


def test_a_dealer_tells_a_session_that_ended_from_one_whose_peer_vanished(
    deploy: Callable[..., Any],
) -> None:
    """Between two items, where neither side owes the other a message."""
    made = deploy(backend="fss", dealer=("--metrics", "0"))

    def begun() -> Client:
        client = Client(made.client())
        client.setup()
        client.offline(1)
        return client

    def last(number: int) -> dict[str, Any]:
        """The dealer's status once so many sessions are over."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with urlopen(f"http://{made.dealer.metrics}/status", timeout=5) as answer:
                status: dict[str, Any] = json.load(answer)
            if status["totals"]["ended"] + status["totals"]["failed"] == number:
                return status
            time.sleep(0.02)
        raise AssertionError(status)

    begun().close()
    status = last(1)
    assert status["totals"]["ended"] == 1 and not status["errors"]

    client = begun()
    for channel in client._channels.values():
        channel.cut()  # what the system does for a process that was killed
    error = last(2)["errors"][-1]
    assert (error["event"], error["kind"]) == ("failed", "PeerLost")
    assert error["error"].startswith("lost the client: ")
    client.close()

    client = begun()
    made.server.process.kill()
    made.server.process.wait()
    client.close()
    status = last(3)
    assert status["errors"][-1]["error"].startswith("lost the server: ")
    assert status["totals"]["ended"] == 1 and status["totals"]["failed"] == 2
    with urlopen(f"http://{made.dealer.metrics}/metrics", timeout=5) as answer:
        assert 'pi_sessions_total{outcome="failed"} 2.0' in answer.read().decode()
    code, events = made.dealer.stop()
    assert code == 0 and [e["event"] for e in events if e["event"] == "ended"] == ["ended"]
