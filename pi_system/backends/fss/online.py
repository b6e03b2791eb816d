"""One inference on one item of material: the server's and the client's side of the online phase."""

from __future__ import annotations

from typing import Final

import numpy as np

from ...errors import ProtocolError
from ...net.channel import Channel
from ...net.meter import Clock
from . import batch, packing, program
from .linear import RingConv
from .material import ClientMaterial, ServerMaterial
from .program import Conv, Index, Input, Op, Relu
from .public import OK, RETRY, Public
from .ring import Words

SPIN: Final = 3e-3
"""Seconds a party asks for its peer's message before it sleeps; longer than most layers take."""


def ask(
    public: Public, material: ClientMaterial, inference: int, image: Words, server: Channel
) -> Words | None:
    """The client's side.

    Args:
        image: (N, C, H, W), fixed-point.

    Returns:
        the logits modulo 2^output_k, or ``None`` where the server asks for a retry.

    Raises:
        ProtocolError: a message does not have exactly its form.
    """
    with server.spinning(SPIN):
        return _ask(public, material, inference, image, server)


def _ask(
    public: Public, material: ClientMaterial, inference: int, image: Words, server: Channel
) -> Words | None:
    lowered, plan = public.lowered, public.plan
    clock = Clock(server.meter)
    head = inference.to_bytes(8, "little")
    masked = packing.pack(image - material.ends.image, plan.input_n)
    clock.lap("local")
    with server.meter.in_layer(lowered.input.out):
        server.send(head + masked)
    for step in lowered.steps:
        if not step.gates:
            continue
        with server.meter.in_layer(step.gates[0].out):
            held = {op.out: material.gates.pop(op.out) for op in step.gates}
            batch.answer(batch.parts(step.gates, public.batch), held, server, clock)
    with server.meter.in_layer(lowered.output):
        count = material.ends.logits.size
        message = server.recv(1 + packing.size(count, plan.output_k))
    clock.lap("wait")
    if not message or message[0] not in (OK, RETRY):
        raise ProtocolError("the server's answer has no valid status")
    logits = packing.unpack(message[1:], count, plan.output_k)
    logits = logits.reshape(material.ends.logits.shape) + material.ends.logits
    clock.lap("local")
    return None if message[0] == RETRY else logits


class Run:
    """The server's side: its shares on their way through the program."""

    def __init__(
        self,
        public: Public,
        convs: dict[str, RingConv],
        positions: dict[str, Index | None],
        material: ServerMaterial,
        client: Channel,
    ) -> None:
        self._public = public
        self._convs = convs
        self._positions = positions
        self._material = material
        self._client = client
        self._shares: dict[str, Words] = {}
        self._wrapped = False
        self._last = public.lowered.last_reader()
        self._overwriting = public.lowered.overwriting()
        self._clock = Clock(client.meter)

    def run(self, image: Words) -> bool:
        """From Z of the image to the answer; whether it is good."""
        with self._client.spinning(SPIN):
            return self._run(image)

    def _run(self, image: Words) -> bool:
        lowered, plan = self._public.lowered, self._public.plan
        self._shares[lowered.input.out] = image
        for step in lowered.steps:
            for op in step.ops:
                if not isinstance(op, Input):
                    self._local(op)
            if step.gates:
                self._gates(step.gates)
        logits = packing.pack(self._shares[lowered.output], plan.output_k)
        status = RETRY if self._wrapped else OK
        if self._wrapped:
            logits = bytes(len(logits))
        self._clock.lap("local")
        with self._client.meter.in_layer(lowered.output):
            self._client.send(bytes([status]) + logits)
        self._clock.lap("wait")
        return not self._wrapped

    def _local(self, op: Op) -> None:
        inputs = [self._shares[name] for name in op.inputs]
        if isinstance(op, Conv):
            planned = self._public.plan.convs[op.out]
            h = self._material.h.pop(op.out)
            value, near = self._convs[op.out].truncated(inputs[0], h, planned.f_w, planned.bound)
            self._wrapped |= near
            self._write(op, value)
            self._clock.lap("linear")
        else:
            self._write(op, program.apply_local(op, inputs))
            self._clock.lap("local")

    def _gates(self, gates: tuple[Relu, ...]) -> None:
        material = {op.out: self._material.gates.pop(op.out) for op in gates}
        sources, targets = {}, {}
        for op in gates:
            source = np.ascontiguousarray(self._shares[op.source])
            sources[op.out] = source
            if op.out in self._overwriting:
                targets[op.out] = source
            else:
                targets[op.out] = np.empty_like(source) if op.full else source.copy()
        parts = batch.parts(gates, self._public.batch)
        client = self._client
        with client.meter.in_layer(gates[0].out):
            batch.ServerBatch(
                parts, material, sources, self._positions, targets, client, self._clock
            ).run()
        for op in gates:
            self._write(op, targets[op.out])
        self._clock.lap("gates")

    def _write(self, op: Op, value: Words) -> None:
        self._shares[op.out] = value
        for name in set(op.inputs):
            if self._last[name] == op.out:
                del self._shares[name]
