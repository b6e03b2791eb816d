"""The client: owns the images, drives the session, never holds a weight."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..backends.base import Backend, Keeping, KeepingSession, Options
from ..errors import PeerTimeout, PiError, ProtocolError, RefusedError, UsageError
from ..net.channel import Channel
from ..net.link import Link
from ..net.listen import connect
from ..net.meter import Meter
from ..net.tls import Identity
from . import commands, handshake
from .address import Address
from .commands import Command
from .public import PublicModel, receive_public
from .timeouts import Timeouts


@dataclass(frozen=True)
class ClientSettings:
    """Whom to ask and how.

    Attributes:
        dealers: one that answers is taken. None for a session on material that is in stock on
            both sides.
        batch: images per inference.
        threads: of this party.
        link: the emulated network on every connection; None for none.
        identity: whom this party speaks for; ``None`` for plaintext.
        expect_model: refuse a server whose model has another hash.
        ahead: fss: inferences whose material the dealer may make before it is asked for.
    """

    server: Address
    dealers: tuple[Address, ...]
    backend: Backend
    backend_name: str
    batch: int = 1
    threads: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    link: Link | None = None
    identity: Identity | None = None
    expect_model: str | None = None
    ahead: int = 0


class Client:
    """A session with a server and a dealer: :meth:`setup`, then offline and online in turns.

    With a backend whose store is open, :meth:`prepare` lays in material for later sessions.

    Use as a context manager; leaving it in an orderly way closes the session, an exception
    tells the peers why.

    Attributes:
        model: the public part of the server's model.
        meter: what was sent and received.
    """

    def __init__(self, settings: ClientSettings) -> None:
        """Connect to both and receive the public model.

        Raises:
            PeerError: somebody cannot be reached, or is silent.
            RefusedError: the parties do not agree on version, backend or session.
            UsageError: the backend needs a dealer, and none is named.
        """
        if not settings.dealers and not isinstance(settings.backend, Keeping):
            raise UsageError(f"the backend {settings.backend_name!r} needs a dealer")
        self.meter = Meter()
        self._settings = settings
        self._stack = contextlib.ExitStack()
        heartbeat = self._stack.enter_context(settings.timeouts.heartbeat())
        self._laid = self._used = 0
        self._channels: dict[str, Channel] = {}
        step = settings.timeouts.step
        try:
            session = handshake.new_session()
            if settings.dealers:
                session = self._connect_dealer(settings.dealers)
            self._connect("server", settings.server, step)
            self._server, dealer = self._channels["server"], self._channels.get("dealer")
            mine = handshake.Hello(
                "client",
                session,
                settings.backend_name,
                settings.batch,
                dealers=tuple(map(str, settings.dealers)),
            )
            # The dealer answers once it has both; so the server must be spoken to in between.
            if dealer is not None:
                handshake.say(dealer, mine)
            handshake.greet(self._server, mine, role="server")
            heartbeat.keep(self._server)
            if dealer is not None:
                handshake.hear(dealer, mine, role="dealer")
                heartbeat.keep(dealer)
            self.model: PublicModel = receive_public(self._server)
            if settings.expect_model not in (None, self.model.sha256):
                raise RefusedError(
                    f"model {settings.expect_model} expected, {self.model.sha256} at the server"
                )
            options = Options(
                batch=settings.batch,
                threads=settings.threads,
                model=self.model.sha256,
                ahead=settings.ahead,
            )
            self._session = settings.backend.client(self.model.graph, self._server, dealer, options)
        except BaseException as error:
            self._end(error)
            raise

    def _connect_dealer(self, dealers: tuple[Address, ...]) -> str:
        """Connect to one that answers; a session's name that says which."""
        patience = self._settings.timeouts.step / len(dealers)
        *others, last = order(len(dealers))
        for chosen in others:
            # One that is being replaced may have no address at the moment.
            with contextlib.suppress(PeerTimeout, UsageError):
                self._connect("dealer", dealers[chosen], patience)
                return handshake.new_session(chosen, len(dealers))
        self._connect("dealer", dealers[last], patience)
        return handshake.new_session(last, len(dealers))

    def _connect(self, peer: str, address: Address, patience: float) -> None:
        settings = self._settings
        self._channels[peer] = self._stack.enter_context(
            connect(
                *address,
                retry_for=patience,
                timeout=settings.timeouts.step,
                peer=peer,
                meter=self.meter,
                link=settings.link,
                identity=settings.identity,
            )
        )

    def setup(self) -> None:
        """Everything needed once per session."""
        self._wait(self._settings.timeouts.prepare)
        commands.send(self._server, Command("setup"))
        self._session.setup()
        commands.await_done(self._server)

    def ping(self) -> None:
        """One round trip to the server."""
        with self.meter.in_phase("probe"):
            commands.send(self._server, Command("ping"))
            commands.await_done(self._server)

    def load(self, size: int) -> None:
        """Send ``size`` bytes of no meaning and wait until the server has them."""
        with self.meter.in_phase("probe"):
            commands.send(self._server, Command("load", size))
            self._server.send(bytes(size))
            commands.await_done(self._server)

    @property
    def stock(self) -> int:
        """For how many inferences there is material from earlier, after :meth:`setup`."""
        return self._session.stock if isinstance(self._session, KeepingSession) else 0

    def prepare(self, count: int) -> int:
        """Lay in one-time material for ``count`` inferences; how many are in stock then."""
        session = self._session
        if not isinstance(session, KeepingSession):
            raise UsageError(f"the backend {self._settings.backend_name!r} keeps no material")
        self._wait(self._settings.timeouts.prepare)
        with self.meter.in_phase("offline"):
            commands.send(self._server, Command("prepare", count))
            stock = session.prepare(count)
            commands.await_done(self._server)
        return stock

    def offline(self, count: int) -> None:
        """Lay one-time material for ``count`` inferences; returns when all sides have it."""
        self._wait(self._settings.timeouts.prepare)
        with self.meter.in_phase("offline", self._laid):
            commands.send(self._server, Command("offline", count))
            self._session.offline(count)
            commands.await_done(self._server)
        self._laid += count

    def online(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """One inference, using one item of material.

        Args:
            images: normalised, of shape (batch, C, H, W).

        Returns:
            Logits of shape (batch, classes).
        """
        expected = (self._settings.batch, *self.model.graph.input.shape)
        if images.shape != expected:
            raise UsageError(f"images of shape {images.shape}; the session takes {expected}")
        if self._used >= self._laid:
            raise UsageError("no one-time material left; call offline first")
        self._wait(self._settings.timeouts.step)
        number, self._used = self._used, self._used + 1
        with self.meter.in_phase("online", number):
            commands.send(self._server, Command("online", number))
            logits = self._session.online(images)
        if logits.shape != (len(images), *self.model.graph.output.shape):
            raise ProtocolError(f"the answer has shape {logits.shape}")
        return logits

    def facts(self) -> dict[str, Any]:
        """What the backend has to say of the session."""
        return self._session.facts()

    def close(self) -> None:
        """End the session in an orderly way."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if value is None:
            self.close()
        else:
            self._end(value)

    def _end(self, error: BaseException) -> None:
        reason = error if isinstance(error, PiError) else PiError("interrupted")
        for channel in self._channels.values():
            channel.abort(reason)
        self._stack.close()

    def _wait(self, seconds: float) -> None:
        for channel in self._channels.values():
            channel.timeout = seconds


def order(dealers: int) -> list[int]:
    """In which to try them, so that every dealer gets its part of the sessions."""
    return random.sample(range(dealers), dealers)


def _comma(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
