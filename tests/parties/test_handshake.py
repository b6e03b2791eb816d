"""Every difference between two parties is refused on both sides, with both values named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.errors import PeerError, ProtocolError, RefusedError
from pi_system.net.channel import Channel, channel_pair
from pi_system.parties import commands, handshake
from pi_system.parties.commands import Command
from pi_system.parties.handshake import Hello

SESSION = "0123456789abcdef" * 2
GOOD = {
    "version": handshake.VERSION,
    "role": "client",
    "session": SESSION,
    "backend": "fss",
    "batch": 1,
}


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    client, server = channel_pair(timeout=2, names=("client", "server"))
    with client, server:
        yield client, server


def receive(server: Channel) -> Hello:
    try:
        return handshake.receive(server, roles=("client",), backend="fss")
    except PeerError as error:
        server.abort(error)
        raise
    except RefusedError as error:
        server.abort(error)
        raise


def test_two_that_agree_shake_hands(pair: tuple[Channel, Channel]) -> None:
    client, server = pair
    mine = Hello("client", handshake.new_session(), "fss", 4)
    handshake.say(client, mine)
    hello = receive(server)
    assert hello == mine
    handshake.say(server, hello.answer("server", "fss"))
    handshake.hear(client, mine, role="server")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 3}, "version 4 here, 3 at the client"),
        ({"backend": "crypten"}, "backend 'fss' here, 'crypten' at the client"),
        ({"role": "dealer"}, "a client may connect here, not a dealer"),
        ({"batch": 5000}, "batch of 1 to 1024 here, 5000 asked for"),
    ],
)
def test_what_the_server_refuses_the_client_hears(
    pair: tuple[Channel, Channel], change: dict[str, Any], reason: str
) -> None:
    client, server = pair
    client.send_json({**GOOD, **change})
    with pytest.raises(RefusedError, match=reason):
        receive(server)
    with pytest.raises(RefusedError, match=f"the server refused: {reason}"):
        client.recv()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 5}, "version 4 here, 5 at the server"),
        ({"backend": "crypten"}, "backend 'fss' here, 'crypten' at the server"),
        ({"session": "f" * 32}, f"session '{SESSION}' here, '{'f' * 32}' at the server"),
        ({"batch": 2}, "batch 1 here, 2 at the server"),
        ({"role": "dealer"}, "role 'server' here, 'dealer' at the server"),
    ],
)
def test_what_the_client_refuses_in_an_answer(
    pair: tuple[Channel, Channel], change: dict[str, Any], reason: str
) -> None:
    client, server = pair
    server.send_json({**GOOD, "role": "server", **change})
    with pytest.raises(RefusedError, match=reason):
        handshake.hear(client, Hello("client", SESSION, "fss", 1), role="server")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("here", "there", "found"),
    [
        ("A:1,B:1", "A:1,B:1", (0, 1)),
        ("A:1,B:1", "B:1,A:1", (1, 0)),  # the order is of no account
        ("A:1,B:1,C:1", "C:1,B:1", (2, 1)),
        ("a:1,b:1", "A:1,B:1", (0, 1)),  # each side has names of its own
        ("A:1,b:1", "A:1,B:1", (0, 1)),
        ("b:1,A:1", "A:1,B:1", (1, None)),
        ("A:1,C:1", "B:1,A:1", (None, 0)),
        ("a:1", "A:1,B:1", (None, None)),
    ],
)
def test_the_server_finds_the_clients_dealer_or_says_both_lists(
    here: str, there: str, found: tuple[int | None, int | None], place: int
) -> None:
    names = tuple(there.split(","))
    hello = Hello("client", handshake.new_session(place, len(names)), "fss", 1, names)
    if (expected := found[place]) is not None:
        assert handshake.dealer_here(hello, here.split(",")) == expected
    else:
        with pytest.raises(RefusedError, match=f"dealers {here} here, {there} at the client"):
            handshake.dealer_here(hello, here.split(","))


@pytest.mark.parametrize(
    "message",
    [
        [],
        None,
        "hello",
        {"version": handshake.VERSION},
        {**GOOD, "extra": 1},
        {**GOOD, "session": "x"},
        {**GOOD, "session": SESSION + "\n"},
        {**GOOD, "role": 3},
        {**GOOD, "dealers": True},
        {**GOOD, "dealers": [1]},
        {**GOOD, "backend": "x" * 201},
    ],
)
def test_what_is_no_hello_is_a_protocol_error(pair: tuple[Channel, Channel], message: Any) -> None:
    pair[0].send_json(message)
    with pytest.raises(ProtocolError):
        receive(pair[1])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*GOOD, "more"]), json_values)
    | json_values
    | st.fixed_dictionaries({key: json_values | st.just(value) for key, value in GOOD.items()})
)
@settings(max_examples=100, deadline=None)
def test_any_json_is_a_hello_or_a_clear_error(message: Any) -> None:
    client, server = channel_pair(names=("client", "server"))
    with client, server:
        client.send_json(message)
        try:
            hello = handshake.receive(server, roles=("client",), backend="fss")
        except (ProtocolError, RefusedError):
            return
        assert hello.role == "client" and 1 <= hello.batch <= handshake.MAX_BATCH


def test_commands_pass_and_others_are_refused(pair: tuple[Channel, Channel]) -> None:
    client, server = pair
    for command in (
        Command("setup"),
        Command("offline", 12),
        Command("online", 0),
        Command("ping"),
    ):
        commands.send(client, command)
        assert commands.receive(server) == command
    for data in (b"", b"online", b"online -1", b"offline 9999999999", b"setup\n", b"\xff"):
        client.send(data)
        with pytest.raises(ProtocolError, match="unknown command"):
            commands.receive(server)
