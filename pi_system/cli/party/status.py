"""``pi-party status``: how a serving party is doing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import common

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.option(
    "--at", required=True, multiple=True, metavar="HOST:PORT",
    help="A server's or dealer's --metrics address; may be given several times.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=5.0, show_default=True,
    help="Seconds to wait for an answer.",
)  # fmt: skip
@common.output_options
def status(at: tuple[str, ...], timeout: float, format_: str, output: Path | None) -> None:
    """Show sessions, totals, material left and the last errors of servers and dealers.

    They were started with --metrics. Exit code 5 where one does not answer.

    \b
    Example:
      pi-party status --at 127.0.0.1:9100 --at 127.0.0.1:9101
    """
    common.check_output(output)
    parties = [_ask(address, timeout) for address in at]
    common.emit(
        parties,
        format_=format_,
        output=output,
        table=lambda console: _print_all(console, parties),
        rows=lambda: [_row(party) for party in parties],
    )


def _ask(address: str, timeout: float) -> dict[str, Any]:
    from http.client import HTTPConnection, HTTPException

    from ...errors import PeerError, PeerTimeout, ProtocolError
    from ...parties.address import parse_address

    host, port = parse_address(address)
    connection = HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        value = json.loads(answer.read(1 << 20))
        if answer.status != 200 or not isinstance(value, dict) or "totals" not in value:
            raise ProtocolError(f"{address} is no --metrics address of a party")
    except TimeoutError as error:
        raise PeerTimeout(f"{address} did not answer within {timeout:g} s") from error
    except OSError as error:
        raise PeerError(f"cannot reach {address}: {error.strerror or error}") from error
    except (HTTPException, ValueError) as error:
        raise ProtocolError(f"{address} is no --metrics address of a party") from error
    finally:
        connection.close()
    return {"at": address, **value}


def _row(party: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in party.items() if not isinstance(value, dict | list)}
    return {**flat, **party["totals"], "errors": len(party["errors"])}


def _print_all(console: Console, parties: list[dict[str, Any]]) -> None:
    for party in parties:
        _print(console, party)


def _print(console: Console, party: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    totals = party["totals"]
    table = Table(title=f"{party['role']} at {party['at']}: {party['state']}", show_header=False)
    stock = party["stock"]
    for name, value in (
        ("up", f"{party['uptime']:.0f} s"),
        ("sessions", f"{party['running']} of {party['limit']} run, {party['waiting']} wait"),
        ("ended", f"{totals['ended']} well, {totals['failed']} failed"),
        ("refused", str(totals["refused"])),
        ("inferences", str(totals["inferences"])),
        ("material made", str(totals["material"])),
        ("material left", "not kept" if stock is None else str(stock)),
        ("sent, received", f"{totals['sent'] / 1e6:.1f} MB, {totals['received'] / 1e6:.1f} MB"),
    ):
        table.add_row(name, value)
    console.print(table)
    if party["peers"]:
        peers = Table(title="Sessions")
        for column in ("session", "peer", "since", "inferences"):
            peers.add_column(column)
        for peer in party["peers"]:
            peers.add_row(*(escape(str(value)) for value in peer.values()))
        console.print(peers)
    if party["errors"]:
        errors = Table(title="Last errors")
        for column in ("time", "event", "peer", "error"):
            errors.add_column(column)
        for error in reversed(party["errors"]):
            cells = (error["time"], error["event"], error.get("who", ""), error["error"])
            errors.add_row(*(escape(str(cell)) for cell in cells))
        console.print(errors)
