"""``pi-party dealer``: hand out correlated randomness."""

from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command()
@click.option(
    "--listen", required=True, metavar="HOST:PORT", help="Where both connect; port 0: any free."
)
@click.option(
    "--quota", type=click.IntRange(1), metavar="N",
    help="fss: material of at most N inferences within an hour for one client (known by its "
    "certificate or else its address), over all its sessions; any number by default.",
)  # fmt: skip
@click.option(
    "--ahead", type=click.IntRange(0, 64), default=2, show_default=True, metavar="N",
    help="fss: make the material of up to N inferences of a session before it is asked for, where "
    "the client announces them.",
)  # fmt: skip
@options.serving
@options.party
@options.secure
def dealer(
    listen: str,
    quota: int | None,
    ahead: int,
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
    """Hand out correlated randomness to pairs of a server and a client.

    Prints one JSON line with host and port when ready.

    \b
    Example:
      pi-party dealer --listen 10.0.0.9:7001 --certs certs
    """
    options.prepare(threads, exit_with_parent)
    if quota is not None and backend == "crypten":
        raise click.UsageError("The crypten backend's dealer counts no inferences: no --quota.")
    with options.listener(listen) as listener:
        identity = options.identity("dealer", certs, insecure, listener.host)
        from ...backends import base
        from ...net.link import parse
        from ...parties import dealer as party
        from ...parties.serving import ServingSettings

        settings = ServingSettings(
            backend=base.get(backend),
            backend_name=backend,
            device=device,
            threads=threads,
            timeouts=options.timeouts(timeout, prepare_timeout, idle_timeout),
            link=parse(network),
            log_frames=stats is not None,
            limits=options.limits(sessions, queue, per_client, timeout),
            drain=drain,
            quota=quota,
            ahead=ahead,
            identity=identity,
        )
        serving = party.Dealer(listener, settings, options.journal("dealer", log, once))
        if not once:
            options.serve(serving.host(), listener, metrics, settings.backend)
            return
        options.ready(listener)
        options.write_stats(stats, "dealer", serving.serve_once().to_json())
