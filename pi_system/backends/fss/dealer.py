"""The dealer: makes one-time material from blinded weights W' = W - b and the client's seeds.

It never sees a weight (W' is uniform without b), an image or anything of the online phase.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

from ...errors import ProtocolError
from ...net.channel import Channel
from ...net.framing import PeerClosed
from ..base import Options
from . import device, offline, packing, prg
from .ahead import Ahead, Held, parse
from .device import Product
from .public import Public, agree, receive_graph
from .source import SYSTEM, Source

MAX_COUNT = 1 << 20


class Dealer:
    """A dealer's session; see :class:`pi_system.backends.base.DealerSession`."""

    def __init__(
        self, server: Channel, client: Channel, options: Options, source: Source = SYSTEM
    ) -> None:
        self._source = source
        self._server = server
        self._client = client
        self._options = options

    def run(self) -> None:
        try:
            public = receive_graph(self._server, self._options.batch)
            blinded = self._receive_weights(public)
            with closing(Ahead(partial(self._make, public, blinded), self._options.ahead)) as ahead:
                while True:
                    self._serve(public, blinded, ahead)
        except PeerClosed:
            return

    def _make(
        self, public: Public, blinded: dict[str, Product], seed: bytes, inference: int
    ) -> Held:
        held = Held()
        bundle = self._source.bundle(public, seed, inference)
        outlets = held.outlet("server"), held.outlet("client")
        offline.deal(public, blinded, bundle, *outlets, self._source)
        return held

    def _receive_weights(self, public: Public) -> dict[str, Product]:
        blinded: dict[str, Product] = {}
        for op in public.lowered.convs:
            n = public.plan.convs[op.out].n
            count = 1
            for side in op.weight_shape:
                count *= side
            words = packing.unpack(self._server.recv(packing.size(count, n)), count, n)
            weight = words.reshape(op.weight_shape)
            source = public.lowered.shapes[op.source]
            blinded[op.out] = device.wide(self._options.device, op, source, weight, n)
        return blinded

    def _serve(self, public: Public, blinded: dict[str, Product], ahead: Ahead) -> None:
        """One offline phase."""
        request = self._client.recv_json()
        count = request.get("count") if isinstance(request, dict) else None
        if type(count) is not int:
            raise ProtocolError("the client sent no request for material")
        agree(request.get("digest"), public, "client")
        self._options.grant(count)
        with self._server.meter.in_phase("offline"):
            for _ in range(min(count, MAX_COUNT)):
                head = self._client.recv(8 + prg.SEED_BYTES)
                if len(head) != 8 + prg.SEED_BYTES:
                    raise ProtocolError("the client sent no seed")
                inference = int.from_bytes(head[:8], "little")
                channels = self._server, self._client
                if (held := ahead.take(inference, head[8:])) is not None:
                    held.release(*channels)
                    continue
                bundle = self._source.bundle(public, head[8:], inference)
                offline.deal(public, blinded, bundle, *channels, self._source)
        if self._options.ahead and "ahead" in request:
            ahead.want(parse(request["ahead"]))
