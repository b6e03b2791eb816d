"""``pi-party``: the server, the client and the dealer of a private classification."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ..backends import DEFAULT
from . import common

if TYPE_CHECKING:
    from rich.console import Console

    from ..net.channel import Listener
    from ..parties.timeouts import Timeouts

F = TypeVar("F", bound=Callable[..., Any])


@click.group(epilog=common.EXIT_CODES)
def cli() -> None:
    """Classify images privately: the server keeps its model, the client its images.

    A third party, the dealer, hands out correlated randomness; it sees neither, and must not
    collude with either.

    \b
    Links between the parties are NOT ENCRYPTED yet (TLS is to come): an eavesdropper on them
    breaks the protocol. Use loopback or a network you trust.

    \b
    On two hosts (the dealer on the server's, for a trial only):
      server$  pi-party dealer --listen 10.0.0.5:7001
      server$  pi-party server --model demo --listen 10.0.0.5:7000 --dealer 10.0.0.5:7001
      client$  pi-party client --server 10.0.0.5:7000 --dealer 10.0.0.5:7001 --images x.npy
    """


def _party_options(function: F) -> F:
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
            "--timeout",
            type=click.FloatRange(min=0.1),
            default=8.0,
            show_default=True,
            help="Seconds a peer may be silent in the handshake and the online phase.",
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
    ):
        function = option(function)
    return function


def _store_option(function: F) -> F:
    return click.option(
        "--store",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="Keep one-time material here, for later sessions; never copy or restore it.",
    )(function)


def _serving_options(function: F) -> F:
    for option in (
        click.option(
            "--stats",
            metavar="FILE",
            help="With --once: write what was sent and received as JSON ('-' for stdout).",
        ),
        click.option("--once", is_flag=True, help="End after one session, with its exit code."),
        click.option(
            "--device", default="cpu", show_default=True, help="Torch device of the linear layers."
        ),
    ):
        function = option(function)
    return function


@cli.command()
@click.option("--model", required=True, help="demo, demo-teacher, random:ARCH@RELUS or a path.")
@click.option(
    "--listen", required=True, metavar="HOST:PORT", help="Where clients connect; port 0: any free."
)
@click.option("--dealer", required=True, metavar="HOST:PORT", help="Where the dealer listens.")
@common.plan_option
@_store_option
@click.option(
    "--store-limit", type=click.IntRange(1), metavar="N",
    help="With --store: inferences whose material one client may keep here (256).",
)  # fmt: skip
@_serving_options
@_party_options
def server(
    model: str,
    listen: str,
    dealer: str,
    plan: str,
    store: Path | None,
    store_limit: int | None,
    once: bool,
    stats: str | None,
    backend: str,
    device: str,
    threads: int,
    timeout: float,
    prepare_timeout: float,
    network: str,
    exit_with_parent: bool,
) -> None:
    """Own the model and serve clients, one session after another.

    Prints one JSON line with host and port when ready. Links are not encrypted yet.

    \b
    Example:
      pi-party server --model demo --listen 127.0.0.1:7000 --dealer 127.0.0.1:7001
    """
    _prepare(threads, exit_with_parent)
    from ..net.link import parse
    from ..parties.address import parse_address

    dealer_at = parse_address(dealer)
    with _listener(listen) as listener:
        from ..backends import base
        from ..models import resolve
        from ..parties import server as party

        implementation = base.get(backend)
        if store is not None:
            base.open_store(implementation, store, "server", store_limit)
        graph = resolve(model)
        settings = party.ServerSettings(
            model=graph,
            sha256=graph.sha256(),
            dealer=dealer_at,
            plan=plan,
            keeps=store is not None,
            backend=implementation,
            backend_name=backend,
            device=device,
            threads=threads,
            timeouts=_timeouts(timeout, prepare_timeout),
            link=parse(network),
            log_frames=stats is not None,
        )
        _ready(listener)
        if not once:
            party.serve_forever(listener, settings, _log)
        meter = party.serve_once(listener, settings)
        _write_stats(stats, "server", meter.to_json())


@cli.command()
@click.option(
    "--listen", required=True, metavar="HOST:PORT", help="Where both connect; port 0: any free."
)
@_serving_options
@_party_options
def dealer(
    listen: str,
    once: bool,
    stats: str | None,
    backend: str,
    device: str,
    threads: int,
    timeout: float,
    prepare_timeout: float,
    network: str,
    exit_with_parent: bool,
) -> None:
    """Hand out correlated randomness to pairs of a server and a client.

    Prints one JSON line with host and port when ready. Links are not encrypted yet.

    \b
    Example:
      pi-party dealer --listen 127.0.0.1:7001
    """
    _prepare(threads, exit_with_parent)
    with _listener(listen) as listener:
        from ..backends import base
        from ..net.link import parse
        from ..parties import dealer as party
        from ..parties.serving import ServingSettings

        settings = ServingSettings(
            backend=base.get(backend),
            backend_name=backend,
            device=device,
            threads=threads,
            timeouts=_timeouts(timeout, prepare_timeout),
            link=parse(network),
            log_frames=stats is not None,
        )
        serving = party.Dealer(listener, settings)
        _ready(listener)
        if not once:
            serving.serve_forever(_log)
        _write_stats(stats, "dealer", serving.serve_once().to_json())


@cli.command()
@click.option("--server", required=True, metavar="HOST:PORT", help="Where the server listens.")
@click.option(
    "--dealer", metavar="HOST:PORT",
    help="Where the dealer listens; without it only material in --store is used.",
)  # fmt: skip
@click.option(
    "--images",
    metavar="FILE.npy",
    help="(N, C, H, W): normalised float32, or raw uint8; '-' for stdin.",
)
@_store_option
@click.option(
    "--prepare", type=click.IntRange(1), metavar="N",
    help="Instead of classifying, lay in --store the material of N inferences.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Images per inference.",
)  # fmt: skip
@click.option(
    "--repeat", type=click.IntRange(1), default=1, show_default=True,
    help="Run at least so many inferences.",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(0), default=0, show_default=True,
    help="Inferences before these that are not reported.",
)  # fmt: skip
@_party_options
@common.output_options
def client(
    server: str,
    dealer: str | None,
    images: str | None,
    store: Path | None,
    prepare: int | None,
    batch: int,
    repeat: int,
    warmup: int,
    backend: str,
    threads: int,
    timeout: float,
    prepare_timeout: float,
    network: str,
    exit_with_parent: bool,
    format_: str,
    output: Path | None,
) -> None:
    """Classify images with a server's model without showing them to it.

    Prints the predictions; --format json adds times and every message's size. Links are not
    encrypted yet.

    \b
    Example:
      pi-party client --server 127.0.0.1:7000 --dealer 127.0.0.1:7001 --images images.npy

    \b
    Dealing first, and classifying later without the dealer (the server has a --store too):
      pi-party client --server 127.0.0.1:7000 --dealer 127.0.0.1:7001 --store stock --prepare 8
      pi-party client --server 127.0.0.1:7000 --store stock --images images.npy
    """
    _prepare(threads, False)
    common.check_output(output)
    if (images is None) == (prepare is None):
        raise click.UsageError("Give either --images or --prepare.")
    if store is None and (dealer is None or prepare is not None):
        missing = "Without --dealer" if dealer is None else "With --prepare"
        raise click.UsageError(f"{missing}, give the --store of the material.")
    if dealer is None and prepare is not None:
        raise click.UsageError("With --prepare, give the --dealer that makes the material.")
    from ..backends import base
    from ..net.link import parse
    from ..parties import classify as session
    from ..parties.address import parse_address
    from ..parties.client import ClientSettings

    implementation = base.get(backend)
    if store is not None:
        base.open_store(implementation, store, "client")
    settings = ClientSettings(
        server=parse_address(server),
        dealer=None if dealer is None else parse_address(dealer),
        backend=implementation,
        backend_name=backend,
        batch=batch,
        threads=threads,
        timeouts=_timeouts(timeout, prepare_timeout),
        link=parse(network),
    )
    if images is None:
        if exit_with_parent:
            _exit_with_parent()
        _emit_stock(session.prepare(settings, prepare or 0), format_, output)
        return
    array = _images(images)
    if exit_with_parent:
        _exit_with_parent()
    progress = _progress_lines() if exit_with_parent else lambda done, total: None
    report = session.classify(settings, array, repeat=repeat, warmup=warmup, progress=progress)
    value = report.to_json()
    rows = _predictions(value)
    if exit_with_parent:
        sys.stdout.write(json.dumps(value) + "\n")  # one line, for the launcher
        return
    common.emit(
        value,
        format_=format_,
        output=output,
        table=lambda console: _print_predictions(console, rows),
        rows=lambda: rows,
    )


def main() -> NoReturn:
    """Entry point of ``pi-party``."""
    sys.exit(common.run(cli))


def _prepare(threads: int, exit_with_parent: bool) -> None:
    import os

    from ..parties.process import thread_environment

    os.environ.update(thread_environment(threads))
    if exit_with_parent:
        _exit_with_parent()


def _exit_with_parent() -> None:
    from ..parties.process import exit_with_parent

    exit_with_parent()


def _timeouts(step: float, prepare: float) -> Timeouts:
    from ..parties.timeouts import Timeouts

    return Timeouts(step=step, prepare=prepare)


def _listener(text: str) -> Listener:
    from ..net.channel import Listener
    from ..parties.address import parse_address

    if text.startswith("fd:") and text[3:].isdigit():
        return Listener.adopt(int(text[3:]))
    return Listener(*parse_address(text))


def _ready(listener: Listener) -> None:
    print(json.dumps({"ready": True, "host": listener.host, "port": listener.port}), flush=True)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress_lines() -> Callable[[int, int], None]:
    """Says about once a second how far things are, in lines for the launcher."""
    import time

    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > 1:
            said = time.monotonic()
            print(json.dumps({"done": done, "total": total}), flush=True)

    return progress


def _write_stats(stats: str | None, role: str, meter: dict[str, Any]) -> None:
    from ..errors import UsageError
    from ..parties.process import peak_memory

    if stats is None:
        return
    text = json.dumps({"role": role, "meter": meter, "peak_memory": peak_memory()}) + "\n"
    if stats == "-":
        sys.stdout.write(text)
        return
    try:
        Path(stats).write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {stats}: {error.strerror}") from error


def _images(path: str) -> Any:
    from ..errors import UsageError
    from ..parties.images import read_images

    if path == "-":
        return read_images(sys.stdin.buffer, name="standard input")
    try:
        with open(path, "rb") as file:
            return read_images(file, name=path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _predictions(report: dict[str, Any]) -> list[dict[str, Any]]:
    classes = report["metadata"].get("classes")
    rows: dict[int, dict[str, Any]] = {}
    for inference in report["inferences"]:
        for image, logits in zip(inference["images"], inference["logits"], strict=True):
            best = max(range(len(logits)), key=logits.__getitem__)
            known = isinstance(classes, list) and len(classes) == len(logits)
            rows.setdefault(
                image,
                {
                    "image": image,
                    "class": best,
                    "name": str(classes[best]) if known else "",
                    "logit": round(logits[best], 4),
                    "milliseconds": round(1000 * inference["online_seconds"], 3),
                },
            )
    return [rows[image] for image in sorted(rows)]


def _emit_stock(stock: int, format_: str, output: Path | None) -> None:
    common.emit(
        {"stock": stock},
        format_=format_,
        output=output,
        table=lambda console: console.print(f"material for {stock} inferences is in stock"),
        rows=lambda: [{"stock": stock}],
    )


def _print_predictions(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="Private predictions")
    for column in ("image", "class", "name", "logit", "online ms"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
