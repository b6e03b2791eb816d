"""Who is there: the first message on every connection, and the refusal of every difference.

The party that connects speaks first. The client draws the session's name; the server takes it,
and the batch size, over into its own hello to the dealer, which pairs the two. Over TLS the role
must be the one in the certificate. Threads and devices are each party's own choice and are not
compared. The model's hash and the plan are the server's to say; the backend has all three compare
what they were told before anything depends on it.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ProtocolError, RefusedError
from ..net.channel import Channel

VERSION: Final = 4
MAX_BATCH: Final = 1024
_LIMIT: Final = 1 << 14
_SESSION: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Hello:
    """What a party says of itself and of the session.

    Attributes:
        role: "server", "client" or "dealer".
        session: 16 random bytes in hexadecimal, drawn by the client.
        backend: its name.
        batch: images per inference.
        dealers: where the client knows dealers, one of which takes part (see
            :func:`dealer_here`); without one, material from a store is used.
        version: of the messages between parties.
    """

    role: str
    session: str
    backend: str
    batch: int
    dealers: tuple[str, ...] = ()
    version: int = VERSION

    def answer(self, role: str, backend: str) -> Hello:
        """The answer of a party of ``role`` that takes over session and batch."""
        return dataclasses.replace(self, role=role, backend=backend, version=VERSION)


def new_session(dealer: int = 0, dealers: int = 1) -> str:
    """A fresh name for a session with one of ``dealers`` dealers, which :func:`dealer_of` tells."""
    return f"{secrets.randbelow((1 << 128) // dealers) * dealers + dealer:032x}"


def dealer_of(session: str, dealers: int) -> int:
    """Which dealer the client has chosen, by its place in the client's list."""
    return int(session, 16) % dealers


def dealer_here(hello: Hello, here: Sequence[str]) -> int:
    """Which of the dealers known ``here`` the client has chosen: by name, or else by place.

    Two networks may know a dealer by different names; then both sides list as many, in one order.

    Raises:
        RefusedError: there is no telling.
    """
    place = dealer_of(hello.session, len(hello.dealers))
    name = hello.dealers[place]
    if name in here:
        return here.index(name)
    if len(here) == len(hello.dealers) and here[place] not in hello.dealers:
        return place
    raise RefusedError(
        f"dealers {','.join(here)} here, {','.join(hello.dealers)} at the client: which of the "
        f"former is {name}? List the same names, or as many in the same order"
    )


def receive(channel: Channel, *, roles: tuple[str, ...], backend: str) -> Hello:
    """Receive the hello of a party that connected, and check what is known before the session.

    Raises:
        RefusedError: another version, role or backend than here.
        ProtocolError: not a hello.
    """
    hello = _parse(channel)
    _compare(channel, "version", VERSION, hello.version)
    if hello.role not in roles:
        raise RefusedError(f"a {' or '.join(roles)} may connect here, not a {hello.role}")
    _compare(channel, "backend", backend, hello.backend)
    return hello


def greet(channel: Channel, mine: Hello, *, role: str) -> None:
    """Say hello to the ``role`` just connected to and check its answer."""
    say(channel, mine)
    hear(channel, mine, role=role)


def say(channel: Channel, mine: Hello) -> None:
    """Send a hello, or the answer to one that was found acceptable."""
    channel.send_json(dataclasses.asdict(mine))


def hear(channel: Channel, mine: Hello, *, role: str) -> None:
    """Receive the answer to :func:`say` and compare it with ``mine``.

    Raises:
        RefusedError: the two disagree on anything.
        ProtocolError: the answer is not a hello.
    """
    theirs = _parse(channel)
    for name in ("version", "backend", "session", "batch", "dealers"):
        _compare(channel, name, getattr(mine, name), getattr(theirs, name))
    _compare(channel, "role", role, theirs.role)


def _compare(channel: Channel, name: str, here: object, there: object) -> None:
    if here != there:
        raise RefusedError(f"{name} {here!r} here, {there!r} at the {channel.peer}")


def _parse(channel: Channel) -> Hello:
    data: Any = channel.recv_json(_LIMIT)
    if not isinstance(data, dict):
        raise ProtocolError(f"the {channel.peer} did not say hello")
    if data.get("version") != VERSION:
        raise RefusedError(
            f"version {VERSION!r} here, {_brief(data.get('version'))} at the {channel.peer}"
        )
    dealers = data.get("dealers", [])
    if not isinstance(dealers, list) or not all(isinstance(name, str) for name in dealers):
        raise ProtocolError(f"the {channel.peer} sent a malformed hello")
    try:
        hello = Hello(**{**data, "dealers": tuple(dealers)})
    except TypeError as error:
        raise ProtocolError(f"the {channel.peer} did not say hello") from error
    texts = (hello.role, hello.session, hello.backend)
    if not all(isinstance(text, str) and len(text) <= 200 for text in texts):
        raise ProtocolError(f"the {channel.peer} sent a malformed hello")
    if not _SESSION.fullmatch(hello.session):
        raise ProtocolError(f"the {channel.peer} sent a malformed session name")
    if type(hello.batch) is not int or not 1 <= hello.batch <= MAX_BATCH:
        raise RefusedError(f"batch of 1 to {MAX_BATCH} here, {_brief(hello.batch)} asked for")
    if channel.role not in (None, hello.role):
        raise RefusedError(
            f"role {hello.role!r} in the hello, {channel.role!r} in the certificate of the "
            f"{channel.peer}"
        )
    return hello


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
