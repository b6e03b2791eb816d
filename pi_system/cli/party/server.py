"""``pi-party server``: own the model."""

from __future__ import annotations

from pathlib import Path

import click

from .. import common
from . import options


@click.command()
@click.option("--model", required=True, help="demo, demo-teacher, random:ARCH@RELUS or a path.")
@click.option(
    "--listen", required=True, metavar="HOST:PORT", help="Where clients connect; port 0: any free."
)
@click.option("--dealer", required=True, metavar="HOST:PORT", help="Where the dealer listens.")
@common.plan_option
@options.store
@click.option(
    "--store-limit", type=click.IntRange(1), metavar="N",
    help="With --store: inferences whose material one client may keep here (256).",
)  # fmt: skip
@options.serving
@options.party
@options.secure
def server(
    model: str,
    listen: str,
    dealer: str,
    plan: str,
    store: Path | None,
    store_limit: int | None,
    once: bool,
    stats: str | None,
    sessions: int,
    queue: int,
    per_client: int,
    drain: float,
    idle_timeout: float,
    metrics: str | None,
    log: str | None,
    backend: str,
    device: str,
    threads: int,
    timeout: float,
    prepare_timeout: float,
    network: str,
    exit_with_parent: bool,
    certs: Path | None,
    insecure: bool,
) -> None:
    """Own the model and serve clients, several at once.

    Prints one JSON line with host and port when ready.

    \b
    Example:
      pi-party server --model demo --listen 10.0.0.5:7000 --dealer 10.0.0.9:7001 --certs certs
    """
    options.prepare(threads, exit_with_parent)
    from ...net.link import parse
    from ...parties.address import parse_address

    dealer_at = parse_address(dealer)
    with options.listener(listen) as listener:
        identity = options.identity("server", certs, insecure, listener.host, dealer_at.host)
        from ...backends import base
        from ...models import resolve
        from ...parties import server as party

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
            timeouts=options.timeouts(timeout, prepare_timeout, idle_timeout),
            link=parse(network),
            log_frames=stats is not None,
            limits=options.limits(sessions, queue, per_client, timeout),
            drain=drain,
            identity=identity,
        )
        journal = options.journal("server", log, once)
        if not once:
            options.serve(
                party.host(listener, settings, journal), listener, metrics, implementation
            )
            return
        options.ready(listener)
        meter = party.serve_once(listener, settings, journal)
        options.write_stats(stats, "server", meter.to_json())
