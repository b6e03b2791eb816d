"""Which inference ids were given out and which are burnt: the durable half of a store.

A ledger holds one :class:`Entry` per pair of a client and a server. Every change is one
transaction, on disk when the call returns, and a comparison with what the caller last saw, so
that of two writers one is refused. It knows nothing of material. For processes that share one
there is :class:`.postgres.PostgresLedger`, held to the same tests.

:class:`SqliteLedger` keeps SQLite's exclusive lock from opening to closing, so no second process
can open it and the system releases it if this one is killed. Its journal is write-ahead
with ``synchronous=FULL``: a commit returns after one fsync of the log (a rollback journal needs
four, and is no safer here, as nothing else reads the file).
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import secrets
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ...errors import IntegrityError, PiError, RefusedError, reason

FILE: Final = "ledger.sqlite"
MAX_PAIRS: Final = 4096
_LAYOUT: Final = 1
_MARK: Final = 0x70694C31  # "piL1", SQLite's application_id

_SCHEMA: Final = (
    "CREATE TABLE store (id TEXT NOT NULL, role TEXT NOT NULL, place TEXT NOT NULL)",
    """CREATE TABLE pair (
        pair TEXT PRIMARY KEY,
        peer TEXT NOT NULL,
        digest TEXT NOT NULL,
        next INTEGER NOT NULL CHECK (next >= 0),
        burnt INTEGER NOT NULL CHECK (burnt >= -1 AND burnt < next),
        link TEXT NOT NULL,
        pending TEXT
    )""",
    "CREATE INDEX pair_of ON pair (peer, digest)",
    """CREATE TRIGGER only_up BEFORE UPDATE ON pair
    WHEN NEW.next < OLD.next OR NEW.burnt < OLD.burnt OR NEW.digest <> OLD.digest
    BEGIN SELECT RAISE(ABORT, 'ids only increase'); END""",
)
_COLUMNS: Final = "pair, peer, digest, next, burnt, link, pending"


def new_id() -> str:
    """16 bytes from the operating system, in hexadecimal."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Entry:
    """What is known of one pair.

    Attributes:
        pair: the pair's name, drawn by the server.
        peer: the other side's store (at a client; empty at a server).
        digest: of graph, masks, plan, model and batch (:attr:`.public.Public.digest`).
        next: the lowest id not given out yet.
        burnt: the highest burnt id; every id up to it is burnt. -1 for none.
        link: a random name of this state, replaced at every change and equal on both sides.
        pending: the link of a change whose arrival at the peer was not confirmed.
    """

    pair: str
    peer: str
    digest: str
    link: str
    next: int = 0
    burnt: int = -1
    pending: str | None = None


class Ledger(Protocol):
    """Entries by pair; every method is durable when it returns."""

    @property
    def id(self) -> str:
        """The store's own random name."""
        ...

    def get(self, pair: str) -> Entry | None: ...
    def find(self, peer: str, digest: str) -> Entry | None:
        """The youngest entry for a peer's store and a digest."""
        ...

    def pairs(self) -> set[str]: ...
    def create(self, entry: Entry) -> None:
        """Add a new pair; entries that never gave out an id may be forgotten for it.

        Raises:
            RefusedError: the ledger is full.
        """
        ...

    def advance(self, before: Entry, after: Entry) -> None:
        """Replace ``before`` by ``after``, whose ``next`` and ``burnt`` are not lower.

        Raises:
            RefusedError: another writer has changed the entry since, or an id would go down.
            PeerError: a database was lost; whether it has the change is unknown.
        """
        ...

    def forget(self, pair: str) -> None: ...
    def close(self) -> None: ...


def check_upwards(before: Entry, after: Entry) -> None:
    """What every :meth:`Ledger.advance` refuses first.

    Raises:
        RefusedError: an id would go down.
    """
    assert (before.pair, before.peer, before.digest) == (after.pair, after.peer, after.digest)
    if after.next < before.next or after.burnt < before.burnt:
        raise RefusedError("inference ids only increase")


def changed(pair: str) -> RefusedError:
    """The entry is not what the caller last saw."""
    return RefusedError(
        f"pair {pair[:8]} was changed by another session; one-time material is never used twice"
    )


