"""Connections to PostgreSQL: how they are made, kept and given up.

A connection is used for one transaction at a time and kept for the next one. What was sent and
not confirmed when it was lost is unknown; :class:`~pi_system.errors.PeerError` says so. No wait
is longer than :data:`PATIENCE`, also where the server is connected and silent.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow, tuple_row

from ...errors import PeerError, PiError, UsageError
from ...net.tls import is_loopback
from ..base import Database

Connection: TypeAlias = "psycopg.Connection[TupleRow]"

PATIENCE: Final = 8.0
"""Seconds for a connection, and for a statement."""

NAME: Final = "the ledger's database"


class _Bounded(psycopg.Connection[TupleRow]):
    """Is cut off, which ends every wait on it, after :data:`PATIENCE` in one wait."""

    def wait(self, *arguments: Any, **options: Any) -> Any:
        with socket.socket(fileno=os.dup(self.fileno())) as same:

            def cut() -> None:
                with contextlib.suppress(OSError):
                    same.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(PATIENCE, cut)
            timer.daemon = True
            timer.start()
            try:
                return super().wait(*arguments, **options)
            finally:
                timer.cancel()
                timer.join()


class Connections:
    """A pool for the threads of one process.

    Args:
        greet: called with every new connection before its first use, in autocommit.

    Raises:
        UsageError: the URL, or a password's file, cannot be used.
        PeerError: the database cannot be reached.
    """

    def __init__(self, database: Database, greet: Callable[[Connection], None]) -> None:
        self._parameters = parameters(database)
        self._greet = greet
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False
        try:
            self._put_back(self._connect())
        except PeerError as error:
            cause = error.__cause__
            where = self._parameters.get("host") or "the local socket"
            text = _line(cause) if isinstance(cause, psycopg.Error) else "lost"
            raise PeerError(f"cannot reach {NAME} at {where}: {text}") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction, committed at the end of the block, or undone by an exception.

        Raises:
            PeerError: the database was lost; whether it was committed is unknown.
            PiError: the database refused it.
        """
        connection = self._take()
        try:
            with _translated(), connection.transaction():
                yield connection
        except PeerError:
            connection.close()
            raise
        finally:
            self._put_back(connection)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connect()
            if _alive(connection):
                return connection
            connection.close()

    def _put_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed and not connection.broken and not connection.closed:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> Connection:
        try:
            connection: Connection = _Bounded.connect(
                **self._parameters, autocommit=True, prepare_threshold=None, row_factory=tuple_row
            )
        except psycopg.Error as error:
            raise PeerError(f"cannot reach {NAME}") from error
        try:
            with _translated():
                self._greet(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def parameters(database: Database) -> dict[str, Any]:
    """Arguments of libpq.

    A host that is not this one needs TLS that checks its certificate and name, which is also
    what is used where the URL says nothing.

    Raises:
        UsageError: no URL of PostgreSQL's, a password in it, weaker TLS or no password's file.
    """
    url = database.url
    if not url.startswith(("postgresql://", "postgres://")):
        raise UsageError("--ledger takes a URL postgresql://USER@HOST/DATABASE")
    try:
        given: dict[str, Any] = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        # libpq quotes the URL, which may hold what is none of the log's business.
        raise UsageError("--ledger is not a URL that PostgreSQL's library reads") from error
    if "password" in given or "sslpassword" in given:
        raise UsageError(
            "--ledger takes no password, which others could see; name a file with it in "
            "--ledger-password, or use PGPASSFILE or PGPASSWORD"
        )
    if database.password_file is not None:
        try:
            first = database.password_file.read_text().partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the password in {database.password_file}") from error
        given["password"] = first.rstrip("\r")
    hosts = given.get("hostaddr") or given.get("host") or os.environ.get("PGHOST") or "/"
    if not all(_is_local(host) for host in hosts.split(",")):
        mode = given.setdefault("sslmode", "verify-full")
        if mode != "verify-full":
            raise UsageError(f"--ledger on another machine needs sslmode=verify-full, not {mode}")
    defaults = {
        "connect_timeout": int(PATIENCE),
        "keepalives_idle": 3,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": int(1000 * PATIENCE),
        "application_name": "pi-party",
        "gssencmode": "disable",
        "target_session_attrs": "read-write",
    }
    return {**defaults, **given}


def _is_local(host: str) -> bool:
    return host == "" or host[0] in "/@" or is_loopback(host)


def _alive(connection: Connection) -> bool:
    """Whether an idle connection still stands, as far as its socket tells."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if not poll.poll(0):
        return True
    try:
        connection.pgconn.consume_input()  # a notice, or the news that it is over
    except psycopg.Error:
        return False
    return not poll.poll(0) and not connection.broken


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        if (lost and error.sqlstate is None) or isinstance(error, _GONE):
            raise PeerError(f"{NAME} was lost; what was being claimed counts as burnt") from error
        raise PiError(f"{NAME} refused: {_line(error)}") from error


_GONE: Final = (
    psycopg.errors.AdminShutdown,
    psycopg.errors.CrashShutdown,
    psycopg.errors.CannotConnectNow,
    psycopg.errors.ReadOnlySqlTransaction,  # it has become a standby
)


def _line(error: psycopg.Error) -> str:
    return " ".join(str(error).split())
