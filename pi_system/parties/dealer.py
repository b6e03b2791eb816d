"""The dealer: pairs a server and a client by session and serves them until both have gone.

It holds neither weights nor images.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from functools import partial
from typing import Any, Final, NamedTuple

from ..backends.base import Options
from ..errors import BusyError, PeerTimeout, PiError, ProtocolError, RefusedError
from ..net.channel import Channel
from ..net.listen import Listener
from ..net.meter import Meter
from . import commands, handshake
from .admission import STOPPING
from .handshake import Hello
from .journal import Journal, milliseconds
from .quota import Quota
from .serving import Host, ServingSettings

_QUIET: Final = 1.0
"""Seconds of silence after which a session counts as idle when the dealer is stopped."""

_LONELY: Final = 2
"""Parties that wait for their peer, at most, for every session that may run or wait."""


class _Waiting(NamedTuple):
    channel: Channel
    hello: Hello
    since: float


class Dealer:
    """Serves sessions from a listening socket."""

    def __init__(
        self, listener: Listener, settings: ServingSettings, journal: Journal | None = None
    ) -> None:
        self._listener = listener
        self._settings = settings
        self._journal = journal or Journal("dealer")
        self._waiting: dict[str, _Waiting] = {}
        self._lock = threading.Lock()
        self._host: Host | None = None
        self._quota = Quota(settings.quota)

    def host(self) -> Host:
        """For many pairs at once; :meth:`Host.serve_forever` runs it."""

        def welcome(sock: socket.socket) -> Channel:
            return self._listener.welcome(sock, **self._settings.terms("party", "server", "client"))

        def tend() -> None:
            for late, error in self._late():
                self._refuse(late.channel, error, late.hello.session)

        self._host = Host(
            self._listener, self._settings, self._journal,
            welcome=welcome, serve=self._serve, tend=tend,
        )  # fmt: skip
        return self._host

    def serve_once(self) -> Meter:
        """Wait for a pair and serve it; returns what was sent and received.

        Raises:
            PiError: a party was refused, never came, or the session failed.
        """
        while True:
            for late, error in self._late():
                late.channel.abort(error)
                raise error
            try:
                channel = self._listener.accept(
                    wait=self._patience(), **self._settings.terms("party", "server", "client")
                )
            except PeerTimeout:
                continue
            try:
                pair = self._welcome(channel)
            except PiError as error:
                channel.abort(error)
                raise
            if pair is not None:
                return self._deal(*pair)

    def _serve(self, channel: Channel) -> None:
        assert self._host is not None
        try:
            pair = self._welcome(channel)
        except Exception as error:
            self._refuse(channel, error, None)
            return
        self._host.greeted()
        if pair is None:
            return
        first, second = pair
        client = first if first.hello.role == "client" else second
        channels = first.channel, second.channel
        with first.channel, second.channel:
            try:
                place = self._host.admission.place(client.channel.who)
                with place, self._host.running(*channels), contextlib.suppress(_Written):
                    self._deal(first, second)
            except PiError as error:
                for one in channels:
                    one.abort(error)
                self._journal.fail(
                    "refused", error, session=first.hello.session[:8], who=client.channel.who
                )

    def _refuse(self, channel: Channel, error: Exception, session: str | None) -> None:
        who = channel.who
        channel.abort(error if isinstance(error, PiError) else PiError("an internal error"))
        name = None if session is None else session[:8]
        self._journal.fail("refused", error, session=name, who=who)

    def _welcome(self, channel: Channel) -> tuple[_Waiting, _Waiting] | None:
        hello = handshake.receive(
            channel, roles=("server", "client"), backend=self._settings.backend_name
        )
        channel.peer = hello.role
        new = _Waiting(channel, hello, time.monotonic())
        with self._lock:
            other = self._waiting.get(hello.session)
            if other is None:
                limits = self._settings.limits
                if len(self._waiting) >= _LONELY * (limits.sessions + limits.queue):
                    raise BusyError(f"{len(self._waiting)} parties wait for their peers already")
                self._waiting[hello.session] = new
                return None
            if other.hello.role == hello.role:
                raise RefusedError(f"a second {hello.role} for one session")
            del self._waiting[hello.session]
        if other.hello.batch != hello.batch:
            error = RefusedError(
                f"batch {other.hello.batch} at the {other.hello.role}, "
                f"{hello.batch} at the {hello.role}"
            )
            other.channel.abort(error)
            raise error
        return other, new

    def _deal(self, first: _Waiting, second: _Waiting) -> Meter:
        """Serve a pair; what fails is told both and written down."""
        pair = {waiting.hello.role: waiting.channel for waiting in (first, second)}
        hello, settings = first.hello, self._settings
        meter = Meter(log=settings.log_frames)
        started = time.perf_counter()
        named = {"session": hello.session[:8], "who": pair["client"].who}
        self._journal.write("session", batch=hello.batch, **named)
        with (
            settings.timeouts.heartbeat() as heartbeat,
            pair["server"] as server,
            pair["client"] as client,
        ):
            try:
                for channel in (server, client):
                    meter.take_over(channel.meter, channel.peer)
                    channel.meter = meter
                    channel.timeout = settings.timeouts.idle
                    channel.while_silent = self._end_when_idle
                    handshake.say(channel, hello.answer("dealer", settings.backend_name))
                    heartbeat.keep(channel)
                options = Options(
                    hello.batch, settings.threads, settings.device, ahead=settings.ahead,
                    grant=partial(self._grant, named["session"], named["who"]),
                )  # fmt: skip
                settings.backend.dealer(server, client, options).run()
                for channel in (server, client):
                    channel.timeout = settings.timeouts.step
                    channel.await_end()
            except Exception as error:
                known = isinstance(error, PiError)
                for channel in (server, client):
                    channel.abort(error if known else PiError("an internal error"))
                self._journal.fail("failed", error, **named, **_summary(meter, started))
                if self._host is not None:
                    raise _Written from error
                raise
        self._journal.write("ended", **named, **_summary(meter, started))
        return meter

    def _grant(self, session: str, who: str, count: int) -> None:
        """Material of ``count`` inferences is asked for.

        Raises:
            BusyError: they are over the client's quota.
        """
        if not 1 <= count <= commands.MAX_OFFLINE:
            raise ProtocolError(f"the client asked for material of {count} inferences")
        self._quota.take(who, count)
        self._journal.write(
            "request", session=session, request=f"material {count}", phase="offline", count=count
        )

    def _end_when_idle(self, silent: float) -> None:
        if self._host is not None and silent > _QUIET:
            self._host.end_when_idle(silent)

    def _patience(self) -> float | None:
        if not self._waiting:
            return None
        oldest = min(waiting.since for waiting in self._waiting.values())
        return max(0.01, oldest + self._settings.timeouts.step - time.monotonic())

    def _late(self) -> list[tuple[_Waiting, PiError]]:
        """Take out those whose peer did not come in time, or will not any more."""
        now, step = time.monotonic(), self._settings.timeouts.step
        stopping = self._host is not None and self._host.stopping
        found: list[tuple[_Waiting, PiError]] = []
        with self._lock:
            for session, waiting in list(self._waiting.items()):
                if not stopping and now - waiting.since < step:
                    continue
                del self._waiting[session]
                missing = "server" if waiting.hello.role == "client" else "client"
                late = PeerTimeout(
                    f"the {missing} did not come within {step:g} s (does it know this dealer by "
                    "another place in its list?)"
                )
                found.append((waiting, BusyError(STOPPING) if stopping else late))
        return found


class _Written(Exception):
    """A session failed, and everybody knows."""


def _summary(meter: Meter, started: float) -> dict[str, Any]:
    sent, received = meter.moved()
    return {
        "ms": milliseconds(time.perf_counter() - started),
        "sent": sent,
        "received": received,
    }