class SqliteLedger:
    """A ledger in a file of ``directory``, or in memory.

    Args:
        directory: an existing folder; ``None`` for a ledger that ends with the process.
        role: "client" or "server".

    Raises:
        RefusedError: it is in use, of the other role, or a copy of another ledger.
        IntegrityError: the file is no ledger, or damaged.
        PiError: it cannot be written.
    """

    def __init__(self, directory: Path | None, role: str, *, max_pairs: int = MAX_PAIRS) -> None:
        self._max_pairs = max_pairs
        self._lock = threading.Lock()
        self._directory = directory
        self._where = "the store in memory" if directory is None else str(directory)
        path = None if directory is None else directory / FILE
        fresh = path is None or not path.exists()
        if path is not None and fresh:
            try:
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            except OSError as error:
                raise PiError(f"{self._where}: no ledger: {reason(error)}") from error
        target = ":memory:" if path is None else path
        self._db = sqlite3.connect(target, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self.id = self._open(role)
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                raise self._translate(error) from error
            raise
        if directory is not None and fresh:
            sync_directory(directory)
            sync_directory(directory.parent)

    def _open(self, role: str) -> str:
        run = self._db.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA journal_mode = WAL")
        run("BEGIN IMMEDIATE")
        (mark,) = run("PRAGMA application_id").fetchone()
        (layout,) = run("PRAGMA user_version").fetchone()
        if not run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in _SCHEMA:
                run(statement)
            run("INSERT INTO store VALUES (?, ?, ?)", (new_id(), role, self._place()))
            run(f"PRAGMA application_id = {_MARK}")
            run(f"PRAGMA user_version = {_LAYOUT}")
        elif mark != _MARK or layout != _LAYOUT:
            raise IntegrityError(f"{self._where}: {FILE} is no ledger of this version")
        run("COMMIT")
        (sound,) = run("PRAGMA quick_check").fetchone()
        if sound != "ok":
            raise IntegrityError(f"{self._where}: {FILE} is damaged; use a new directory")
        name, owner, place = run("SELECT id, role, place FROM store").fetchone()
        if owner != role:
            raise RefusedError(f"{self._where} is a {owner}'s store, not a {role}'s")
        if place != self._place():
            raise RefusedError(
                f"{self._where} is a copy or was restored from one: its ledger began as another "
                "file; one-time material must not be used from copies: use a new directory"
            )
        return str(name)

    def _place(self) -> str:
        """What a copy cannot have: inode and birth time of the directory and the ledger."""
        if self._directory is None:
            return ""
        return " ".join(identity(path) for path in (self._directory, self._directory / FILE))

    def get(self, pair: str) -> Entry | None:
        return self._one("WHERE pair = ?", pair)

    def find(self, peer: str, digest: str) -> Entry | None:
        return self._one("WHERE peer = ? AND digest = ? ORDER BY rowid DESC", peer, digest)

    def pairs(self) -> set[str]:
        with self._lock:
            return {pair for (pair,) in self._db.execute("SELECT pair FROM pair")}

    def _one(self, condition: str, *values: str) -> Entry | None:
        with self._lock:
            query = f"SELECT {_COLUMNS} FROM pair {condition} LIMIT 1"
            row = self._db.execute(query, values).fetchone()
        if row is None:
            return None
        names = _COLUMNS.split(", ")
        return Entry(**dict(zip(names, row, strict=True)))

    def create(self, entry: Entry) -> None:
        values = dataclasses.asdict(entry)
        with self._lock, _Transaction(self) as run:
            if run("SELECT count(*) FROM pair").fetchone()[0] >= self._max_pairs:
                run("DELETE FROM pair WHERE next = 0")
            if run("SELECT count(*) FROM pair").fetchone()[0] >= self._max_pairs:
                raise RefusedError(f"{self._where} holds {self._max_pairs} pairs and takes no more")
            names = _COLUMNS.split(", ")
            marks = ", ".join("?" * len(names))
            run(f"INSERT INTO pair ({_COLUMNS}) VALUES ({marks})", [values[name] for name in names])

    def advance(self, before: Entry, after: Entry) -> None:
        check_upwards(before, after)
        with self._lock, _Transaction(self) as run:
            rows = run(
                "UPDATE pair SET next = ?, burnt = ?, link = ?, pending = ? "
                "WHERE pair = ? AND next = ? AND burnt = ? AND link = ? AND pending IS ?",
                (
                    *(after.next, after.burnt, after.link, after.pending),
                    *(before.pair, before.next, before.burnt, before.link, before.pending),
                ),
            ).rowcount
            if rows != 1:
                raise changed(before.pair)

    def forget(self, pair: str) -> None:
        with self._lock, _Transaction(self) as run:
            run("DELETE FROM pair WHERE pair = ?", (pair,))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _translate(self, error: sqlite3.Error) -> PiError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return RefusedError(f"{self._where} is in use by another process")
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return IntegrityError(f"{self._where}: {FILE} is damaged; use a new directory")
        if self._directory is not None and not os.access(self._directory / FILE, os.W_OK):
            what = "it is read-only here; the store must be writable"
        elif code == sqlite3.SQLITE_FULL:
            what = "the disk is full; make space and try again"
        else:
            what = f"{error}; is the disk full or failing?"
        return PiError(f"{self._where}: cannot write the ledger: {what}")


class _Transaction:
    """``with``: commit, or undo everything."""

    def __init__(self, ledger: SqliteLedger) -> None:
        self._ledger = ledger

    def __enter__(self) -> Any:
        try:
            self._ledger._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._ledger._translate(error) from error
        return self._ledger._db.execute

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        db = self._ledger._db
        if error is None:
            try:
                db.execute("COMMIT")
                return
            except sqlite3.Error as failure:
                error = failure
        if db.in_transaction:
            db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise self._ledger._translate(error) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity(path: Path) -> str:
    """Inode and birth time, which moving a file keeps and copying it does not.

    Not the device: its number may differ after every start of the machine.
    """
    return f"{os.stat(path).st_ino}@{_birth(path)}"


def _birth(path: Path) -> str:
    """Seconds and nanoseconds, "-" where the system does not tell."""
    known = getattr(os.stat(path), "st_birthtime", None)
    if known is not None:
        return str(known)
    statx = getattr(ctypes.CDLL(None), "statx", None)
    if statx is None:
        return "-"
    # struct statx: stx_mask at 0, stx_btime (seconds, nanoseconds) at 80; STATX_BTIME = 0x800.
    buffer = (ctypes.c_uint8 * 256)()
    at_fdcwd = -100
    if statx(at_fdcwd, os.fsencode(path), 0, 0x800, ctypes.byref(buffer)):
        return "-"
    raw = bytes(buffer)
    if not int.from_bytes(raw[:4], "little") & 0x800:
        return "-"
    return f"{int.from_bytes(raw[80:88], 'little')}.{int.from_bytes(raw[88:92], 'little')}"
