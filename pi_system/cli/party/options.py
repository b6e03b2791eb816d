"""Options and manners that the commands of ``pi-party`` share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from ...backends import DEFAULT

if TYPE_CHECKING:
    from ...backends.base import Backend
    from ...net.listen import Listener
    from ...net.tls import Identity
    from ...parties.address import Address
    from ...parties.journal import Format, Journal
    from ...parties.serving import Host
    from ...parties.timeouts import Timeouts

F = TypeVar("F", bound=Callable[..., Any])

CERTS_VARIABLE = "PI_PARTY_CERTS"


def _configure(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take the options of a file as this command's defaults."""
    if path is None:
        return
    from ...config import read_toml
    from ...errors import UsageError

    names = {
        name.removeprefix("--"): option.name
        for option in context.command.params
        for name in option.opts
        if name.startswith("--") and option is not parameter
    }
    values = {}
    for name, value in read_toml(path).items():
        if name not in names:
            known = ", ".join(sorted(names))
            raise UsageError(f"{path}: unknown key {name!r}; known keys are {known}")
        if not isinstance(value, str | int | float | bool):
            raise UsageError(f"{path}: {name}: expected a text, a number, true or false")
        values[names[name]] = value
    context.default_map = {**(context.default_map or {}), **values}


def party(function: F) -> F:
    """What every party takes."""
    for option in (
        click.option(
            "--exit-with-parent",
            is_flag=True,
            help="End when standard input closes (used by launchers).",
        ),
        click.option(
            "--prepare-timeout",
            type=click.FloatRange(min=0.1),
            default=120.0,
            show_default=True,
            help="The same for setup and offline, where a peer may compute for long.",
        ),
        click.option(
            "--lost-after",
            type=click.FloatRange(min=3.0),
            default=8.0,
            show_default=True,
            help="Seconds without a sign of life of a session's peer, which gives one every 2 s.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0.1),
            default=8.0,
            show_default=True,
            help="Seconds to wait for a peer's message in the handshake and the online phase.",
        ),
        click.option(
            "--network",
            default="loopback",
            show_default=True,
            metavar="NAME",
            help="Emulate lan, wan or RTT:MBPS[:LOSS] (ms, Mbit/s, fraction); the same on all "
            "three sides.",
        ),
        click.option(
            "--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Threads."
        ),
        click.option(
            "--backend",
            default=DEFAULT,
            show_default=True,
            help="Backend; the same on all three sides.",
        ),
        click.option(
            "--config",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE.toml",
            is_eager=True,
            expose_value=False,
            callback=_configure,
            help="Options in TOML, one 'name = value' each, named as here without '--'. The "
            "command line and the environment (PI_PARTY_COMMAND_OPTION, as in "
            "PI_PARTY_SERVER_SESSIONS=4) overrule it, in this order.",
        ),
    ):
        function = option(function)
    return function


def secure(function: F) -> F:
    """How links are protected: ``--certs`` or ``--insecure``; see :func:`identity`."""
    for option in (
        click.option(
            "--insecure",
            is_flag=True,
            help="No encryption and no identities; only between parties on this machine.",
        ),
        click.option(
            "--certs",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            envvar=CERTS_VARIABLE,
            help=f"Certificates of this deployment, see pi-party certs; or ${CERTS_VARIABLE}.",
        ),
    ):
        function = option(function)
    return function


def identity(role: str, certs: Path | None, insecure: bool, *hosts: str) -> Identity | None:
    """Whom this party speaks for, or ``None`` for plaintext.

    ``--insecure`` overrules the environment's directory of certificates.

    Args:
        hosts: where this party listens and connects to.

    Raises:
        UsageError: neither or both are given, a file is missing, or plaintext would leave this
            machine.
    """
    from ...errors import UsageError
    from ...net.tls import Identity, require_loopback

    if insecure:
        context = click.get_current_context()
        if context.get_parameter_source("certs") is click.core.ParameterSource.COMMANDLINE:
            raise UsageError("give --certs or --insecure, not both")
        for host in hosts:
            require_loopback(host)
        return None
    if certs is None:
        raise UsageError(
            "give --certs DIR (pi-party certs makes them) or, where all parties are on this "
            "machine, --insecure"
        )
    identity = Identity.of(certs, role)
    identity.check()
    return identity


def store(function: F) -> F:
    """``--store``, of the parties that keep material."""
    return click.option(
        "--store",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="Keep one-time material here, for later sessions; never copy or restore it.",
    )(function)


