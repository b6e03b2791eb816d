"""One recorded session: server, client and dealer as they serve, over sockets of this machine.

Recorded are the frames that went through the sockets, from the first one on, with the four bytes
of framing taken off. Both ends of every link are recorded and must have seen the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from ...backends.base import Backend, ClientSession, DealerSession, Options, ServerSession
from ...backends.fss.party import FssBackend
from ...backends.fss.transcript import Role
from ...errors import PeerError, PeerTimeout
from ...graph.ir import Graph
from ...net.channel import Channel
from ...net.listen import Listener
from ...net.meter import Phase
from ...net.tap import Frame, Tape
from ...parties.address import Address
from ...parties.client import Client, ClientSettings
from ...parties.dealer import Dealer
from ...parties.server import ServerSettings, serve_once
from ...parties.serving import ServingSettings
from ...parties.timeouts import Timeouts
from .sabotage import Sabotage

_ADDRESS = "127.0.0.1"
_COMING = 60.0
"""Seconds to wait for a party of this process to connect."""
_UNKNOWN = "party"
"""What the dealer calls a party that has not said who it is."""
_GREETING = 3
"""Frames on a link before both ends are recorded."""


@dataclass(frozen=True)
class Sent:
    """One frame on a link; ``phase`` is the server's, and "" on links with the dealer."""

    sender: Role
    receiver: Role
    phase: Phase | str
    data: bytes


