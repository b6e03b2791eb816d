"""The public part of a model on the wire: architecture, mask positions, metadata and hash."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from ..errors import ProtocolError
from ..graph import serialize
from ..graph.ir import Graph
from ..net.channel import Channel

_SHA256: Final = re.compile(rb"[0-9a-f]{64}")


class PublicModel(NamedTuple):
    """What a client learns of a model: a graph without weights, and the hash of the whole."""

    graph: Graph
    sha256: str


def send_public(channel: Channel, graph: Graph, sha256: str) -> None:
    """Send what everyone may know of ``graph``: two frames, the hash and the public graph."""
    channel.send(sha256.encode())
    channel.send(serialize.to_bytes(graph.public()))


def receive_public(channel: Channel) -> PublicModel:
    """Receive and check a public model; nothing of it is trusted.

    Raises:
        ProtocolError: it is malformed.
    """
    sha256 = channel.recv(64)
    if not _SHA256.fullmatch(sha256):
        raise ProtocolError(f"the {channel.peer} sent a malformed hash")
    graph = serialize.from_bytes(channel.recv(serialize.MAX_WIRE_BYTES))
    return PublicModel(graph, sha256.decode())
