"""The client: holds the image and, of every tensor, a share it knows before the image exists.

Online it does no linear algebra: per batch of gates it evaluates comparison keys and answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...errors import ProtocolError, RefusedError, UsageError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from . import masks, packing, prg, relu
from .linear import RingConv
from .masks import Bundle, Ends, GateMasks, LinearMasks
from .packing import Reader
from .public import MAX_RETRIES, OK, RETRY, Public, receive_plan
from .ring import Words, decode, encode
from .store import Store


@dataclass
class ClientMaterial:
    """Of one inference: the masks of image and logits, and per gate batch a share and r'."""

    ends: Ends
    gates: dict[str, tuple[relu.Share, Words]] = field(default_factory=dict)


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
            self._b[op.out] = RingConv(op, source, b, n)
        self._server.send_json(public.digest)
        self._public = public

    def offline(self, count: int) -> None:
        public = self._ready()
        first = self._store.next_id
        request = {"count": count, "first": first, "digest": public.digest}
        self._server.send_json(request)
        self._dealer.send_json(request)
        for inference in self._store.reserve(first, count):
            self._store.add(inference, self._make(public, inference))

    def _make(self, public: Public, inference: int) -> ClientMaterial:
        seed = prg.fresh_seed()
        self._dealer.send(inference.to_bytes(8, "little") + seed)
        bundle = Bundle(seed, public.model, inference)
        gates: dict[str, tuple[relu.Share, Words]] = {}
        for item in masks.walk(public.lowered, public.plan, bundle, public.batch):
            if isinstance(item, LinearMasks):
                n = public.plan.convs[item.op.out].n
                e = self._b[item.op.out](item.source, np.uint64(0) - item.t)
                self._server.send(packing.pack(e, n))
            elif isinstance(item, GateMasks):
                width, size = public.plan.gates[item.op.out], len(item.c)
                message = self._dealer.recv(16 * width.blocks * size)
                corrections = relu.read_corrections(width, size, message)
                stream = bundle.stream(item.op.out, "gate")
                share = relu.client_share(width, size, stream, corrections)
                gates[item.op.out] = (share, item.fresh)
            else:
                ends = item
        return ClientMaterial(ends, gates)

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
        lowered, plan = public.lowered, public.plan
        inference, material = self._store.claim_next()
        head = inference.to_bytes(8, "little")
        masked = packing.pack(image - material.ends.image, plan.input_n)
        with self._server.meter.in_layer(lowered.input.out):
            self._server.send(head + masked)
        for step in lowered.steps:
            if not step.gates:
                continue
            with self._server.meter.in_layer(step.gates[0].out):
                parts = [material.gates.pop(op.out) for op in step.gates]
                size = sum(share.width.opening_bytes(share.count) for share, _ in parts)
                reader = Reader(self._server.recv(size))
                answers = [relu.answer(share, fresh, reader) for share, fresh in parts]
                reader.done()
                self._server.send(b"".join(answers))
        with self._server.meter.in_layer(lowered.output):
            count = material.ends.logits.size
            message = self._server.recv(1 + packing.size(count, plan.output_k))
        if not message or message[0] not in (OK, RETRY):
            raise ProtocolError("the server's answer has no valid status")
        logits = packing.unpack(message[1:], count, plan.output_k)
        if message[0] == RETRY:
            return None
        total = logits.reshape(material.ends.logits.shape) + material.ends.logits
        return decode(total, plan.output_k, plan.f_x).astype(np.float32)

    def _ready(self) -> Public:
        if self._public is None:
            raise RefusedError("the session is not set up")
        return self._public
