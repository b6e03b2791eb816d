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
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ProtocolError, RefusedError
from ..net.channel import Channel

VERSION: Final = 4
MAX_BATCH: Final = 1024
_LIMIT: Final = 4096
_SESSION: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Hello:
    """What a party says of itself and of the session.

    Attributes:
        role: "server", "client" or "dealer".
        session: 16 random bytes in hexadecimal, drawn by the client.
        backend: its name.
        batch: images per inference.
        dealer: whether a dealer takes part; without one, material from a store is used.
        version: of the messages between parties.
    """

    role: str
    session: str
    backend: str
    batch: int
    dealer: bool = True
    version: int = VERSION

    def answer(self, role: str, backend: str) -> Hello:
        """The answer of a party of ``role`` that takes over session and batch."""
        return dataclasses.replace(self, role=role, backend=backend, version=VERSION)


def new_session(dealer: int = 0, dealers: int = 1) -> str:
    """A fresh name for a session with one of ``dealers`` dealers, which :func:`dealer_of` tells."""
    return f"{secrets.randbelow((1 << 128) // dealers) * dealers + dealer:032x}"


def dealer_of(session: str, dealers: int) -> int:
    """Which dealer the client has chosen, by its place in the list that client and server have."""
    return int(session, 16) % dealers


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
    for name in ("version", "backend", "session", "batch", "dealer"):
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
    try:
        hello = Hello(**data)
    except TypeError as error:
        raise ProtocolError(f"the {channel.peer} did not say hello") from error
    texts = (hello.role, hello.session, hello.backend)
    if not all(isinstance(text, str) and len(text) <= 200 for text in texts):
        raise ProtocolError(f"the {channel.peer} sent a malformed hello")
    if not _SESSION.fullmatch(hello.session):
        raise ProtocolError(f"the {channel.peer} sent a malformed session name")
    if type(hello.batch) is not int or not 1 <= hello.batch <= MAX_BATCH:
        raise RefusedError(f"batch of 1 to {MAX_BATCH} here, {_brief(hello.batch)} asked for")
    if type(hello.dealer) is not bool:
        raise ProtocolError(f"the {channel.peer} sent a malformed hello")
    if channel.role not in (None, hello.role):
        raise RefusedError(
            f"role {hello.role!r} in the hello, {channel.role!r} in the certificate of the "
            f"{channel.peer}"
        )
    return hello


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
