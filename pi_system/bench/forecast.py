"""What an inference sends and when: exact bytes of a model, and their time over a network.

Bytes and round trips follow from the public program and the plan (``transcript.py``); nothing of
them is fitted. Their time is simulated message by message with the schedule that the emulated
network itself goes by (:mod:`pi_system.net.link`); the parties' compute is spread over the
operations. For the ``fss`` backend.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ..backends.fss import packing, program, transcript
from ..backends.fss.plan import PLAN_KEY, PRECISIONS, Plan, calibrate, synthetic_images
from ..backends.fss.program import Conv
from ..backends.fss.public import Public
from ..backends.fss.transcript import Message
from ..errors import UsageError
from ..graph.ir import Graph
from ..net.framing import HEADER
from ..net.link import Link, Schedule

DIRECTIONS: Final = (
    "client_to_server", "server_to_client", "dealer_to_server", "dealer_to_client",
    "client_to_dealer",
)  # fmt: skip
_COMMAND: Final = 9 + HEADER.size
"""``online N`` or ``offline 1`` of the session, for N of two digits."""
_STEP: Final = {"client_to_server": 90, "server_to_client": 44, "client_to_dealer": 101}
"""Bytes of the offline phase that go before the material of one inference, and around it."""
_WARM: Final = 3
"""Inferences simulated before the one that counts: they open TCP's windows."""
_DRAWS: Final = 25
"""Simulations of a network with loss, of which the median counts."""


@dataclass(frozen=True)
class Size:
    """What a model's compute depends on, for one inference of the whole batch.

    Attributes:
        products: multiplications of all linear layers, each counted once per 16-bit digit of
            the layer's ring.
        weights: of all linear layers, which come from memory for each batch.
        outputs: values that linear layers put out.
        gates: kept ReLUs, and the comparisons of max pools.
        steps: batches of gates.
    """

    products: float
    weights: float
    outputs: float
    gates: float
    steps: float


