"""What the client tells the server to do next, one short frame each.

``setup``, ``prepare N`` (lay in material of N inferences for later), ``offline N`` (have that of
N inferences at hand), ``online I`` (the I-th inference), ``ping``, ``load N`` (a frame of N
meaningless bytes follows). The server answers ``done`` to all but online, whose answer is the
backend's. The session ends with :meth:`.net.channel.Channel.end` on every connection.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple, cast

from ..errors import ProtocolError
from ..net.channel import Channel

Verb = Literal["setup", "prepare", "offline", "online", "ping", "load"]

DONE: Final = b"done"
MAX_OFFLINE: Final = 1_000_000
MAX_LOAD: Final = 1 << 26
_LIMIT: Final = 64
_NUMBERED: Final = ("prepare", "offline", "online", "load")
_COMMAND: Final = re.compile(rb"(setup|ping)|(prepare|offline|online|load) ([0-9]{1,9})")


class Command(NamedTuple):
    """A command and its number: of inferences, of the inference (online), of bytes (load)."""

    verb: Verb
    number: int = 0


def send(channel: Channel, command: Command) -> None:
    """Send a command."""
    verb, number = command
    channel.send(f"{verb} {number}".encode() if verb in _NUMBERED else verb.encode())


def receive(channel: Channel) -> Command:
    """Receive a command.

    Raises:
        ProtocolError: it is none.
    """
    match = _COMMAND.fullmatch(channel.recv(_LIMIT))
    if match is None:
        raise ProtocolError(f"the {channel.peer} sent an unknown command")
    verb = (match[1] or match[2]).decode()
    return Command(cast(Verb, verb), int(match[3] or 0))


def acknowledge(channel: Channel) -> None:
    """Tell the client that a command is carried out."""
    channel.send(DONE)


def await_done(channel: Channel) -> None:
    """Wait until the server has carried out a command."""
    if channel.recv(_LIMIT) != DONE:
        raise ProtocolError(f"the {channel.peer} answered a command with something else")
