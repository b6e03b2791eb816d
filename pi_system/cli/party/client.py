"""``pi-party client``: classify images of your own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import common
from . import options

if TYPE_CHECKING:
    from rich.console import Console


def _sha256(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
        raise click.BadParameter("64 hexadecimal digits in lower case are a SHA-256")
    return value


@click.command()
@click.option("--server", required=True, metavar="HOST:PORT", help="Where the server listens.")
@click.option(
    "--dealer", metavar="HOST:PORT[,...]",
    help="Where the dealer listens; of several, in the server's order, one that answers is taken. "
    "Without it only material in --store is used.",
)  # fmt: skip
@click.option(
    "--images",
    metavar="FILE.npy",
    help="(N, C, H, W): normalised float32, or raw uint8; '-' for stdin.",
)
@click.option(
    "--expect-model", metavar="SHA256", callback=_sha256,
    help="Refuse a server whose model has another hash.",
)  # fmt: skip
@options.store
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
@click.option(
    "--ahead", type=click.IntRange(0, 64), default=1, show_default=True, metavar="N",
    help="fss: let the dealer make the material of the next N inferences while one runs.",
)  # fmt: skip
@options.party
@options.secure
@common.output_options
def client(
    server: str,
    dealer: str | None,
    images: str | None,
    expect_model: str | None,
    store: Path | None,
    prepare: int | None,
    batch: int,
    repeat: int,
    warmup: int,
    ahead: int,
    backend: str,
    threads: int,
    timeout: float,
    prepare_timeout: float,
    lost_after: float,
    network: str,
    exit_with_parent: bool,
    certs: Path | None,
    insecure: bool,
    format_: str,
    output: Path | None,
) -> None:
    """Classify images with a server's model without showing them to it.

    Prints the predictions; --format json adds times and every message's size.

    \b
    Example:
      pi-party client --server 10.0.0.5:7000 --dealer 10.0.0.9:7001 --certs certs --images x.npy

    \b
    Dealing first, and classifying later without the dealer (the server has a --store too):
      export PI_PARTY_CERTS=certs
      pi-party client --server 10.0.0.5:7000 --dealer 10.0.0.9:7001 --store stock --prepare 8
      pi-party client --server 10.0.0.5:7000 --store stock --images x.npy
    """
    options.prepare(threads, False)
    common.check_output(output)
    if (images is None) == (prepare is None):
        raise click.UsageError("Give either --images or --prepare.")
    if store is None and (dealer is None or prepare is not None):
        missing = "Without --dealer" if dealer is None else "With --prepare"
        raise click.UsageError(f"{missing}, give the --store of the material.")
    if dealer is None and prepare is not None:
        raise click.UsageError("With --prepare, give the --dealer that makes the material.")
    from ...backends import base
    from ...net.link import parse
    from ...parties import classify as session
    from ...parties.address import parse_address, parse_addresses
    from ...parties.client import ClientSettings

    server_at = parse_address(server)
    dealers = () if dealer is None else parse_addresses(dealer)
    hosts = [at.host for at in (server_at, *dealers)]
    identity = options.identity("client", certs, insecure, *hosts)
    implementation = base.get(backend)
    if store is not None:
        base.open_store(implementation, store, "client")
    settings = ClientSettings(
        server=server_at,
        dealers=dealers,
        backend=implementation,
        backend_name=backend,
        batch=batch,
        threads=threads,
        timeouts=options.timeouts(timeout, prepare_timeout, lost_after),
        link=parse(network),
        identity=identity,
        expect_model=expect_model,
        ahead=ahead,
    )
    if images is None:
        if exit_with_parent:
            options.watch_parent()
        _emit_stock(session.prepare(settings, prepare or 0), format_, output)
        return
    array = _images(images)
    if exit_with_parent:
        options.watch_parent()
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


def _images(path: str) -> Any:
    from ...errors import UsageError
    from ...parties.images import read_images

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
