"""Server and client of the CrypTen backend, driven as :mod:`..base` describes.

Setup: the parties exchange a 32-byte seed each, the dealer gives each a 32-byte seed, and the
weights are shared without a message: the server adds a zero share to them, the client takes the
other half. Both parties know both halves, as with any pseudo-random zero share between two (a
party is neighbour to the other on both sides). That is harmless: such a share hides nothing from
the other party by itself, for it is never sent. What is sent is always masked further by a
one-time tuple, whose masks come from seeds that one party and the dealer have in common.

Online: the client shares the image in the same way; the layers run; the server sends its share of
the logits to the client, which alone learns them: to 16 fractional bits, and about one bit more of
what lies below, through the carry of the last truncation. The dealer is silent.

CrypTen's state belongs to the thread that calls (:func:`.compat.activate`): one thread must not
run two sessions at once, several threads of a process may run one each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import RefusedError, UsageError
from ...graph.ir import Graph
from ...net.channel import Channel
from ...net.meter import Phase
from ..base import ClientSession, DealerSession, Options, ServerSession
from . import compat
from . import tape as tapes
from .dealer import Dealer
from .prg import KEY_BYTES, Stream, fresh_key

SERVER: Final = 0
CLIENT: Final = 1


class CrypTenBackend:
    """CrypTen 0.4.1 as mended in :mod:`.compat`.

    Raises:
        UsageError: CrypTen is not installed, or the options ask for another device than the CPU.
    """

    name = "crypten"

    def __init__(self) -> None:
        compat.require()

    def server(
        self, graph: Graph, client: Channel, dealer: Channel, options: Options
    ) -> ServerSession:
        if options.plan != "default":
            raise UsageError(f"the crypten backend has one precision, and no plan {options.plan!r}")
        return Server(graph, client, dealer, options)

    def client(
        self, public: Graph, server: Channel, dealer: Channel, options: Options
    ) -> ClientSession:
        return Client(public, server, dealer, options)

    def dealer(self, server: Channel, client: Channel, options: Options) -> DealerSession:
        compat.check_device(options.device)
        return Dealer(server, client, options)


class _Party:
    """What server and client have in common."""

    def __init__(
        self, rank: int, graph: Graph, peer: Channel, dealer: Channel, options: Options
    ) -> None:
        compat.check_device(options.device)
        if options.batch < 1:
            raise UsageError(f"a batch of {options.batch} images is none")
        self._crypten: Any = compat.load()
        self._rank = rank
        self._graph = graph
        self._peer = peer
        self._dealer = dealer
        self._options = options
        self._shape = (options.batch, *graph.input.shape)
        self._prepared = 0
        self._done = 0

    def setup(self) -> None:
        """Agree on seeds and on what to ask the dealer for, and share the weights."""
        from . import export
        from .communicator import ChannelCommunicator
        from .provider import Store

        torch.set_num_threads(self._options.threads)
        with self._in_phase("setup"):
            own = fresh_key()
            peer_key = self._peer.exchange_array(np.frombuffer(own, np.uint8)).tobytes()
            self._dealer_key = self._dealer.recv_array(np.uint8, (KEY_BYTES,)).tobytes()
            self._tape = tapes.of_graph(self._graph, self._options.batch)
            if self._rank == SERVER:
                self._dealer.send_json({"tape": tapes.to_json(self._tape)})
            else:
                self._dealer.send_json({"tape_sha256": tapes.sha256(self._tape)})
            self._dealer.recv_into(bytearray())
        self._store = Store(self._tape)
        self._state = compat.State(
            communicator=ChannelCommunicator(self._peer, self._rank),
            provider=self._store,
            previous=Stream(peer_key),
            following=Stream(own),
            local=Stream(fresh_key()),
        )
        model = export.build(self._graph, label=self._peer.meter.in_layer)
        with compat.activate(self._state):
            self._model = model.encrypt(src=SERVER)
        self._graph = self._graph.public()

    def offline(self, count: int) -> None:
        """Lay in the one-time material of ``count`` inferences.

        Raises:
            UsageError: ``count`` is not positive.
        """
        if count < 1:
            raise UsageError(f"material for {count} inferences asked for")
        with self._in_phase("offline", self._prepared):
            self._dealer.send_json({"count": count})
        for _ in range(count):
            with self._in_phase("offline", self._prepared):
                stream = Stream(self._dealer_key, self._prepared)
                self._prepared += 1
                self._store.add([self._tuple(request, stream) for request in self._tape])

    def _tuple(self, request: tapes.Request, stream: Stream) -> list[Tensor]:
        shares = request.shares(stream, self._rank)
        if self._rank == SERVER:
            correction = self._dealer.recv_array(np.int64, request.product_size)
            shares.append(torch.from_numpy(correction))
        else:
            self._dealer.recv_into(bytearray())
        return shares

    def _run(self, images: Tensor) -> Tensor | None:
        """One inference; ``images`` count at the client only."""
        with self._in_phase("online", self._done):
            self._done += 1
            self._store.begin()
            with compat.activate(self._state):
                x = self._crypten.cryptensor(images, src=CLIENT)
                y = self._model(x)
                with self._peer.meter.in_layer("logits"):
                    logits: Tensor | None = y.get_plain_text(dst=CLIENT)
            self._store.end()
        return logits

    @contextmanager
    def _in_phase(self, phase: Phase, inference: int = -1) -> Iterator[None]:
        with ExitStack() as stack:
            for meter in {id(c.meter): c.meter for c in (self._peer, self._dealer)}.values():
                stack.enter_context(meter.in_phase(phase, inference))
            yield


class Server(_Party):
    """Owns the weights; never has an image or a logit in the clear."""

    def __init__(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> None:
        super().__init__(SERVER, graph, client, dealer, options)

    def online(self) -> None:
        """Serve one inference.

        Raises:
            RefusedError: no one-time material is left.
        """
        self._run(torch.zeros(self._shape))


class Client(_Party):
    """Owns the image; has the architecture and masks, never a weight in the clear."""

    def __init__(self, public: Graph, server: Channel, dealer: Channel, options: Options) -> None:
        super().__init__(CLIENT, public, server, dealer, options)

    def facts(self) -> dict[str, Any]:
        return {}

    def online(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Normalised images (N, C, H, W), N up to the session's batch, to logits (N, classes).

        Raises:
            UsageError: images of another shape or number, or not finite.
            RefusedError: no one-time material is left.
        """
        count = len(images)
        if images.shape[1:] != self._shape[1:] or not 1 <= count <= self._options.batch:
            raise UsageError(
                f"images of shape {images.shape}; this session takes up to "
                f"{self._options.batch} of shape {self._shape[1:]}"
            )
        if not np.isfinite(images).all():
            raise UsageError("an image holds values that are not finite")
        padded = torch.zeros(self._shape)
        padded[:count] = torch.tensor(images, dtype=torch.float32)
        logits = self._run(padded)
        if logits is None:
            raise RefusedError("the logits went to the other party")
        result: npt.NDArray[np.float32] = logits[:count].numpy()
        return result
