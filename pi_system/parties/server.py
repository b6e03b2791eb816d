"""The server: owns the model, serves clients' sessions, sees no image."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ..backends.base import KeepingSession, Options, ServerSession
from ..errors import PiError, ProtocolError, RefusedError
from ..graph.ir import Graph
from ..net.channel import Channel, PeerClosed
from ..net.listen import Listener, connect
from ..net.meter import Meter
from . import commands, handshake
from .address import Address
from .journal import Journal, milliseconds
from .public import send_public
from .serving import Host, ServingSettings

_PHASES: Final = {"prepare": "offline", "ping": "probe", "load": "probe"}


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ServingSettings):
    """How a server serves.

    Attributes:
        model: with its weights.
        sha256: the model's hash.
        dealers: where they listen; a session's is the client's choice.
        plan: the precision to serve at, for a backend that has several.
        keeps: whether the backend has a store, so that sessions without a dealer are possible.
    """

    model: Graph
    sha256: str
    dealers: tuple[Address, ...]
    plan: str = "default"
    keeps: bool = False


def host(listener: Listener, settings: ServerSettings, journal: Journal) -> Host:
    """A server of many clients at once; :meth:`Host.serve_forever` runs it."""

    def welcome(sock: socket.socket) -> Channel:
        return listener.welcome(sock, **settings.terms("client", "client"))

    def serve(client: Channel) -> None:
        with contextlib.suppress(Exception):  # written in the journal
            _Session(client, settings, journal, made).run()

    made = Host(listener, settings, journal, welcome=welcome, serve=serve)
    return made


def serve_once(
    listener: Listener, settings: ServerSettings, journal: Journal | None = None
) -> Meter:
    """Wait for a client and serve its session; returns what was sent and received.

    Raises:
        PiError: the session failed; the client and dealer have been told why.
    """
    client = listener.accept(**settings.terms("client", "client"))
    _Session(client, settings, journal or Journal("server"), None).run()
    return client.meter


class _Session:
    """One client's session, from its hello to its end."""

    def __init__(
        self, client: Channel, settings: ServerSettings, journal: Journal, host: Host | None
    ) -> None:
        self._client = client
        self._settings = settings
        self._journal = journal
        self._host = host
        self._meter = client.meter
        self._channels = [client]
        self._heartbeat = settings.timeouts.heartbeat()
        self._stack = contextlib.ExitStack()
        self._name = ""
        self._laid = self._used = 0

    def run(self) -> None:
        """Serve it; whatever fails is told the peers, written down and raised."""
        started = time.perf_counter()
        begun = False
        with self._stack:
            self._stack.enter_context(self._heartbeat)
            self._stack.enter_context(self._client)
            who = ""
            try:
                who = self._client.who
                hello = handshake.receive(
                    self._client, roles=("client",), backend=self._settings.backend_name
                )
                self._name = hello.session[:8]
                if self._host is not None:
                    self._host.greeted()
                    self._stack.enter_context(self._host.admission.place(who))
                    self._stack.enter_context(self._host.running(self._client))
                waited = milliseconds(time.perf_counter() - started)
                begun = True
                self._journal.write(
                    "session", session=self._name, who=who, batch=hello.batch, ms=waited,
                    dealer="yes" if hello.dealers else "no",
                )  # fmt: skip
                self._converse(hello)
            except Exception as error:
                known = isinstance(error, PiError)
                for channel in self._channels:
                    channel.abort(error if known else PiError("an internal error"))
                self._journal.fail(
                    "failed" if begun else "refused", error, session=self._name or None,
                    who=who, **self._summary(started),
                )  # fmt: skip
                raise
            self._journal.write(
                "ended", session=self._name, who=who, **self._summary(started)
            )  # fmt: skip

    def _summary(self, started: float) -> dict[str, Any]:
        sent, received = self._meter.moved()
        return {
            "inferences": self._used,
            "ms": milliseconds(time.perf_counter() - started),
            "sent": sent,
            "received": received,
        }

    def _converse(self, hello: handshake.Hello) -> None:
        client, settings = self._client, self._settings
        session = self._meet(hello)
        ready = False
        while True:
            client.timeout = settings.timeouts.idle
            client.while_silent = None if self._host is None else self._host.end_when_idle
            try:
                verb, number = commands.receive(client)
            except PeerClosed:
                return
            client.while_silent = None
            needs = verb in ("prepare", "offline", "online")
            if (verb == "setup" and ready) or (needs and not ready):
                raise ProtocolError(f"the client asked for {verb} at the wrong time")
            with self._request(verb, number):
                self._carry_out(session, verb, number)
            ready = ready or verb == "setup"

    def _meet(self, hello: handshake.Hello) -> ServerSession:
        client, settings = self._client, self._settings
        timeouts = settings.timeouts
        client.timeout = timeouts.step
        mine = hello.answer("server", settings.backend_name)
        dealer = None
        if hello.dealers:
            chosen = handshake.dealer_here(hello, [str(at) for at in settings.dealers])
            dealer = self._stack.enter_context(
                connect(
                    *settings.dealers[chosen],
                    # Less than the client's patience, so that the client hears the reason.
                    retry_for=0.6 * timeouts.step,
                    timeout=timeouts.step,
                    peer="dealer",
                    meter=self._meter,
                    link=settings.link,
                    identity=settings.identity,
                )
            )
            self._channels.append(dealer)
            if self._host is not None:
                self._stack.enter_context(self._host.running(dealer))
            handshake.greet(dealer, mine, role="dealer")
            self._heartbeat.keep(dealer)
        elif not settings.keeps:
            raise RefusedError(
                "a session without a dealer needs a server that keeps material (--store)"
            )
        handshake.say(client, mine)
        self._heartbeat.keep(client)
        send_public(client, settings.model, settings.sha256)
        options = Options(
            batch=hello.batch,
            threads=settings.threads,
            device=settings.device,
            plan=settings.plan,
        )
        return settings.backend.server(settings.model, client, dealer, options)

    @contextlib.contextmanager
    def _request(self, verb: str, number: int) -> Iterator[None]:
        started = time.perf_counter()
        sent, received = self._meter.moved()
        yield
        then = self._meter.moved()
        self._journal.write(
            "request",
            session=self._name,
            request=verb if verb != "online" else f"online {number}",
            phase=_PHASES.get(verb, verb),
            count=number if verb in ("prepare", "offline") else 1,
            ms=milliseconds(time.perf_counter() - started),
            sent=then[0] - sent,
            received=then[1] - received,
        )

    def _carry_out(self, session: ServerSession, verb: commands.Verb, number: int) -> None:
        client, meter, timeouts = self._client, self._meter, self._settings.timeouts
        match verb:
            case "ping" | "load":
                meter.move_last("probe")
                with meter.in_phase("probe"):
                    if verb == "load":
                        client.recv(min(number, commands.MAX_LOAD))
                    commands.acknowledge(client)
            case "setup":
                self._wait(timeouts.prepare)
                session.setup()
                commands.acknowledge(client)
            case "prepare":
                _check_count(number)
                if not isinstance(session, KeepingSession):
                    raise RefusedError(
                        f"the backend {self._settings.backend_name!r} keeps no material"
                    )
                self._wait(timeouts.prepare)
                with meter.in_phase("offline"):
                    session.prepare(number)
                    commands.acknowledge(client)
            case "offline":
                _check_count(number)
                self._wait(timeouts.prepare)
                meter.move_last("offline", self._laid)
                with meter.in_phase("offline", self._laid):
                    session.offline(number)
                    commands.acknowledge(client)
                self._laid += number
            case "online":
                if number != self._used or self._used >= self._laid:
                    raise ProtocolError(
                        f"the client asked for inference {number}; {self._used} are done, "
                        f"there is material for {self._laid}"
                    )
                self._used += 1
                self._wait(timeouts.step)
                meter.move_last("online", number)
                with meter.in_phase("online", number):
                    session.online()

    def _wait(self, seconds: float) -> None:
        for channel in self._channels:
            channel.timeout = seconds


def _check_count(number: int) -> None:
    if not 1 <= number <= commands.MAX_OFFLINE:
        raise ProtocolError(f"the client asked for material of {number} inferences")
