"""Every message of a session as its fields: who sends what to whom, how wide, under which mask.

What the parties read and write is written in ``offline.py``, ``online.py``, ``batch.py`` and
``relu.py``; this is the same once more as data, for audits and tests to cut recorded frames by. A
field with a cover must look uniform to its receiver whatever weights and image are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from . import batch, prg
from .packing import Reader
from .program import Conv, Relu, Step
from .public import Public
from .ring import Words

Role = Literal["server", "client", "dealer"]


@dataclass(frozen=True)
class Field:
    """``count`` values of ``width`` bits; ``cover`` names what hides them, "" if nothing has to."""

    name: str
    count: int
    width: int
    cover: str = ""


@dataclass(frozen=True)
class Message:
    """One frame. A document (JSON, the public graph) has no fields: it is public throughout."""

    kind: str
    sender: Role
    receiver: Role
    layer: str = ""
    fields: tuple[Field, ...] = ()

    def split(self, data: bytes) -> dict[str, Words]:
        """The values of every field; no field for a document.

        Raises:
            ProtocolError: the frame does not have exactly this form.
        """
        if not self.fields:
            return {}
        reader = Reader(data)
        values = {field.name: reader.take(field.count, field.width) for field in self.fields}
        reader.done()
        return values


def setup(public: Public) -> Iterator[Message]:
    """Once per session."""
    yield Message("plan", "server", "client")
    yield Message("seed of b", "server", "client", fields=(_seed("b's seed"),))
    yield Message("graph", "server", "dealer")
    yield Message("plan", "server", "dealer")
    for op in public.lowered.convs:
        field = Field("W'", int(np.prod(op.weight_shape)), public.plan.convs[op.out].n, "b")
        yield Message("blinded weights", "server", "dealer", op.out, (field,))
    yield Message("digest", "client", "server")
    yield Message("store", "server", "client")
    yield Message("store", "client", "server")
    yield Message("store", "server", "client")


def request() -> Iterator[Message]:
    """Before the material of one or more inferences."""
    yield Message("step", "client", "server")
    yield Message("step", "server", "client")
    yield Message("request", "client", "dealer")


def offline(public: Public) -> Iterator[Message]:
    """The material of one inference."""
    head = (Field("inference", 8, 8), _seed("seed"))
    yield Message("seed of masks", "client", "dealer", fields=head)
    for op in public.lowered.ops:
        if isinstance(op, Conv):
            count, n = public.batch * op.size, public.plan.convs[op.out].n
            yield Message("linear", "client", "server", op.out, (Field("e", count, n, "t"),))
            yield Message("linear", "dealer", "server", op.out, (Field("g", count, n, "t - u"),))
        elif isinstance(op, Relu):
            width, count = public.plan.gates[op.out], public.batch * len(op.kept)
            corrections = Field("corrections", 2 * width.blocks * count, 64, "the other's root")
            share = "the client's share"
            fields = (
                Field("delta", count, width.k, "r"),
                Field("sign", count, 1, share),
                *(Field(name, count, width.n, share) for name in ("[r]", "[rho]", "[rho r]")),
                *(Field(name, count, width.high, share) for name in ("[msb]", "[rho msb]")),
                Field("root", 2 * count, 64, "the key's delta"),
                corrections,
            )
            yield Message("gates", "dealer", "server", op.out, fields)
            yield Message("gates", "dealer", "client", op.out, (corrections,))


def online(public: Public) -> Iterator[Message]:
    """One inference."""
    lowered, plan = public.lowered, public.plan
    image = Field("Z", public.batch * lowered.input.size, plan.input_n, "r'")
    head = Field("inference", 8, 8)
    yield Message("image", "client", "server", lowered.input.out, (head, image))
    for step in lowered.steps:
        if not step.gates:
            continue
        yield from _gates(public, step)
    size = public.batch * int(np.prod(lowered.shapes[lowered.output]))
    logits = Field("logits", size, plan.output_k, "trunc(u)")
    fields = (Field("status", 1, 8), logits)
    yield Message("logits", "server", "client", lowered.output, fields)


def _gates(public: Public, step: Step) -> Iterator[Message]:
    """One batch of gates; all parts go down before any answer is waited for."""
    layer = step.gates[0].out
    openings, bits, closings = [], [], []
    for part in batch.parts(step.gates, public.batch):
        x, sign, up = [], [], []
        for piece in part:
            name, width, count = piece.op.out, public.plan.gates[piece.op.out], piece.length
            x.append(Field(f"X {name}", count, width.k, "r"))
            sign.append(Field(f"sign {name}", count, 1, "rho"))
            up += [sign[-1], Field(f"Z {name}", count, width.n, "r'")]
        openings.append(Message("opening", "server", "client", layer, tuple(x)))
        bits.append(Message("bits", "server", "client", layer, tuple(sign)))
        closings.append(Message("closing", "client", "server", layer, tuple(up)))
    yield openings[0]
    for following, sign_bits in zip([*openings[1:], None], bits, strict=True):
        if following is not None:
            yield following
        yield sign_bits
    yield from closings


def between(messages: Iterator[Message], sender: Role, receiver: Role) -> list[Message]:
    """Those on one link in one direction, in order."""
    return [m for m in messages if (m.sender, m.receiver) == (sender, receiver)]


def _seed(name: str) -> Field:
    return Field(name, prg.SEED_BYTES, 8, "itself: drawn by the operating system")


_PUBLIC: Final = {
    "architecture": "the architecture and the model's hash",
    "masks": "which ReLUs are kept",
    "plan": "widths and ranges of every layer, which depend on weights and calibration images",
    "metadata": "the model's name, classes, normalisation and what else its exporter noted",
}
LEARNS: Final[dict[Role, dict[str, str]]] = {
    "server": {
        "times": "when an inference happens, its id and its batch size; "
        "of images and answers nothing, also if it deviates",
    },
    "client": {
        **_PUBLIC,
        "answer": "the logits, to as many bits as the plan says, or that a retry is needed; "
        "of the weights nothing beyond what answers tell",
    },
    "dealer": {
        **_PUBLIC,
        "times": "when and for how many inferences material is made; of weights nothing while "
        "it has not the seed of b, of images and answers nothing",
    },
}
"""What each party learns if it follows the protocol and shares with nobody: docs/protocol.md,
section 7."""