class _Listener(Listener):
    """Records every connection from its first frame on."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(_ADDRESS, 0)
        self._tape = tape

    def accept(self, *, wait: float | None = None, **rest: Any) -> Channel:
        channel = super().accept(wait=_COMING if wait is None else wait, **rest)
        self._tape.attach(channel)
        return channel


class _Recorded:
    """A backend one of whose parties has its channels recorded."""

    def __init__(self, backend: Backend, tape: Tape) -> None:
        self.name = backend.name
        self._backend, self._tape = backend, tape

    def server(
        self, graph: Graph, client: Channel, dealer: Channel | None, options: Options
    ) -> ServerSession:
        if dealer is not None:
            self._tape.attach(dealer)
        return self._backend.server(graph, client, dealer, options)

    def client(
        self, public: Graph, server: Channel, dealer: Channel | None, options: Options
    ) -> ClientSession:
        self._tape.attach(server, *(() if dealer is None else (dealer,)))
        return self._backend.client(public, server, dealer, options)

    def dealer(self, server: Channel, client: Channel, options: Options) -> DealerSession:
        return self._backend.dealer(server, client, options)


class Session:
    """Three parties and what they say. A context manager; leaving it ends them.

    Attributes:
        answer: the logits of the latest inference, (batch, classes).
        ends_agree: whether every frame arrived as it was sent; known at the end.

    Raises:
        PiError: a party failed.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        plan: str = "default",
        batch: int = 1,
        threads: int = 1,
        sabotage: Sabotage | None = None,
    ) -> None:
        self._tapes: dict[Role, Tape] = {"server": Tape(), "client": Tape(), "dealer": Tape()}
        self._errors: list[BaseException] = []
        self._seen: dict[tuple[Role, Role], dict[Role, list[bytes]]] = {}
        self.ends_agree = True
        self.answer: npt.NDArray[np.float32] | None = None
        self._stack = contextlib.ExitStack()
        timeouts = Timeouts(step=60.0)
        at = {
            role: self._stack.enter_context(_Listener(self._tapes[role]))
            for role in ("server", "dealer")
        }
        serving = ServingSettings(
            backend=FssBackend(sabotage.dealer()) if sabotage else FssBackend(),
            backend_name=FssBackend.name,
            threads=threads,
            timeouts=timeouts,
        )
        offering = ServerSettings(
            model=graph,
            sha256=graph.sha256(),
            dealers=(Address(_ADDRESS, at["dealer"].port),),
            plan=plan,
            backend=_Recorded(FssBackend(), self._tapes["server"]),
            backend_name=FssBackend.name,
            threads=threads,
            timeouts=timeouts,
        )
        self._threads = [
            self._start(lambda: Dealer(at["dealer"], serving).serve_once()),
            self._start(lambda: serve_once(at["server"], offering)),
        ]
        own = FssBackend(sabotage.client()) if sabotage else FssBackend()
        self._client = Client(
            ClientSettings(
                server=Address(_ADDRESS, at["server"].port),
                dealers=(Address(_ADDRESS, at["dealer"].port),),
                backend=_Recorded(own, self._tapes["client"]),
                backend_name=FssBackend.name,
                batch=batch,
                timeouts=timeouts,
            )
        )

    def setup(self) -> list[Sent]:
        """The frames of the connections and the setup phase."""
        self._client.setup()
        return self._drain()

    def offline(self) -> list[Sent]:
        """Those of laying in material for one inference."""
        self._client.offline(1)
        return self._drain()

    def online(self, images: npt.NDArray[np.float32]) -> list[Sent]:
        """Those of an inference, retries included.

        Args:
            images: (batch, C, H, W).
        """
        self.answer = self._client.online(images)
        return self._drain()

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.__exit__(kind, value, traceback)
        for thread in self._threads:
            thread.join(10)
        self._stack.close()
        if value is None or isinstance(value, PeerError):
            # Of a party that was lost its own words say more.
            for error in self._errors:
                if not isinstance(error, PeerError):
                    raise error
            for error in self._errors if value is None else ():
                raise error
        if value is None:
            if any(thread.is_alive() for thread in self._threads):
                raise PeerTimeout("a party of the audit did not end")
            self._compare()

    def _drain(self) -> list[Sent]:
        """All frames since the last call."""
        # Its answer follows all that the server sent or received before.
        self._client.ping()
        server, client, dealer = (self._take(role) for role in ("server", "client", "dealer"))
        # A frame is recorded before it is sent, but the dealer may not have received all yet.
        found = [_hello(frame) for frame in dealer if frame.peer == _UNKNOWN]
        found += [_sent("server", frame) for frame in server if frame.peer == "client"]
        found += [_sent("server", f) for f in server if _to_dealer(f)]
        found += [_sent("client", f) for f in client if _to_dealer(f)]
        found += [_sent("dealer", frame) for frame in dealer if frame.direction == "sent"]
        return found

    def _take(self, role: Role) -> list[Frame]:
        tape = self._tapes[role]
        count = len(tape.frames)
        taken = tape.frames[:count]
        del tape.frames[:count]
        for frame in taken:
            if frame.peer != _UNKNOWN:
                digest = hashlib.blake2b(frame.data, digest_size=16).digest()
                sent = _sent(role, frame)
                ends = self._seen.setdefault((sent.sender, sent.receiver), {})
                ends.setdefault(role, []).append(digest)
        return taken

    def _compare(self) -> None:
        """Both ends of every link against each other."""
        for role in self._tapes:
            self._take(role)
        for (sender, receiver), ends in self._seen.items():
            here, there = (ends.get(role, []) for role in (sender, receiver))
            # One end's record begins after the hellos.
            shorter = min(len(here), len(there))
            self.ends_agree &= (
                max(len(here), len(there)) - shorter <= _GREETING
                and here[len(here) - shorter :] == there[len(there) - shorter :]
            )

    def _start(self, work: Callable[[], object]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread


def _hello(frame: Frame) -> Sent:
    """A party's first words to the dealer, who does not know yet who it is."""
    return Sent(json.loads(frame.data)["role"], "dealer", "", frame.data)


def _to_dealer(frame: Frame) -> bool:
    return (frame.peer, frame.direction) == ("dealer", "sent")


def _sent(at: Role, frame: Frame) -> Sent:
    peer = cast(Role, frame.peer)
    sender, receiver = (peer, at) if frame.direction == "received" else (at, peer)
    return Sent(sender, receiver, frame.phase if at == "server" else "", frame.data)
