"""The client: holds the image and, of every tensor, a share it knows before the image exists.

Online it does no linear algebra: per batch of gates it evaluates comparison keys and answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ProtocolError, RefusedError, UsageError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from . import masks, offline, online, pairing, prg
from .ahead import MOST
from .material import ClientMaterial
from .public import MAX_RETRIES, Public, receive_plan
from .ring import Words, decode, encode
from .source import SYSTEM, Source
from .store import Claimed, Step, Stock, Store
from .wide import WideConv


class Client:
    """A client's session; see :class:`pi_system.backends.base.ClientSession`."""

    def __init__(
        self,
        public: Graph,
        server: Channel,
        dealer: Channel | None,
        options: Options,
        store: Store | None = None,
        source: Source = SYSTEM,
    ) -> None:
        self._graph = public
        self._server = server
        self._dealer = dealer
        self._options = options
        self._store = store
        self._source = source
        self._claimed: Claimed[ClientMaterial] = Claimed()
        self._paired: Stock[ClientMaterial] | None = None
        self._b: dict[str, WideConv] = {}
        self._seeds: dict[int, bytes] = {}
        self._public: Public | None = None
        self._retries = 0

    def setup(self) -> None:
        public = receive_plan(self._server, self._graph, self._options.batch)
        if self._options.model not in (None, public.model):
            raise RefusedError(
                f"the server's plan is for the model {public.model}, it announced "
                f"{self._options.model}"
            )
        seed = self._server.recv(prg.SEED_BYTES)
        if len(seed) != prg.SEED_BYTES:
            raise ProtocolError("the server sent no seed")
        for op in public.lowered.convs if self._dealer is not None else ():
            b = masks.blinding(seed, public.model, op)
            source = public.lowered.shapes[op.source]
            self._b[op.out] = WideConv(op, source, b, public.plan.convs[op.out].n)
        self._server.send_json(public.digest)
        self._paired = pairing.meet_server(self._store, public, self._server)
        self._public = public

    def offline(self, count: int) -> None:
        stock = self._stock()
        step = stock.plan(count, claim=True)
        if step.made and self._dealer is None:
            raise RefusedError(
                f"{len(stock)} items of one-time material are in stock for {count} inferences, and "
                "the session has no dealer to make more: prepare some with a dealer first"
            )
        self._take(step)
        for inference in step.kept:
            self._claimed.add(inference, stock.load(inference))
        self._make(step, self._claimed.add)

    @property
    def stock(self) -> int:
        return len(self._stock())

    def prepare(self, count: int) -> int:
        stock = self._stock()
        if self._dealer is None:
            raise UsageError("only a session with a dealer can prepare one-time material")
        if len(stock) + count > stock.limit:
            raise UsageError(
                f"{count} more items of one-time material than the {len(stock)} in stock are over "
                f"the limit of {stock.limit}"
            )
        step = stock.plan(count, claim=False)
        self._take(step)
        self._make(step, stock.add)
        return len(stock)

    def _take(self, step: Step) -> None:
        """A step of both sides: durable here, then at the server, then answered."""
        stock = self._stock()
        stock.begin(step)
        self._server.send_json(step.to_json())
        if self._server.recv(64) != step.link.encode():
            raise ProtocolError("the server did not confirm a step of the store")
        stock.confirm(step)

    def _make(self, step: Step, add: Callable[[int, ClientMaterial], None]) -> None:
        public, made = self._ready(), step.made
        if not made or self._dealer is None:
            return
        request = {"count": len(made), "first": made.start, "digest": public.digest}
        if self._options.ahead:
            coming = range(made.stop, made.stop + min(self._options.ahead, MOST))
            known = {i: seed for i, seed in self._seeds.items() if i in made}
            seeds = {i: self._seeds.get(i) or self._source.seed() for i in coming}
            request["ahead"] = [[i, seed.hex()] for i, seed in seeds.items()]
            self._seeds = known | seeds
        self._dealer.send_json(request)
        for inference in made:
            channels, seed = (self._server, self._dealer), self._seeds.pop(inference, None)
            add(inference, offline.make(public, self._b, inference, *channels, self._source, seed))

    def online(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        public = self._ready()
        image = self._encode(public, images)
        meter = self._server.meter
        for _ in range(MAX_RETRIES + 1):
            logits = self._infer(public, image)
            if logits is not None:
                return logits
            self._retries += 1
            with meter.in_phase("offline", meter.labels.inference):
                self.offline(1)
        raise RefusedError(f"the server asked for fresh material {MAX_RETRIES + 1} times in a row")

    def facts(self) -> dict[str, Any]:
        """The plan in brief (ring and opened widths as least and largest) and the retries."""
        plan = self._ready().plan
        rings = [conv.n for conv in plan.convs.values()]
        opened = [gate.k for gate in plan.gates.values()] or [0]
        return {
            "f_x": plan.f_x,
            "opened_bits": [min(opened), max(opened)],
            "ring_bits": [min(rings), max(rings)],
            "error": plan.error,
            "retry_rate": plan.retry_rate,
            "retries": self._retries,
        }

    def _encode(self, public: Public, images: npt.NDArray[np.float32]) -> Words:
        expected = (public.batch, *public.graph.input.shape)
        if images.shape != expected:
            raise UsageError(f"this session takes images {expected}, got {images.shape}")
        limit = public.plan.input_limit
        if not (np.abs(images) <= limit).all():  # also where not a number
            raise UsageError(f"an image holds a value outside +-{limit:g}, the plan's range")
        return encode(images, public.plan.f_x)

    def _infer(self, public: Public, image: Words) -> npt.NDArray[np.float32] | None:
        """Logits, or ``None`` where the server asks for a retry."""
        inference, material = self._claimed.take_next()
        logits = online.ask(public, material, inference, image, self._server)
        if logits is None:
            return None
        return decode(logits, public.plan.output_k, public.plan.f_x).astype(np.float32)

    def _stock(self) -> Stock[ClientMaterial]:
        if self._paired is None:
            raise RefusedError("the session is not set up")
        return self._paired

    def _ready(self) -> Public:
        if self._public is None:
            raise RefusedError("the session is not set up")
        return self._public