def serving(function: F) -> F:
    """What the listening roles take."""
    for option in (
        click.option(
            "--stats",
            metavar="FILE",
            help="With --once: write what was sent and received as JSON ('-' for stdout).",
        ),
        click.option("--once", is_flag=True, help="End after one session, with its exit code."),
        click.option(
            "--log",
            type=click.Choice(["json", "text", "none"]),
            help="What happens, one line each on stderr: JSON objects (the default; with --once "
            "none) or words.",
        ),
        click.option(
            "--idle-timeout",
            type=click.FloatRange(min=0.1),
            default=600.0,
            show_default=True,
            help="Seconds to wait for a client's next request, while it gives signs of life.",
        ),
        click.option(
            "--metrics",
            metavar="[HOST:]PORT",
            help="Serve /metrics (Prometheus), /healthz and /status there, over plain HTTP; "
            "without a host on loopback.",
        ),
        click.option(
            "--drain",
            type=click.FloatRange(min=0.0),
            default=30.0,
            show_default=True,
            help="Seconds for running requests to end after SIGTERM or Ctrl-C; a second signal "
            "ends at once.",
        ),
        click.option(
            "--per-client",
            type=click.IntRange(1),
            default=4,
            show_default=True,
            help="Sessions of one client, known by its certificate or else its address.",
        ),
        click.option(
            "--queue",
            type=click.IntRange(0),
            default=16,
            show_default=True,
            help="Sessions that wait for a place, for up to 0.3 of --timeout; more are told to "
            "come later.",
        ),
        click.option(
            "--sessions",
            type=click.IntRange(1),
            default=8,
            show_default=True,
            help="Sessions at once.",
        ),
        click.option(
            "--device", default="cpu", show_default=True, help="Torch device of the linear layers."
        ),
    ):
        function = option(function)
    return function


@dataclass(frozen=True)
class Serving:
    """What :func:`serving`, :func:`party` and :func:`secure` gave a listening role."""

    once: bool
    stats: str | None
    sessions: int
    queue: int
    per_client: int
    drain: float
    idle_timeout: float
    metrics: str | None
    log: str | None
    backend: str
    device: str
    threads: int
    timeout: float
    prepare_timeout: float
    lost_after: float
    network: str
    exit_with_parent: bool
    certs: Path | None
    insecure: bool

    def settings(self, identity: Identity | None, backend: Backend) -> dict[str, Any]:
        """Arguments of :class:`~pi_system.parties.serving.ServingSettings`."""
        from ...net.link import parse
        from ...parties.admission import Limits

        return {
            "backend": backend,
            "backend_name": self.backend,
            "device": self.device,
            "threads": self.threads,
            "timeouts": timeouts(
                self.timeout, self.prepare_timeout, self.lost_after, self.idle_timeout
            ),
            "link": parse(self.network),
            "log_frames": self.stats is not None,
            "limits": Limits(
                self.sessions, self.queue, self.per_client, patience=0.3 * self.timeout
            ),
            "drain": self.drain,
            "identity": identity,
        }


def prepare(threads: int, exit_with_parent: bool) -> None:
    """Before numpy and torch are imported: threads, and the watch on the launcher."""
    from ...parties.process import thread_environment

    os.environ.update(thread_environment(threads))
    if exit_with_parent:
        watch_parent()


def watch_parent() -> None:
    """End this process when its standard input closes."""
    from ...parties.process import exit_with_parent

    exit_with_parent()


def timeouts(step: float, prepare: float, life: float, idle: float = 600.0) -> Timeouts:
    """The patience asked for."""
    from ...parties.timeouts import Timeouts

    return Timeouts(step=step, prepare=prepare, idle=idle, life=life)


def listener(text: str) -> Listener:
    """Listen on HOST:PORT, or on a launcher's socket (``fd:N``)."""
    from ...net.listen import Listener
    from ...parties.address import parse_address

    if text.startswith("fd:") and text[3:].isdigit():
        return Listener.adopt(int(text[3:]))
    return Listener(*parse_address(text))


def ready(listener: Listener, **more: str) -> None:
    """Tell a launcher, or a person, where this party listens."""
    print(
        json.dumps({"ready": True, "host": listener.host, "port": listener.port, **more}),
        flush=True,
    )


def journal(role: str, format_: str | None, once: bool) -> Journal:
    """What a listening party says on stderr."""
    from ...parties.journal import Journal, printer

    made = Journal(role)
    chosen = cast("Format", format_ or ("none" if once else "json"))
    if chosen != "none":
        made.add(printer(chosen))
        made.take_warnings()
    return made


def serve(host: Host, listener: Listener, metrics: str | None, backend: Backend) -> None:
    """Say so and serve until SIGTERM or Ctrl-C; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if host.stopping:
            os._exit(128 + number)
        host.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with contextlib.ExitStack() as stack:
        more = {}
        if metrics is not None:
            more["metrics"] = str(stack.enter_context(_observed(host, metrics, backend)))
        ready(listener, **more)
        host.journal.write("listening", listen=f"{listener.host}:{listener.port}")
        host.serve_forever()


@contextlib.contextmanager
def _observed(host: Host, at: str, backend: Backend) -> Iterator[Address]:
    """Count what happens and show it to those who ask at ``at``; yields that address."""
    from ...backends.base import Stocked
    from ...parties import metrics
    from ...parties.address import Address, parse_address
    from ...parties.tally import Tally

    stock = backend.stock if isinstance(backend, Stocked) else lambda: None
    tally = Tally(host.journal.role, host.admission, stock)
    counters = metrics.Metrics(tally)
    host.journal.add(tally.read)
    host.journal.add(counters.read)
    address = Address("127.0.0.1", int(at)) if at.isdecimal() else parse_address(at)
    with metrics.serving(address, tally, counters) as found:
        yield found


def write_stats(stats: str | None, role: str, meter: dict[str, Any]) -> None:
    """What was sent and received, where ``--stats`` says."""
    from ...parties.process import peak_memory
    from .. import common

    if stats is None:
        return
    text = json.dumps({"role": role, "meter": meter, "peak_memory": peak_memory()}) + "\n"
    common.write(text, None if stats == "-" else Path(stats))
