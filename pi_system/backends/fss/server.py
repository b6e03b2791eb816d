"""The server: holds W, and of every tensor x only Z = x - r'."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...errors import RefusedError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from . import offline, packing, pairing, plan, program, weights
from .linear import RingConv
from .masks import blinding
from .material import ServerMaterial
from .online import Run
from .packing import Reader
from .plan import PLAN_KEY as PLAN_KEY
from .plan import Plan
from .prepared import Workshop
from .program import Index
from .public import MAX_RETRIES, Public, agree, send_graph, send_plan
from .ring import Words
from .source import SYSTEM, Source
from .store import Claimed, Step, Stock, Store
from .wide import from_panels, panel_shape


class Server:
    """A server's session; see :class:`pi_system.backends.base.ServerSession`.

    The plan is the one the options name of those the model was exported with
    (``graph.metadata["fss_plan"]``) or, for a model without any, calibrated here on synthetic
    images.
    """

    def __init__(
        self,
        graph: Graph,
        client: Channel,
        dealer: Channel | None,
        options: Options,
        store: Store | None = None,
        source: Source = SYSTEM,
        workshop: Workshop | None = None,
    ) -> None:
        self._graph = graph
        self._client = client
        self._dealer = dealer
        self._options = options
        self._store = store
        self._workshop = workshop or Workshop()
        self._source = source
        self._claimed: Claimed[ServerMaterial] = Claimed()
        self._paired: Stock[ServerMaterial] | None = None
        self._convs: dict[str, RingConv] = {}
        self._bias: dict[str, Words] = {}
        self._positions: dict[str, Index | None] = {}
        self._public: Public | None = None

    def setup(self) -> None:
        graph = self._graph
        prepared = self._workshop.get(graph, self._options, self._plan)
        public = prepared.public
        lowered, chosen = public.lowered, public.plan
        seed = self._source.seed()
        send_plan(self._client, public)
        self._client.send(seed)
        if self._dealer is not None:
            send_graph(self._dealer, public)
        for op in lowered.convs:
            planned = chosen.convs[op.out]
            weight, bias = weights.fixed(graph, op, chosen.f_x, planned.f_w)
            if self._dealer is not None:
                b = blinding(seed, public.model, op).open().words(math.prod(panel_shape(op)))
                blinded = weight - from_panels(op, b)
                # First, so that the dealer works while this side prepares its own kernel.
                self._dealer.send(packing.pack(blinded, planned.n))
            self._convs[op.out] = prepared.conv(op, weight)
            self._bias[op.out] = bias.reshape(-1, 1, 1)
        self._positions = prepared.positions
        agree(self._client.recv_json(), public, "client")
        self._paired = pairing.meet_client(self._store, public, self._client)
        self._public = public

    def _plan(self) -> Plan:
        return plan.of_graph(self._graph, program.build(self._graph), self._options.plan)

    def offline(self, count: int) -> None:
        step = self._follow(count, claim=True)
        for inference in step.kept:
            self._claimed.add(inference, self._stock().load(inference))
        self._receive(step, self._claimed.add)

    @property
    def stock(self) -> int:
        return len(self._stock())

    def prepare(self, count: int) -> int:
        stock = self._stock()
        if len(stock) + count > stock.limit:
            raise RefusedError(
                f"{count} more items of one-time material than the {len(stock)} in stock are over "
                f"the server's limit of {stock.limit}"
            )
        self._receive(self._follow(count, claim=False), stock.add)
        return len(stock)

    def _follow(self, count: int, *, claim: bool) -> Step:
        """The client's step, durable here too before it is confirmed."""
        step = Step.from_json(self._client.recv_json())
        if step.made and self._dealer is None:
            raise RefusedError("no one-time material is left, and the session has no dealer")
        self._stock().follow(step, count, claim=claim)
        self._client.send(step.link.encode())
        return step

    def _receive(self, step: Step, add: Callable[[int, ServerMaterial], None]) -> None:
        public = self._ready()
        for inference in step.made:
            assert self._dealer is not None
            add(inference, offline.receive(public, self._bias, self._client, self._dealer))

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
        material = self._claimed.take(inference)
        image = reader.take(size, public.plan.input_n)
        reader.done()
        run = Run(public, self._convs, self._positions, material, self._client)
        return run.run(image.reshape(public.batch, *public.lowered.input.shape))

    def _stock(self) -> Stock[ServerMaterial]:
        if self._paired is None:
            raise RefusedError("the session is not set up")
        return self._paired

    def _ready(self) -> Public:
        if self._public is None:
            raise RefusedError("the session is not set up")
        return self._public
