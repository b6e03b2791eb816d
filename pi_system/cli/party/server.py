"""``pi-party server``: own the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import common
from . import options


@click.command()
@click.option("--model", required=True, help="demo, demo-teacher, random:ARCH@RELUS or a path.")
@click.option(
    "--listen", required=True, metavar="HOST:PORT", help="Where clients connect; port 0: any free."
)
@click.option(
    "--dealer", required=True, metavar="HOST:PORT[,...]",
    help="Where the dealer listens; several in the order that clients name them in.",
)  # fmt: skip
@common.plan_option
@options.store
@click.option(
    "--ledger", metavar="postgresql://USER@HOST/DATABASE",
    help="Keep it in this database instead, which several servers share; see docs/operations.md.",
)  # fmt: skip
@click.option(
    "--ledger-password", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="With --ledger: the file with the password; else $PGPASSFILE or $PGPASSWORD count.",
)  # fmt: skip
@click.option(
    "--store-limit", type=click.IntRange(1), metavar="N",
    help="With --store or --ledger: inferences whose material one client may keep here (256).",
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
    ledger: str | None,
    ledger_password: Path | None,
    store_limit: int | None,
    **shared: Any,
) -> None:
    """Own the model and serve clients, several at once.

    Prints one JSON line with host and port when ready.

    \b
    Example:
      pi-party server --model demo --listen 10.0.0.5:7000 --dealer 10.0.0.9:7001 --certs certs
    """
    given = options.Serving(**shared)
    options.prepare(given.threads, given.exit_with_parent)
    if store is not None and ledger is not None:
        raise click.UsageError("Give --store or --ledger, not both.")
    from ...parties.address import parse_addresses

    dealers = parse_addresses(dealer)
    with options.listener(listen) as listener:
        identity = options.identity(
            "server", given.certs, given.insecure, listener.host, *(at.host for at in dealers)
        )
        from ...backends import base
        from ...models import resolve
        from ...parties import server as party

        implementation = base.get(given.backend)
        kept = store if ledger is None else base.Database(ledger, ledger_password)
        if kept is not None:
            base.open_store(implementation, kept, "server", store_limit)
        graph = resolve(model)
        settings = party.ServerSettings(
            model=graph,
            sha256=graph.sha256(),
            dealers=dealers,
            plan=plan,
            keeps=kept is not None,
            **given.settings(identity, implementation),
        )
        journal = options.journal("server", given.log, given.once)
        if not given.once:
            host = party.host(listener, settings, journal)
            options.serve(host, listener, given.metrics, implementation)
            return
        options.ready(listener)
        meter = party.serve_once(listener, settings, journal)
        options.write_stats(given.stats, "server", meter.to_json())
