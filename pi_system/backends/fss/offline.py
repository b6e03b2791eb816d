"""One inference's one-time material, made by client and dealer and received by the server.

The client sends e = b r' - t to the server, the dealer sends g = W' r' - (u - t); the server
keeps h = e + g = W r' - u. The dealer makes the gates' material and sends each side its share.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...net.channel import Channel
from . import masks, packing, relu
from .ahead import Outlet
from .device import Product
from .masks import Bundle, GateMasks, LinearMasks
from .material import ClientMaterial, ServerMaterial
from .program import Conv, Relu
from .public import Public
from .ring import Words
from .source import SYSTEM, Source


def receive(
    public: Public, bias: Mapping[str, Words], client: Channel, dealer: Channel
) -> ServerMaterial:
    """The server's part.

    Args:
        bias: per linear operation, (O, 1, 1), added to h.

    Raises:
        ProtocolError: a message does not have exactly its form.
    """
    material = ServerMaterial()
    for op in public.lowered.ops:
        if isinstance(op, Conv):
            n = public.plan.convs[op.out].n
            total = public.batch * op.size
            shape = (public.batch, *op.shape)
            limit = packing.size(total, n)
            with client.meter.in_layer("linear"):
                messages = client.recv(limit), dealer.recv(limit)
            e, g = (packing.unpack(message, total, n).reshape(shape) for message in messages)
            material.h[op.out] = e + g + bias[op.out]
        elif isinstance(op, Relu):
            width = public.plan.gates[op.out]
            count = public.batch * len(op.kept)
            with dealer.meter.in_layer("gates"):
                message = dealer.recv()
            material.gates[op.out] = relu.read_server_share(width, count, message)
    return material


def make(
    public: Public,
    b: Mapping[str, Product],
    inference: int,
    server: Channel,
    dealer: Channel,
    source: Source = SYSTEM,
    seed: bytes | None = None,
) -> ClientMaterial:
    """The client's part.

    Args:
        b: the convolution with b per linear operation.
        seed: of this inference alone, where the dealer knows it already.
    """
    seed = source.seed() if seed is None else seed
    dealer.send(inference.to_bytes(8, "little") + seed)
    bundle = source.bundle(public, seed, inference)
    gates: dict[str, tuple[relu.Share, Words]] = {}
    for item in masks.walk(public.lowered, public.plan, bundle, public.batch):
        if isinstance(item, LinearMasks):
            n = public.plan.convs[item.op.out].n
            e = b[item.op.out](item.source, np.uint64(0) - item.t)
            with server.meter.in_layer("linear"):
                server.send(packing.pack(e, n))
        elif isinstance(item, GateMasks):
            width, size = public.plan.gates[item.op.out], len(item.c)
            with dealer.meter.in_layer("gates"):
                message = dealer.recv(16 * width.blocks * size)
            corrections = relu.read_corrections(width, size, message)
            stream = bundle.stream(item.op.out, "gate")
            share = relu.client_share(width, size, stream, corrections)
            gates[item.op.out] = (share, item.fresh)
        else:
            ends = item
    return ClientMaterial(ends, gates)


def deal(
    public: Public,
    blinded: Mapping[str, Product],
    bundle: Bundle,
    server: Outlet,
    client: Outlet,
    source: Source = SYSTEM,
) -> None:
    """The dealer's part.

    Args:
        blinded: the convolution with W' per linear operation.
    """
    own = source.seed()
    for item in masks.walk(public.lowered, public.plan, bundle, public.batch):
        if isinstance(item, LinearMasks):
            n = public.plan.convs[item.op.out].n
            g = blinded[item.op.out](item.source, item.t - item.u)
            server.send(packing.pack(g, n))
        elif isinstance(item, GateMasks):
            width = public.plan.gates[item.op.out]
            corrections, message = relu.deal(
                width,
                item.c,
                bundle.stream(item.op.out, "gate"),
                source.private(own, bundle.inference, item.op.out),
            )
            server.send(message)
            client.send_array(corrections)
