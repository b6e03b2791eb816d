"""The dealer: seeds to both parties, then the missing share of every tuple to the server.

It learns the shapes of an inference and nothing else: no weight, image or anything masked ever
reaches it. It imports torch but not CrypTen.

Its links must be private: a party that reads what the dealer sends to the other, or a third that
reads both, can unmask what the parties exchange. A dealer in league with either party can too.

Messages, each a frame::

    setup     dealer -> both     a fresh 32-byte seed, one for each
              server -> dealer   {"tape": [...]}            (tape.py)
              client -> dealer   {"tape_sha256": "..."}
              dealer -> both     empty: the two agree
    offline   both   -> dealer   {"count": n}
              dealer -> server   per inference and tuple, its correction
              dealer -> client   per inference and tuple, empty: still at work
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import ProtocolError, RefusedError
from ...net.channel import Channel, PeerClosed
from ...net.meter import Phase
from ..base import Options
from . import tape as tapes
from .prg import Stream, fresh_key
from .tape import Tape


class Dealer:
    """One session of the dealer. The seeds live as long as it does and are used once per index."""

    def __init__(self, server: Channel, client: Channel, options: Options) -> None:
        self._server = server
        self._client = client
        self._options = options
        self._keys = fresh_key(), fresh_key()
        self._tape: Tape = ()
        self._next = 0

    def run(self) -> None:
        """Serve until the server ends the session.

        Raises:
            RefusedError: the parties do not ask for the same.
            PeerError: a party was lost in the middle, or broke the protocol.
        """
        torch.set_num_threads(self._options.threads)
        with self._in_phase("setup"):
            self._setup()
        while True:
            with self._in_phase("offline", self._next):
                try:
                    message = self._server.recv_json()
                except PeerClosed:
                    return
                self._offline(message)

    def _setup(self) -> None:
        self._server.send(self._keys[0])
        self._client.send(self._keys[1])
        self._tape = tapes.from_json(tapes.field(self._server.recv_json(), "tape", list))
        client_hash = tapes.field(self._client.recv_json(), "tape_sha256", str)
        if client_hash != tapes.sha256(self._tape):
            raise RefusedError("server and client ask for different one-time material")
        self._server.send(b"")
        self._client.send(b"")

    def _offline(self, message: object) -> None:
        count = tapes.field(message, "count", int)
        if tapes.field(self._client.recv_json(), "count", int) != count:
            raise RefusedError("server and client ask for different numbers of inferences")
        if count < 1:
            raise ProtocolError(f"{count} inferences asked for")
        for _ in range(count):
            with self._in_phase("offline", self._next):
                first, second = (Stream(key, self._next) for key in self._keys)
                self._next += 1
                for request in self._tape:
                    self._server.send_array(request.correction(first, second).numpy())
                    self._client.send(b"")

    @contextmanager
    def _in_phase(self, phase: Phase, inference: int = -1) -> Iterator[None]:
        with (
            self._server.meter.in_phase(phase, inference),
            self._client.meter.in_phase(phase, inference),
        ):
            yield
