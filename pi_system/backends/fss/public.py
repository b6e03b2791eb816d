"""What everyone knows about a session, and its digest, which all three must agree on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ...errors import ProtocolError, RefusedError
from ...graph import serialize
from ...graph.ir import Graph
from ...net.channel import Channel
from . import program
from .plan import Plan
from .program import Program

VERSION = 1
OK, RETRY = 0, 1
"""First byte of the server's answer: logits follow, or the zone check asks for a retry."""
MAX_RETRIES = 2


@dataclass(frozen=True)
class Public:
    """The public graph as a program, its plan, the model's hash and the batch size."""

    graph: Graph
    lowered: Program
    plan: Plan
    model: str
    batch: int

    @property
    def digest(self) -> str:
        """Hash of all of it."""
        content = {
            "version": VERSION,
            "graph": self.graph.public().sha256(),
            "plan": self.plan.to_json(),
            "model": self.model,
            "batch": self.batch,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def send_plan(channel: Channel, public: Public) -> None:
    """Server to client, who has the public graph already."""
    channel.send_json({"plan": public.plan.to_json(), "model": public.model})


def receive_plan(channel: Channel, graph: Graph, batch: int) -> Public:
    """The other side of :func:`send_plan`.

    Raises:
        ProtocolError: what came is no plan for this graph.
    """
    message = channel.recv_json()
    if not isinstance(message, dict) or not isinstance(message.get("model"), str):
        raise ProtocolError("the server sent no plan")
    lowered = program.build(graph)
    plan = Plan.from_json(message.get("plan"), lowered)
    return Public(graph, lowered, plan, message["model"], batch)


def send_graph(channel: Channel, public: Public) -> None:
    """Server to dealer: architecture, masks and plan."""
    channel.send(serialize.to_bytes(public.graph))
    send_plan(channel, public)


def receive_graph(channel: Channel, batch: int) -> Public:
    """The other side of :func:`send_graph`.

    Raises:
        ProtocolError: what came is no valid graph with masks and plan.
    """
    graph = serialize.from_bytes(channel.recv(serialize.MAX_WIRE_BYTES))
    return receive_plan(channel, graph, batch)


def agree(theirs: Any, public: Public, who: str) -> None:
    """Refuse a peer whose view of the session is another.

    Raises:
        RefusedError: the digests differ.
    """
    if theirs != public.digest:
        raise RefusedError(
            f"the {who} is set up for another graph, plan or batch: "
            f"its digest is {str(theirs)[:16]}, here it is {public.digest[:16]}"
        )
