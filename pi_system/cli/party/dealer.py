"""``pi-party dealer``: hand out correlated randomness."""

from __future__ import annotations

from typing import Any

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
    **shared: Any,
) -> None:
    """Hand out correlated randomness to pairs of a server and a client.

    Prints one JSON line with host and port when ready.

    \b
    Example:
      pi-party dealer --listen 10.0.0.9:7001 --certs certs
    """
    given = options.Serving(**shared)
    options.prepare(given.threads, given.exit_with_parent)
    if quota is not None and given.backend == "crypten":
        raise click.UsageError("The crypten backend's dealer counts no inferences: no --quota.")
    with options.listener(listen) as listener:
        identity = options.identity("dealer", given.certs, given.insecure, listener.host)
        from ...backends import base
        from ...parties import dealer as party
        from ...parties.serving import ServingSettings

        settings = ServingSettings(
            **given.settings(identity, base.get(given.backend)), quota=quota, ahead=ahead
        )
        journal = options.journal("dealer", given.log, given.once)
        serving = party.Dealer(listener, settings, journal)
        if not given.once:
            options.serve(serving.host(), listener, given.metrics, settings.backend)
            return
        options.ready(listener)
        options.write_stats(given.stats, "dealer", serving.serve_once().to_json())
