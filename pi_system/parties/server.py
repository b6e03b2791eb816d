"""The server: owns the model, serves one client's session after another, sees no image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from ..backends.base import KeepingSession, Options
from ..errors import PiError, ProtocolError, RefusedError
from ..graph.ir import Graph
from ..net.channel import Channel, Listener, PeerClosed, connect
from ..net.meter import Meter
from . import commands, handshake, serving
from .address import Address
from .public import send_public
from .serving import ServingSettings


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ServingSettings):
    """How a server serves.

    Attributes:
        model: with its weights.
        sha256: the model's hash.
        dealer: where the dealer listens.
        plan: the precision to serve at, for a backend that has several.
        keeps: whether the backend has a store, so that sessions without a dealer are possible.
    """

    model: Graph
    sha256: str
    dealer: Address
    plan: str = "default"
    keeps: bool = False


def serve_forever(
    listener: Listener, settings: ServerSettings, report: Callable[[str], None]
) -> NoReturn:
    """Serve sessions one after another; a failed one is reported in one line."""
    serving.serve_forever(lambda: serve_once(listener, settings), report)


def serve_once(listener: Listener, settings: ServerSettings) -> Meter:
    """Wait for a client and serve its session; returns what was sent and received.

    Raises:
        PiError: the session failed; the client and dealer have been told why.
    """
    meter = Meter(log=settings.log_frames)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            listener.accept(
                peer="client",
                meter=meter,
                timeout=settings.timeouts.hello,
                link=settings.link,
                identity=settings.identity,
                roles=("client",),
            )
        )
        channels = [client]
        try:
            _session(client, channels, stack, settings, meter)
        except PiError as error:
            for channel in channels:
                channel.abort(error)
            raise
        except Exception:
            for channel in channels:
                channel.abort(PiError("an internal error"))
            raise
    return meter


def _session(
    client: Channel,
    channels: list[Channel],
    stack: contextlib.ExitStack,
    settings: ServerSettings,
    meter: Meter,
) -> None:
    timeouts = settings.timeouts
    hello = handshake.receive(client, roles=("client",), backend=settings.backend_name)
    client.timeout = timeouts.step
    mine = hello.answer("server", settings.backend_name)
    dealer = None
    if hello.dealer:
        dealer = stack.enter_context(
            connect(
                *settings.dealer,
                # Less than the client's patience, so that the client hears the reason.
                retry_for=0.6 * timeouts.step,
                timeout=timeouts.step,
                peer="dealer",
                meter=meter,
                link=settings.link,
                identity=settings.identity,
            )
        )
        channels.append(dealer)
        handshake.greet(dealer, mine, role="dealer")
    elif not settings.keeps:
        raise RefusedError(
            "a session without a dealer needs a server that keeps material (--store)"
        )
    handshake.say(client, mine)
    send_public(client, settings.model, settings.sha256)
    options = Options(
        batch=hello.batch,
        threads=settings.threads,
        device=settings.device,
        plan=settings.plan,
    )
    session = settings.backend.server(settings.model, client, dealer, options)

    def wait(seconds: float) -> None:
        for channel in channels:
            channel.timeout = seconds

    ready = False
    laid = used = 0
    while True:
        client.timeout = timeouts.idle
        try:
            verb, number = commands.receive(client)
        except PeerClosed:
            return
        if (verb == "setup" and ready) or (verb in ("prepare", "offline", "online") and not ready):
            raise ProtocolError(f"the client asked for {verb} at the wrong time")
        match verb:
            case "close":
                return
            case "ping" | "load":
                meter.move_last("probe")
                with meter.in_phase("probe"):
                    if verb == "load":
                        client.recv(min(number, commands.MAX_LOAD))
                    commands.acknowledge(client)
            case "setup":
                wait(timeouts.prepare)
                session.setup()
                commands.acknowledge(client)
                ready = True
            case "prepare":
                _check_count(number)
                if not isinstance(session, KeepingSession):
                    raise RefusedError(f"the backend {settings.backend_name!r} keeps no material")
                wait(timeouts.prepare)
                with meter.in_phase("offline"):
                    session.prepare(number)
                    commands.acknowledge(client)
            case "offline":
                _check_count(number)
                wait(timeouts.prepare)
                meter.move_last("offline", laid)
                with meter.in_phase("offline", laid):
                    session.offline(number)
                    commands.acknowledge(client)
                laid += number
            case "online":
                if number != used or used >= laid:
                    raise ProtocolError(
                        f"the client asked for inference {number}; {used} are done, "
                        f"there is material for {laid}"
                    )
                used += 1
                wait(timeouts.step)
                meter.move_last("online", number)
                with meter.in_phase("online", number):
                    session.online()


def _check_count(number: int) -> None:
    if not 1 <= number <= commands.MAX_OFFLINE:
        raise ProtocolError(f"the client asked for material of {number} inferences")
