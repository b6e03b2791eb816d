"""The client: holds the image and, of every tensor, a share it knows before the image exists.

Online it does no linear algebra: per batch of gates it evaluates comparison keys and answers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import ProtocolError, RefusedError, UsageError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from . import masks, offline, online, prg
from .linear import RingConv
from .material import ClientMaterial
from .public import MAX_RETRIES, Public, receive_plan
from .ring import Words, decode, encode
from .store import Store


class Client:
    """A client's session; see :class:`pi_system.backends.base.ClientSession`."""

    def __init__(self, public: Graph, server: Channel, dealer: Channel, options: Options) -> None:
        self._graph = public
        self._server = server
        self._dealer = dealer
        self._options = options
        self._store: Store[ClientMaterial] = Store()
        self._b: dict[str, RingConv] = {}
        self._public: Public | None = None

    def setup(self) -> None:
        public = receive_plan(self._server, self._graph, self._options.batch)
        seed = self._server.recv(prg.SEED_BYTES)
        if len(seed) != prg.SEED_BYTES:
            raise ProtocolError("the server sent no seed")
        for op in public.lowered.convs:
            b = masks.blinding(seed, public.model, op)
            n = public.plan.convs[op.out].n
            source = public.lowered.shapes[op.source]
            self._b[op.out] = RingConv(
                op, source, b, n, batch=public.batch, threads=self._options.threads, compact=True
            )
        self._server.send_json(public.digest)
        self._public = public

    def offline(self, count: int) -> None:
        public = self._ready()
        first = self._store.next_id
        request = {"count": count, "first": first, "digest": public.digest}
        self._server.send_json(request)
        self._dealer.send_json(request)
        for inference in self._store.reserve(first, count):
            self._store.add(
                inference, offline.make(public, self._b, inference, self._server, self._dealer)
            )

    def online(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        public = self._ready()
        image = self._encode(public, images)
        meter = self._server.meter
        for _ in range(MAX_RETRIES + 1):
            logits = self._infer(public, image)
            if logits is not None:
                return logits
            with meter.in_phase("offline", meter.labels.inference):
                self.offline(1)
        raise RefusedError(f"the server asked for fresh material {MAX_RETRIES + 1} times in a row")

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
        inference, material = self._store.claim_next()
        logits = online.ask(public, material, inference, image, self._server)
        if logits is None:
            return None
        return decode(logits, public.plan.output_k, public.plan.f_x).astype(np.float32)

    def _ready(self) -> Public:
        if self._public is None:
            raise RefusedError("the session is not set up")
        return self._public
