"""A store that several server processes share, in PostgreSQL.

Every change of a pair's entry is one conditional ``UPDATE``: of two sessions that saw the same
entry, on whatever machines, one changes it, and the other is refused. The transaction that burnt
an item also deletes it, and its bytes are with the session that claimed it or with nobody. It is
committed before they are used (``synchronous_commit``; a server without ``fsync`` is refused).

**Where it is.** A store remembers the cluster (its system identifier), the timeline, the database
and the table it began in. A dump loaded elsewhere, a database copied as a template, a cluster
recovered to a point in time and a standby that was promoted differ in one of them. Then the
store begins anew: under another name, without pairs and items, so that no client finds
what it had here, and lays in fresh material. A cluster's files put back as they
were (a snapshot of its disk) do not differ; :mod:`.store` says how clients find that, and what
nobody can.

**Items** are in an ``UNLOGGED`` table: not in the write-ahead log, its archive, standbys or base
backups, where burnt material would otherwise live on. A crash of the database empties it, which
costs material and nothing else: the ledger is logged.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any, Final, Generic, LiteralString, TypeVar

import psycopg

from ...errors import IntegrityError, PeerError, PiError, RefusedError
from ..base import Database
from .database import NAME, Connection, Connections
from .depot import Shelf, decode
from .ledger import MAX_PAIRS, Entry, changed, check_upwards, new_id
from .material import Codec

Item = TypeVar("Item")

PART: Final = 1 << 20
"""Bytes of a row of an item; the server holds several copies of a row at a time."""

_LOCK: Final = 0x70694C31  # "piL1": of those who may make or begin anew a store, or add a pair

_MIGRATIONS: Final[tuple[LiteralString, ...]] = (
    """
    CREATE TABLE pi_system.store (
        id text NOT NULL, role text NOT NULL, place text NOT NULL, layout integer NOT NULL);
    CREATE UNIQUE INDEX one_store ON pi_system.store ((true));
    CREATE TABLE pi_system.pair (
        number bigint GENERATED ALWAYS AS IDENTITY,
        pair text PRIMARY KEY,
        peer text NOT NULL,
        digest text NOT NULL,
        next bigint NOT NULL CHECK (next >= 0),
        burnt bigint NOT NULL CHECK (burnt >= -1 AND burnt < next),
        link text NOT NULL,
        pending text);
    CREATE INDEX pair_of ON pi_system.pair (peer, digest);
    CREATE FUNCTION pi_system.only_up() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'ids only increase'; END $$;
    CREATE TRIGGER only_up BEFORE UPDATE ON pi_system.pair FOR EACH ROW
    WHEN (NEW.next < OLD.next OR NEW.burnt < OLD.burnt OR NEW.digest <> OLD.digest)
    EXECUTE FUNCTION pi_system.only_up();
    CREATE UNLOGGED TABLE pi_system.item (
        pair text NOT NULL REFERENCES pi_system.pair ON DELETE CASCADE,
        inference bigint NOT NULL,
        part integer NOT NULL,
        data bytea NOT NULL,
        PRIMARY KEY (pair, inference, part))
    WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
        toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 50000);
    ALTER TABLE pi_system.item ALTER COLUMN data SET STORAGE EXTERNAL;
    """,
)
_PLACE: Final = """
    SELECT (SELECT system_identifier FROM pg_control_system())
        || ' ' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)
        || ' ' || (SELECT oid FROM pg_database WHERE datname = current_database())
        || ' ' || 'pi_system.store'::regclass::oid
    """
_ENTRY: Final = "pair, peer, digest, link, next, burnt, pending"


class PostgresLedger:
    """A ledger in a database; see :class:`.ledger.Ledger`.

    Raises:
        RefusedError: it is of the other role, or the database cannot keep a promise.
        IntegrityError: it is of a later version.
        UsageError: the database cannot be used as asked.
        PeerError: the database cannot be reached.
    """

    def __init__(self, database: Database, role: str, *, max_pairs: int = MAX_PAIRS) -> None:
        self._role = role
        self._max_pairs = max_pairs
        self._id = ""
        self.connections = Connections(database, self._greet)

    @property
    def id(self) -> str:
        """The name the store has now; the last known where the database is away."""
        try:
            with self.connections.transaction() as run:
                self._id = _one(run, "SELECT id FROM pi_system.store")
        except PeerError:
            pass  # who keeps material here will meet the error; who does not need not
        return self._id

    def get(self, pair: str) -> Entry | None:
        return self._find("WHERE pair = %s", pair)

    def find(self, peer: str, digest: str) -> Entry | None:
        return self._find("WHERE peer = %s AND digest = %s ORDER BY number DESC", peer, digest)

    def _find(self, condition: LiteralString, *values: str) -> Entry | None:
        with self.connections.transaction() as run:
            query = f"SELECT {_ENTRY} FROM pi_system.pair {condition} LIMIT 1"
            row = run.execute(query, values).fetchone()
        return None if row is None else Entry(*row)

    def pairs(self) -> set[str]:
        with self.connections.transaction() as run:
            return {pair for (pair,) in run.execute("SELECT pair FROM pi_system.pair")}

    def create(self, entry: Entry) -> None:
        with self.connections.transaction() as run:
            run.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            count = "SELECT count(*) FROM pi_system.pair"
            if _one(run, count) >= self._max_pairs:
                run.execute("DELETE FROM pi_system.pair WHERE next = 0")
            if _one(run, count) >= self._max_pairs:
                raise RefusedError(f"{NAME} holds {self._max_pairs} pairs and takes no more")
            run.execute(
                f"INSERT INTO pi_system.pair ({_ENTRY}) VALUES (%(pair)s, %(peer)s, %(digest)s, "
                "%(link)s, %(next)s, %(burnt)s, %(pending)s)",
                dataclasses.asdict(entry),
            )

    def advance(self, before: Entry, after: Entry) -> None:
        self.claim(before, after, ())

    def claim(self, before: Entry, after: Entry, claimed: tuple[int, ...]) -> dict[int, bytearray]:
        """As :meth:`advance`; deletes what is burnt by it, and returns the items ``claimed``."""
        check_upwards(before, after)
        found: dict[int, bytearray] = {}
        with self.connections.transaction() as run:
            rows = run.execute(
                "UPDATE pi_system.pair SET next = %s, burnt = %s, link = %s, pending = %s "
                "WHERE pair = %s AND next = %s AND burnt = %s AND link = %s "
                "AND pending IS NOT DISTINCT FROM %s",
                (
                    *(after.next, after.burnt, after.link, after.pending),
                    *(before.pair, before.next, before.burnt, before.link, before.pending),
                ),
            ).rowcount
            if rows != 1:
                raise changed(before.pair)
            cursor = run.cursor(binary=True)
            for inference in claimed:  # one by one, so that a claim of many is not held twice
                cursor.execute(
                    "DELETE FROM pi_system.item WHERE pair = %s AND inference = %s "
                    "RETURNING part, data",
                    (before.pair, inference),
                )
                if parts := sorted(cursor.fetchall()):
                    found[inference] = bytearray().join(data for _, data in parts)
            if after.burnt > before.burnt:
                run.execute(
                    "DELETE FROM pi_system.item WHERE pair = %s AND inference <= %s",
                    (before.pair, after.burnt),
                )
        return found

    def forget(self, pair: str) -> None:
        with self.connections.transaction() as run:
            run.execute("DELETE FROM pi_system.pair WHERE pair = %s", (pair,))

    def close(self) -> None:
        self.connections.close()

    # -- of a new connection ----------------------------------------------------------------------

    def _greet(self, run: Connection) -> None:
        """Make the store if need be, and check that it is this one."""
        if _one(run, "SELECT current_setting('fsync')") != "on":
            raise RefusedError(f"{NAME} runs without fsync: what it burns might come back")
        if _one(run, "SELECT current_setting('synchronous_commit')") in ("off", "local"):
            run.execute("SET synchronous_commit = on")
        # Read from the tables: to_regclass may not see what was made while the lock was waited for.
        made = "SELECT count(*) FROM pg_tables WHERE schemaname = 'pi_system'"
        if not _one(run, made):
            with run.transaction():
                run.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                if not _one(run, made):
                    self._make(run)
        row = run.execute(
            f"SELECT id, role, layout, place, ({_PLACE}) FROM pi_system.store"
        ).fetchone()
        if row is None:
            raise IntegrityError(f"{NAME} has no store in its schema pi_system")
        self._id, role, layout, place, here = row
        if layout > len(_MIGRATIONS):
            raise IntegrityError(
                f"{NAME} has layout {layout}, this version knows up to "
                f"{len(_MIGRATIONS)}: use the version that made it, or another database"
            )
        if role != self._role:
            raise RefusedError(f"{NAME} is a {role}'s, not a {self._role}'s")
        if layout < len(_MIGRATIONS):
            with run.transaction():
                run.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                self._migrate(run, _one(run, "SELECT layout FROM pi_system.store"))
        if place != here:
            self._begin_anew(run)

    def _make(self, run: Connection) -> None:
        if not _one(run, "SELECT count(*) FROM pg_namespace WHERE nspname = 'pi_system'"):
            run.execute("CREATE SCHEMA pi_system")
        run.execute(_MIGRATIONS[0])
        run.execute(
            f"INSERT INTO pi_system.store SELECT %s, %s, ({_PLACE}), 1", (new_id(), self._role)
        )
        self._migrate(run, 1)

    def _migrate(self, run: Connection, layout: int) -> None:
        for script in _MIGRATIONS[layout:]:
            run.execute(script)
        run.execute("UPDATE pi_system.store SET layout = %s", (len(_MIGRATIONS),))

    def _begin_anew(self, run: Connection) -> None:
        with run.transaction():
            run.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            if _one(run, f"SELECT place = ({_PLACE}) FROM pi_system.store"):
                self._id = _one(run, "SELECT id FROM pi_system.store")
                return  # another process was quicker
            run.execute("DELETE FROM pi_system.pair")
            self._id = new_id()
            run.execute(f"UPDATE pi_system.store SET id = %s, place = ({_PLACE})", (self._id,))
        warnings.warn(
            f"{NAME} is a copy, was restored or has failed over: it begins anew, "
            "without the one-time material of the old one",
            stacklevel=2,
        )


class PostgresShelf(Generic[Item]):
    """Items of one pair in a database."""

    def __init__(self, ledger: PostgresLedger, pair: str, codec: Codec[Item]) -> None:
        self._ledger = ledger
        self._pair = pair
        self._codec = codec
        self._claimed: dict[int, bytearray] = {}

    def ids(self) -> list[int]:
        with self._ledger.connections.transaction() as run:
            rows = run.execute(
                "SELECT inference FROM pi_system.item WHERE pair = %s AND part = 0 ORDER BY 1",
                (self._pair,),
            ).fetchall()
        return [inference for (inference,) in rows]

    def advance(self, before: Entry, after: Entry, claimed: tuple[int, ...]) -> None:
        self._claimed = self._ledger.claim(before, after, claimed)

    def put(self, inference: int, item: Item) -> None:
        data = memoryview(self._codec.encode(inference, item))
        rows = [
            (self._pair, inference, part, data[start : start + PART])
            for part, start in enumerate(range(0, max(1, len(data)), PART))
        ]
        with self._ledger.connections.transaction() as run:
            # Shared: until this is committed, nobody burns the id.
            given = run.execute(
                "SELECT 1 FROM pi_system.pair WHERE pair = %s AND burnt < %s AND next > %s "
                "FOR SHARE",
                (self._pair, inference, inference),
            ).fetchone()
            if given is None:
                raise changed(self._pair)
            try:
                run.cursor().executemany("INSERT INTO pi_system.item VALUES (%s, %s, %s, %b)", rows)
            except psycopg.errors.UniqueViolation as error:
                raise changed(self._pair) from error

    def take(self, inference: int) -> Item:
        data = self._claimed.pop(inference, None)
        if data is None:
            raise RefusedError(f"the material of inference {inference} is gone")
        return decode(self._codec, inference, data, NAME)

    def drop(self, inferences: Iterable[int]) -> None:
        if dropped := list(inferences):
            with self._ledger.connections.transaction() as run:
                run.execute(
                    "DELETE FROM pi_system.item WHERE pair = %s AND inference = ANY(%s)",
                    (self._pair, dropped),
                )


class Postgres:
    """A depot in a database; see :mod:`.depot`."""

    def __init__(self, database: Database, role: str) -> None:
        self.ledger = PostgresLedger(database, role)

    def shelf(self, pair: str, codec: Codec[Item]) -> Shelf[Item]:
        return PostgresShelf(self.ledger, pair, codec)

    def count(self) -> int:
        with self.ledger.connections.transaction() as run:
            found: int = _one(run, "SELECT count(*) FROM pi_system.item WHERE part = 0")
            return found

    def close(self) -> None:
        self.ledger.close()


def _one(run: Connection, query: LiteralString) -> Any:
    row = run.execute(query).fetchone()
    if row is None:
        raise PiError(f"{NAME} gave no answer where it owes one")
    return row[0]
