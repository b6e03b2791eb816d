"""Coming together: a listening socket, and a connection to one, with TLS where it is asked for."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from types import TracebackType

from ..errors import PeerTimeout, UsageError
from .channel import DEFAULT_TIMEOUT, Channel
from .link import Link
from .meter import Meter
from .tls import ROLES, Identity


class Listener:
    """A listening TCP socket. Port 0 takes a free one; :attr:`port` tells which.

    Raises:
        UsageError: the address cannot be had (in use, not of this host).
    """

    def __init__(self, host: str, port: int) -> None:
        _check_port(port)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            reason = "the port is in use" if in_use else (error.strerror or str(error))
            raise UsageError(f"cannot listen on {host}:{port}: {reason}") from error

    @classmethod
    def adopt(cls, descriptor: int) -> Listener:
        """Take over a listening socket inherited from the parent process."""
        listener = cls.__new__(cls)
        try:
            listener._socket = socket.socket(fileno=descriptor)
        except OSError as error:
            raise UsageError(f"file descriptor {descriptor} is not a listening socket") from error
        return listener

    @property
    def host(self) -> str:
        return str(self._socket.getsockname()[0])

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(
        self,
        *,
        wait: float | None = None,
        peer: str = "peer",
        meter: Meter | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        link: Link | None = None,
        identity: Identity | None = None,
        roles: tuple[str, ...] = ROLES,
    ) -> Channel:
        """The next connection, waiting up to ``wait`` seconds for it.

        Args:
            identity: speak TLS, with peers of ``roles`` only.

        Raises:
            PeerTimeout: nobody connected.
            RefusedError, PeerError: somebody did, but TLS failed.
        """
        sock = self.take(wait, peer=peer)
        return self.welcome(
            sock, peer=peer, meter=meter, timeout=timeout, link=link, identity=identity, roles=roles
        )

    def take(self, wait: float | None = None, *, peer: str = "peer") -> socket.socket:
        """The first half of :meth:`accept`: a connection that nothing was said on yet."""
        self._socket.settimeout(wait)
        try:
            return self._socket.accept()[0]
        except TimeoutError as error:
            raise PeerTimeout(f"the {peer} did not connect within {wait:g} s") from error

    @staticmethod
    def welcome(
        sock: socket.socket,
        *,
        peer: str = "peer",
        meter: Meter | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        link: Link | None = None,
        identity: Identity | None = None,
        roles: tuple[str, ...] = ROLES,
    ) -> Channel:
        """The second half of :meth:`accept`, which may take the peer some time."""
        if identity is not None:
            with _closed_on_failure(sock):
                sock = identity.accept(sock, roles=roles, seconds=timeout or DEFAULT_TIMEOUT)
        return Channel(sock, peer=peer, meter=meter, timeout=timeout, link=link)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def connect(
    host: str,
    port: int,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,
    retry_for: float = DEFAULT_TIMEOUT,
    peer: str = "peer",
    meter: Meter | None = None,
    link: Link | None = None,
    identity: Identity | None = None,
) -> Channel:
    """Connect to a listening party, retrying for ``retry_for`` seconds while nobody listens.

    With ``identity`` the connection speaks TLS, within ``retry_for`` seconds more, and the other
    side must be a ``peer``.

    Raises:
        UsageError: the host name is unknown, or the port number no such.
        PeerTimeout: nobody listened in time.
        RefusedError: TLS failed.
    """
    _check_port(port)
    deadline = time.monotonic() + retry_for
    pause = 0.02
    while True:
        left = deadline - time.monotonic()
        try:
            sock = socket.create_connection((host, port), timeout=max(left, 0.1))
            break
        except socket.gaierror as error:
            raise UsageError(f"unknown host {host!r} for the {peer}") from error
        except OSError as error:
            if time.monotonic() + pause >= deadline:
                reason = error.strerror or str(error)
                raise PeerTimeout(
                    f"cannot reach the {peer} at {host}:{port} within {retry_for:g} s: {reason}"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    if identity is not None:
        with _closed_on_failure(sock):
            patience = min(timeout or DEFAULT_TIMEOUT, retry_for)
            sock = identity.connect(sock, role=peer, seconds=patience)
    return Channel(sock, peer=peer, meter=meter, timeout=timeout, link=link)


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise UsageError(f"{port} is no port number (0 to 65535)")
