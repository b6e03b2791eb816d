"""The dealer: pairs a server and a client by session and serves them until both have gone.

It holds neither weights nor images. One session at a time; others wait their turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from ..backends.base import Options
from ..errors import PeerTimeout, PiError, RefusedError
from ..net.channel import Channel, Listener
from ..net.meter import Meter
from . import handshake, serving
from .handshake import Hello
from .serving import ServingSettings


class _Waiting(NamedTuple):
    channel: Channel
    hello: Hello
    since: float


class Dealer:
    """Serves sessions from a listening socket."""

    def __init__(self, listener: Listener, settings: ServingSettings) -> None:
        self._listener = listener
        self._settings = settings
        self._waiting: dict[str, _Waiting] = {}

    def serve_forever(self, report: Callable[[str], None]) -> NoReturn:
        """Serve sessions one after another; a failed one is reported in one line."""
        serving.serve_forever(self.serve_once, report)

    def serve_once(self) -> Meter:
        """Wait for a pair and serve it; returns what was sent and received.

        Raises:
            PiError: a party was refused, never came, or the session failed.
        """
        first, second = self._pair()
        pair = {waiting.hello.role: waiting.channel for waiting in (first, second)}
        hello = first.hello
        settings = self._settings
        meter = Meter(log=settings.log_frames)
        with pair["server"] as server, pair["client"] as client:
            try:
                for channel in (server, client):
                    for event in channel.meter.events:
                        meter.frame(channel.peer, event.direction, event.bytes)
                    channel.meter = meter
                    channel.timeout = settings.timeouts.idle
                    handshake.say(channel, hello.answer("dealer", settings.backend_name))
                options = Options(hello.batch, settings.threads, settings.device)
                settings.backend.dealer(server, client, options).run()
            except Exception as error:
                known = isinstance(error, PiError)
                for channel in (server, client):
                    channel.abort(error if known else PiError("an internal error"))
                raise
        return meter

    def _pair(self) -> tuple[_Waiting, _Waiting]:
        while True:
            self._drop_late()
            try:
                channel = self._listener.accept(
                    wait=self._patience(),
                    peer="party",
                    timeout=self._settings.timeouts.hello,
                    link=self._settings.link,
                    identity=self._settings.identity,
                    roles=("server", "client"),
                )
            except PeerTimeout:
                continue
            try:
                pair = self._welcome(channel)
            except PiError as error:
                channel.abort(error)
                raise
            if pair is not None:
                return pair

    def _welcome(self, channel: Channel) -> tuple[_Waiting, _Waiting] | None:
        hello = handshake.receive(
            channel, roles=("server", "client"), backend=self._settings.backend_name
        )
        channel.peer = hello.role
        new = _Waiting(channel, hello, time.monotonic())
        other = self._waiting.get(hello.session)
        if other is None:
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

    def _patience(self) -> float | None:
        if not self._waiting:
            return None
        oldest = min(waiting.since for waiting in self._waiting.values())
        return max(0.01, oldest + self._settings.timeouts.step - time.monotonic())

    def _drop_late(self) -> None:
        now = time.monotonic()
        for session, waiting in list(self._waiting.items()):
            if now - waiting.since >= self._settings.timeouts.step:
                del self._waiting[session]
                missing = "server" if waiting.hello.role == "client" else "client"
                error = PeerTimeout(
                    f"the {missing} did not come within {self._settings.timeouts.step:g} s"
                )
                waiting.channel.abort(error)
                raise error
