"""``HOST:PORT`` on command lines."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import UsageError


class Address(NamedTuple):
    """Where a party listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``10.0.0.5:7000``, ``example.org:7000`` or ``[::1]:7000``.

    Raises:
        UsageError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not host or not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError(f"{text!r} is no address; write HOST:PORT, as in 127.0.0.1:7000")
    return Address(host, int(port))


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Several of them, separated by commas."""
    return tuple(parse_address(one.strip()) for one in text.split(","))
