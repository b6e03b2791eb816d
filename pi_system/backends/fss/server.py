"""The server: holds W, and of every tensor x only Z = x - r'."""

from __future__ import annotations

import numpy as np

from ...errors import ProtocolError, RefusedError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from . import offline, packing, plan, prg, program, weights
from .linear import RingConv
from .masks import blinding
from .material import ServerMaterial
from .online import Run
from .packing import Reader
from .plan import Plan
from .program import Index
from .public import MAX_RETRIES, Public, agree, send_graph, send_plan
from .ring import Words
from .store import Store

PLAN_KEY = "fss_plan"


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
            self._convs[op.out] = RingConv(
                op, source, weight, planned.n, bits, batch=public.batch,
                threads=self._options.threads,
            )  # fmt: skip
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
            self._store.add(
                inference, offline.receive(public, self._bias, self._client, self._dealer)
            )

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
        run = Run(public, self._convs, self._positions, material, self._client)
        return run.run(image.reshape(public.batch, *public.lowered.input.shape))

    def _ready(self) -> Public:
        if self._public is None:
            raise RefusedError("the session is not set up")
        return self._public
