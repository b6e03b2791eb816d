"""The server: holds W, and of every tensor x only Z = x - r'."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...errors import ProtocolError, RefusedError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from . import packing, plan, prg, program, relu, weights
from .linear import RingConv
from .masks import blinding
from .packing import Reader
from .plan import Plan
from .program import Conv, Index, Input, Op, Relu
from .public import MAX_RETRIES, OK, RETRY, Public, agree, send_graph, send_plan
from .ring import Words
from .store import Store

PLAN_KEY = "fss_plan"


@dataclass
class ServerMaterial:
    """Of one inference: h = W r' - u plus bias per linear operation, and the gates' shares."""

    h: dict[str, Words] = field(default_factory=dict)
    gates: dict[str, tuple[Words, relu.Share]] = field(default_factory=dict)


class Server:
    """A server's session; see :class:`pi_system.backends.base.ServerSession`.

    The plan is the one the model was exported with (``graph.metadata["fss_plan"]``) or, for a
    model without one, calibrated here on synthetic images.
    """

    def __init__(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> None:
        self._graph = graph
        self._client = client
        self._dealer = dealer
        self._options = options
        self._store: Store[ServerMaterial] = Store()
        self._convs: dict[str, RingConv] = {}
        self._bias: dict[str, Words] = {}
        self._positions: dict[str, Index | None] = {}
        self._public: Public | None = None

    def setup(self) -> None:
        graph = self._graph
        lowered = program.build(graph)
        chosen = self._plan()
        public = Public(graph.public(), lowered, chosen, graph.sha256(), self._options.batch)
        seed = prg.fresh_seed()
        send_plan(self._client, public)
        self._client.send(seed)
        send_graph(self._dealer, public)
        for op in lowered.convs:
            planned = chosen.convs[op.out]
            weight, bias = weights.fixed(graph, op, chosen.f_x, planned.f_w)
            bits = int(np.abs(weight.view(np.int64)).max(initial=0)).bit_length() + 1
            source = lowered.shapes[op.source]
            self._convs[op.out] = RingConv(op, source, weight, planned.n, bits)
            self._bias[op.out] = bias.reshape(-1, 1, 1)
            blinded = weight - blinding(seed, public.model, op)
            self._dealer.send(packing.pack(blinded, planned.n))
        self._positions = {op.out: program.positions(op, public.batch) for op in lowered.relus}
        agree(self._client.recv_json(), public, "client")
        self._public = public

    def _plan(self) -> Plan:
        stored = self._graph.metadata.get(PLAN_KEY)
        if stored is not None:
            return Plan.from_json(stored, program.build(self._graph))
        return plan.calibrate(self._graph, plan.synthetic_images(self._graph))

    def offline(self, count: int) -> None:
        public = self._ready()
        request = self._client.recv_json()
        if not isinstance(request, dict) or request.get("count") != count:
            raise ProtocolError("the client asks for another amount of material")
        first = request.get("first")
        if not isinstance(first, int):
            raise ProtocolError("the client names no first inference")
        for inference in self._store.reserve(first, count):
            self._store.add(inference, self._receive_material(public))

    def _receive_material(self, public: Public) -> ServerMaterial:
        material = ServerMaterial()
        for op in public.lowered.ops:
            if isinstance(op, Conv):
                n = public.plan.convs[op.out].n
                total = public.batch * op.size
                shape = (public.batch, *op.shape)
                limit = packing.size(total, n)
                e = packing.unpack(self._client.recv(limit), total, n).reshape(shape)
                g = packing.unpack(self._dealer.recv(limit), total, n).reshape(shape)
                material.h[op.out] = e + g + self._bias[op.out]
            elif isinstance(op, Relu):
                width = public.plan.gates[op.out]
                count = public.batch * len(op.kept)
                message = self._dealer.recv()
                material.gates[op.out] = relu.read_server_share(width, count, message)
        return material

    def online(self) -> None:
        public = self._ready()
        meter = self._client.meter
        for _ in range(MAX_RETRIES + 1):
            if self._infer(public):
                return
            with meter.in_phase("offline", meter.labels.inference):
                self.offline(1)
        raise RefusedError(f"the zone check failed {MAX_RETRIES + 1} times in a row")

    def _infer(self, public: Public) -> bool:
        """One run on one inference's material; whether its answer is good."""
        size = public.batch * public.lowered.input.size
        head = self._client.recv(8 + packing.size(size, public.plan.input_n))
        reader = Reader(head)
        inference = int.from_bytes(reader.raw(8), "little")
        material = self._store.claim(inference)
        image = reader.take(size, public.plan.input_n)
        reader.done()
        run = _Run(public, self._convs, self._positions, material, self._client)
        return run.run(image.reshape(public.batch, *public.lowered.input.shape))

    def _ready(self) -> Public:
        if self._public is None:
            raise RefusedError("the session is not set up")
        return self._public


class _Run:
    """One inference's shares on their way through the program."""

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

    def run(self, image: Words) -> bool:
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
        with self._client.meter.in_layer(lowered.output):
            self._client.send(bytes([status]) + logits)
        return not self._wrapped

    def _local(self, op: Op) -> None:
        inputs = [self._shares[name] for name in op.inputs]
        if isinstance(op, Conv):
            planned = self._public.plan.convs[op.out]
            h = self._material.h.pop(op.out)
            value, near = self._convs[op.out].truncated(inputs[0], h, planned.f_w, planned.bound)
            self._wrapped |= near
            self._write(op, value)
        else:
            self._write(op, program.apply_local(op, inputs))

    def _gates(self, gates: tuple[Relu, ...]) -> None:
        opened, messages = [], []
        for op in gates:
            delta, share = self._material.gates.pop(op.out)
            source = np.ascontiguousarray(self._shares[op.source])
            index = self._positions[op.out]
            x, signs, message = relu.opening(share, delta, source, index)
            opened.append((share, x, signs))
            messages.append(message)
        with self._client.meter.in_layer(gates[0].out):
            self._client.send(b"".join(messages))
            sizes = (share.width.closing_bytes(share.count) for share, _, _ in opened)
            reader = Reader(self._client.recv(sum(sizes)))
        for op, (share, x, signs) in zip(gates, opened, strict=True):
            source = self._shares[op.source]
            target = np.empty(source.shape, np.uint64) if op.full else source.copy()
            relu.closing(share, x, signs, reader, target, self._positions[op.out])
            self._write(op, target)
        reader.done()

    def _write(self, op: Op, value: Words) -> None:
        self._shares[op.out] = value
        for name in set(op.inputs):
            if self._last[name] == op.out:
                del self._shares[name]
