"""Mutual TLS 1.3 between parties, with each party's role in its certificate.

All certificates of a deployment come from one authority of its own (:mod:`.certificates` makes
one). A certificate speaks for a role, not for a host name: whoever the authority certified as
the dealer is the dealer, wherever it runs. So a stolen client key cannot act as the server, and
the network's names and addresses need not be trusted.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import PeerError, PeerTimeout, RefusedError, UsageError
from .framing import abort_message

ROLES: Final = ("server", "client", "dealer")
AUTHORITY: Final = "authority.pem"
ROLE_URI: Final = "urn:pi-system:role:"
_FAREWELL: Final = 0.5
"""Seconds a refused peer has to read why."""


@dataclass(frozen=True)
class Identity:
    """A party's certificate and key, and the authority it trusts: three files in PEM form."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, directory: Path, role: str) -> Identity:
        """``ROLE.pem``, ``ROLE.key`` and ``authority.pem`` in one directory.

        Raises:
            UsageError: one of them is not there.
        """
        identity = cls(directory / f"{role}.pem", directory / f"{role}.key", directory / AUTHORITY)
        for path in (identity.certificate, identity.key, identity.authority):
            if not path.is_file():
                raise UsageError(f"no {path}; pi-party certs makes certificates")
        return identity

    def check(self) -> None:
        """Load the files, so that unusable ones are found before anybody connects.

        Raises:
            UsageError: they cannot be used.
        """
        self._context(ssl.PROTOCOL_TLS_CLIENT)

    def accept(
        self, sock: socket.socket, *, roles: tuple[str, ...], seconds: float
    ) -> ssl.SSLSocket:
        """The listening side's handshake on an accepted connection.

        Raises:
            RefusedError: the peer has no certificate of this authority for one of ``roles``, or
                speaks no TLS 1.3.
            PeerError: it was lost, or too slow.
        """
        return self._wrap(sock, ssl.PROTOCOL_TLS_SERVER, roles, seconds)

    def connect(self, sock: socket.socket, *, role: str, seconds: float) -> ssl.SSLSocket:
        """The connecting side's handshake; raises as :meth:`accept` does."""
        return self._wrap(sock, ssl.PROTOCOL_TLS_CLIENT, (role,), seconds)

    def _wrap(
        self, sock: socket.socket, protocol: int, roles: tuple[str, ...], seconds: float
    ) -> ssl.SSLSocket:
        who = " or ".join(roles)
        listening = protocol == ssl.PROTOCOL_TLS_SERVER
        context = self._context(protocol)
        sock.settimeout(seconds)
        try:
            wrapped = context.wrap_socket(
                sock, server_side=listening, do_handshake_on_connect=False
            )
        except OSError as error:
            raise PeerError(f"lost the {who}: {error.strerror or error}") from error
        try:
            wrapped.do_handshake()
            _check_role(wrapped.getpeercert(), roles)
        except OSError as error:
            _let_hear(wrapped)
            raise _named(error, who, seconds) from error
        except RefusedError as error:
            with contextlib.suppress(OSError):
                wrapped.send(abort_message(error))
            _let_hear(wrapped)
            raise
        except BaseException:
            _let_hear(wrapped)
            raise
        return wrapped

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # no session is ever resumed
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or str(error)
            raise UsageError(
                f"cannot use the certificate {self.certificate} with {self.key.name} and "
                f"{self.authority.name}: {reason}"
            ) from error
        return context


def _named(error: OSError, who: str, seconds: float) -> PeerError | RefusedError:
    """The failure of a handshake as one of this package's errors."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return RefusedError(f"the {who}'s certificate: {error.verify_message}")
    if isinstance(error, TimeoutError):
        return PeerTimeout(f"the {who} did not finish TLS within {seconds:g} s")
    if isinstance(error, ssl.SSLError):
        return refused(error, who)
    return PeerError(f"lost the {who}: {error.strerror or error}")


def _let_hear(wrapped: ssl.SSLSocket) -> None:
    """Close so that the peer can still read the alert.

    Closing with bytes unread would reset the connection, and with it what was sent last.
    """
    with socket.socket(fileno=wrapped.detach()) as raw, contextlib.suppress(OSError):
        raw.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _FAREWELL
        while (left := deadline - time.monotonic()) > 0:
            raw.settimeout(left)
            if not raw.recv(1 << 16):
                break


def refused(error: ssl.SSLError, who: str) -> PeerError | RefusedError:
    """What the TLS library says, as a refusal or, where the connection ended, a lost peer."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return PeerError(f"lost the {who} within TLS")
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return RefusedError(f"no TLS with the {who}: {reason}")


def role_of(certificate: Any) -> str | None:
    """The role a verified certificate speaks for (``getpeercert()``'s dictionary)."""
    names = certificate.get("subjectAltName", ()) if certificate else ()
    roles = [
        value.removeprefix(ROLE_URI)
        for kind, value in names
        if kind == "URI" and value.startswith(ROLE_URI)
    ]
    return roles[0] if len(roles) == 1 and roles[0] in ROLES else None


def _check_role(certificate: Any, roles: tuple[str, ...]) -> None:
    role = role_of(certificate)
    if role not in roles:
        raise RefusedError(
            f"a {' or '.join(roles)} was expected, the certificate is for "
            f"{'no role' if role is None else f'a {role}'}"
        )


def require_loopback(host: str) -> None:
    """Refuse an unencrypted connection that would leave this machine.

    Raises:
        UsageError: ``host`` is not loopback.
    """
    if not is_loopback(host):
        raise UsageError(f"--insecure is for loopback only, not for {host}; use --certs DIR")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
