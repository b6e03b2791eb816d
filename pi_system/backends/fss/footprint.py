"""What an inference costs besides time, exactly and without running one: from plan and program."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from ...graph.ir import Graph
from ...net.framing import HEADER
from . import packing, plan, program, transcript
from .material import ClientCodec, ServerCodec
from .public import Public
from .store import Step
from .transcript import Message, Role

Link = tuple[Role, Role]
_LINK = "0" * 32


@dataclass(frozen=True)
class Footprint:
    """Of one inference without retries.

    Attributes:
        online, offline: bytes by sender and receiver, framing included, of the backend's own
            messages.
        round_trips: online.
        material: bytes of the item that each party keeps, on disk.
        answer_bits: of the logits, all images of the batch together.
    """

    online: dict[Link, int]
    offline: dict[Link, int]
    round_trips: int
    material: dict[Role, int]
    answer_bits: int


def public(graph: Graph, name: str, batch: int) -> Public:
    """What everyone knows of a session on a model, under its plan ``name``.

    Raises:
        UsageError: there is no such plan.
        IntegrityError: the model's is damaged.
        UnsupportedLayer: this backend does not run the model.
    """
    lowered = program.build(graph)
    chosen = plan.of_graph(graph, lowered, name)
    return Public(graph.public(), lowered, chosen, graph.sha256(), batch)


def footprint(public: Public, inference: int = 0) -> Footprint:
    """Args:
    inference: its id, which some messages carry in decimal.
    """
    offline = _bytes(transcript.offline(public))
    for link, document in _request(public, inference):
        offline[link] = offline.get(link, 0) + HEADER.size + len(document)
    (answer,) = (m for m in transcript.online(public) if m.kind == "logits")
    return Footprint(
        online=_bytes(transcript.online(public)),
        offline=offline,
        round_trips=1 + sum(bool(step.gates) for step in public.lowered.steps),
        material={
            "server": ServerCodec.size(public),
            "client": ClientCodec.size(public),
        },
        answer_bits=sum(f.count * f.width for f in answer.fields if f.cover),
    )


def _bytes(messages: Iterable[Message]) -> dict[Link, int]:
    found: dict[Link, int] = {}
    for message in messages:
        size = sum(packing.size(field.count, field.width) for field in message.fields)
        link = message.sender, message.receiver
        found[link] = found.get(link, 0) + HEADER.size + size
    return found


def _request(public: Public, inference: int) -> list[tuple[Link, bytes]]:
    """The documents of :func:`.transcript.request`."""
    step = Step((), range(inference, inference + 1), True, _LINK)
    request = {"count": 1, "first": inference, "digest": public.digest}
    return [
        (("client", "server"), _json(step.to_json())),
        (("server", "client"), _LINK.encode()),
        (("client", "dealer"), _json(request)),
    ]


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
