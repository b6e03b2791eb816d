"""``pi-party certs``: make an authority and a certificate per role."""

from __future__ import annotations

from pathlib import Path

import click

_ROLES = ("server", "client", "dealer")


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option(
    "--role", "roles", type=click.Choice(_ROLES), multiple=True,
    help="Only for this role; may be repeated.  [default: all three]",
)  # fmt: skip
@click.option(
    "--days", type=click.IntRange(1, 36_500), default=365, show_default=True,
    help="How long they are valid.",
)  # fmt: skip
@click.option(
    "--folders", is_flag=True,
    help="Put what a role needs, and no more, into a folder of its own: DIR/ROLE.",
)  # fmt: skip
@click.option(
    "--missing", is_flag=True, help="Succeed, and make nothing, where all of it is there already."
)
def certs(directory: Path, roles: tuple[str, ...], days: int, folders: bool, missing: bool) -> None:
    """Make certificates for the parties of one deployment.

    DIR/authority.pem is what all trust; a party needs it, ROLE.pem and ROLE.key. The authority's
    key, DIR/authority.key, makes more certificates later: keep it away from the parties. Prints
    the files made. Nothing is ever replaced.

    \b
    Example:
      pi-party certs certs --folders     # then hand each party its folder
    """
    from ...net import certificates

    roles = roles or _ROLES
    if missing and all(certificates.complete(directory, role, folders=folders) for role in roles):
        return
    for path in certificates.make(directory, roles=roles, days=days, folders=folders):
        click.echo(str(path))
