"""Round trips from logs, against chains counted by hand."""

from __future__ import annotations

from typing import Literal

import pytest

from pi_system.bench.rounds import longest_chain, round_trips
from pi_system.net.meter import Event

Direction = Literal["sent", "received"]


def log(peer: str, text: str) -> list[Event]:
    """ "s r" as the log of a party that sent to, then received from, ``peer``."""
    names: dict[str, Direction] = {"s": "sent", "r": "received"}
    return [Event("online", 0, "", peer, names[word], 1) for word in text.split()]


def chain(server: str, client: str) -> int:
    return longest_chain({"server": log("client", server), "client": log("server", client)})


@pytest.mark.parametrize(
    ("server", "client", "messages"),
    [
        ("", "", 0),
        ("r", "s", 1),
        ("r r r", "s s s", 1),  # one after another, none needs an answer
        ("r s", "s r", 2),  # question and answer: one round trip
        ("s r", "s r", 1),  # an exchange
        ("s r s r", "s r s r", 2),  # two exchanges: the second needs the first
        ("r s r s r s", "s r s r s r", 6),
        ("r s s s r", "s r r r s", 3),
        ("s s r r", "r s r s", 2),  # the second question did not need the first answer
        ("r s r s", "s s r r", 2),  # both questions went out before any answer
    ],
)
def test_the_longest_chain_is_what_one_counts_by_hand(
    server: str, client: str, messages: int
) -> None:
    assert chain(server, client) == messages
    assert chain(client, server) == messages  # the roles do not matter


def test_174_exchanges_are_87_round_trips() -> None:
    both = "s r " * 174
    logs = {"server": log("client", both), "client": log("server", both)}
    assert round_trips(logs) == 87


def test_a_third_party_lengthens_the_chain() -> None:
    logs = {
        "client": log("server", "s") + log("dealer", "r"),
        "server": log("client", "r") + log("dealer", "s"),
        "dealer": log("server", "r") + log("client", "s"),
    }
    assert longest_chain(logs) == 3
    del logs["dealer"]
    assert longest_chain(logs) == 1


def test_logs_of_different_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="nobody sent"):
        chain("r r", "s")
    with pytest.raises(ValueError, match="nobody sent"):
        chain("r s", "r s")
