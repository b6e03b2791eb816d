"""What a dealer gives one client within an hour."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi_system.errors import BusyError
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