@dataclass(frozen=True)
class Compute:
    """Milliseconds of one phase: fixed, and of each unit of :class:`Size`."""

    fixed: float
    products: float
    weights: float
    outputs: float
    gates: float
    steps: float

    def of(self, size: Size) -> float:
        """All of them together."""
        return (
            self.fixed
            + self.products * size.products
            + self.weights * size.weights
            + self.outputs * size.outputs
            + self.gates * size.gates
            + self.steps * size.steps
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes by direction, and round trips of the online phase."""

    online: dict[str, int]
    offline: dict[str, int]
    round_trips: int


def public(graph: Graph, batch: int = 1, plan: str = "default") -> Public:
    """A model as its parties know it, with the plan it was exported with or else the one that
    the server would choose.

    Raises:
        UsageError: no such plan.
    """
    lowered = program.build(graph)
    stored = graph.metadata.get(PLAN_KEY)
    if stored is None:
        chosen = calibrate(graph, synthetic_images(graph), PRECISIONS[plan])
    elif isinstance(stored, dict) and plan in stored:
        chosen = Plan.from_json(stored[plan], lowered)
    else:
        raise UsageError(f"the model was exported without a {plan} plan; export it again")
    return Public(graph, lowered, chosen, graph.sha256(), batch)


def size(known: Public) -> Size:
    """The size of a model, with its batch."""
    convs = [_conv(known, op) for op in known.lowered.convs]
    return Size(
        products=sum(conv.products for conv in convs),
        weights=sum(conv.weights for conv in convs),
        outputs=sum(conv.outputs for conv in convs),
        gates=known.batch * sum(len(op.kept) for op in known.lowered.relus),
        steps=known.lowered.round_trips - 1,
    )


def traffic(known: Public) -> Traffic:
    """Exact bytes of one inference, framing included, over links without TLS."""
    online = _sum(transcript.online(known)) + Counter({"client_to_server": _COMMAND})
    offline = _sum(transcript.offline(known)) + Counter(_STEP)
    offline["client_to_server"] += _COMMAND
    return Traffic(
        {direction: online[direction] for direction in DIRECTIONS[:2]},
        {direction: offline[direction] for direction in DIRECTIONS},
        known.lowered.round_trips,
    )


def _sum(messages: Iterable[Message]) -> Counter[str]:
    found: Counter[str] = Counter()
    for message in messages:
        found[f"{message.sender}_to_{message.receiver}"] += _size(message)
    return found


def _size(message: Message) -> int:
    return HEADER.size + sum(packing.size(one.count, one.width) for one in message.fields)


def _conv(known: Public, op: Conv) -> Size:
    """The size of one linear layer. The fast convolutions, which most are, need two more bits."""
    out, *kernel = op.weight_shape
    each = math.prod(kernel)
    digits = -(-(known.plan.convs[op.out].n + 2) // 16)
    outputs = known.batch * op.size
    return Size(outputs * each * digits, out * each, outputs, 0, 0)


@dataclass
class _Links:
    """One schedule for each direction of each connection."""

    link: Link | None
    chance: random.Random
    _found: dict[str, Schedule] = field(default_factory=dict)

    def send(self, direction: str, count: int, now: float) -> float:
        """When a message sent at ``now`` has arrived."""
        if self.link is None:
            return now
        if direction not in self._found:
            self._found[direction] = Schedule(self.link, self.chance)
        return self._found[direction].arrival(count, now)


def latency_ms(
    known: Public, online: Compute, offline: Compute, link: Link | None
) -> tuple[float, float]:
    """Latency of the online and of the offline phase over a network.

    Args:
        link: ``None`` for loopback, which is part of the compute.
    """
    draws = _DRAWS if link is not None and link.loss else 1
    found = [_simulate(known, online, offline, link, random.Random(i)) for i in range(draws)]
    return (
        1e3 * statistics.median(one[0] for one in found),
        1e3 * statistics.median(one[1] for one in found),
    )


def _simulate(
    known: Public, online: Compute, offline: Compute, link: Link | None, chance: random.Random
) -> tuple[float, float]:
    links, now = _Links(link, chance), 0.0
    times = 0.0, 0.0
    for _ in range(_WARM + 1):
        dealt = _offline(known, offline, links, now)
        done = _online(known, online, links, dealt)
        times = done - dealt, dealt - now
        now = done
    return times


def _online(known: Public, compute: Compute, links: _Links, now: float) -> float:
    """When the client has its logits; sizes of messages are those of :mod:`transcript`."""
    messages = list(transcript.online(known))
    image, logits = messages[0], messages[-1]
    now = links.send("client_to_server", _COMMAND + _size(image), now) + compute.fixed / 1e3
    for step in known.lowered.steps:
        now += sum(_linear(known, op, compute) for op in step.ops if isinstance(op, Conv))
        if not step.gates:
            continue
        layer = step.gates[0].out
        own = [one for one in messages if one.layer == layer and one.kind in _KINDS]
        opening, bits, closing = ([one for one in own if one.kind == kind] for kind in _KINDS)
        gates = known.batch * sum(len(op.kept) for op in step.gates)
        each = (compute.gates * gates + compute.steps) / 1e3 / max(len(bits), 1)
        results = []
        for part, message in enumerate(bits):
            ahead = opening[part : part + 2] if part == 0 else opening[part + 1 : part + 2]
            for one in ahead:
                links.send("server_to_client", _size(one), now)
            now += each
            at_client = links.send("server_to_client", _size(message), now)
            results.append((closing[part], at_client))
        for one, at_client in results:
            now = max(now, links.send("client_to_server", _size(one), at_client))
    return links.send("server_to_client", _size(logits), now)


_KINDS: Final = ("opening", "bits", "closing")


def _offline(known: Public, compute: Compute, links: _Links, now: float) -> float:
    """When client and server have the material of one inference."""
    head = _STEP["client_to_server"] + _COMMAND
    now = links.send("client_to_server", head, now) + compute.fixed / 1e3
    now = links.send("server_to_client", _STEP["server_to_client"] // 2, now)
    asked = list(transcript.offline(known))
    request = _STEP["client_to_dealer"] + _size(asked[0])
    client, dealer = now, links.send("client_to_dealer", request, now)
    server = now
    work = {op.out: _linear(known, op, compute) for op in known.lowered.convs}
    for op in known.lowered.relus:
        work[op.out] = compute.gates * known.batch * len(op.kept) / 1e3
    for step in known.lowered.steps:
        if step.gates:
            work[step.gates[0].out] += compute.steps / 1e3
    done: set[str] = set()
    for message in asked[1:]:
        if message.layer not in done:
            done.add(message.layer)
            dealer += work[message.layer]
            client += work[message.layer]
        sent = dealer if message.sender == "dealer" else client
        arrived = links.send(f"{message.sender}_to_{message.receiver}", _size(message), sent)
        if message.receiver == "server":
            server = max(server, arrived)
        else:
            client = max(client, arrived)
    # The client tells the server that it has its part, and is told the same.
    ended = max(server, client)
    return links.send("server_to_client", _STEP["server_to_client"] // 2, ended)


def _linear(known: Public, op: Conv, compute: Compute) -> float:
    """Seconds."""
    return (compute.of(_conv(known, op)) - compute.fixed) / 1e3
