"""What a store in PostgreSQL adds to the others: races of processes, lost databases, copies.

What it has in common with them is in test_store, test_store_kill and test_store_races.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fss_networks import Sessions, images, planned, residual
from postgres_party import PAIR, claim, content, fill, stock

from pi_system.backends.base import Database, Options
from pi_system.backends.fss.party import FssBackend
from pi_system.backends.fss.store import Store
from pi_system.errors import IntegrityError, PeerError, RefusedError, UsageError
from pi_system.graph.execute import run
from pi_system.net import certificates

pytest.importorskip("psycopg", reason="psycopg is not installed", exc_type=ImportError)

from pi_system.backends.fss import database as connections
from pi_system.backends.fss.postgres import PART, PostgresLedger

GRAPH, PLAN = planned(residual())
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["pi_system.backends.fss.postgres", "pi_system.backends.fss.store"])


def name_of(database: Database) -> str:
    return database.url.partition("@/")[2].partition("?")[0]


@contextlib.contextmanager
def claimers(database: Database, folder: Path, count: int) -> Iterator[list[Any]]:
    processes = [
        SPAWN.Process(target=claim, args=(database, str(folder / f"{n}.txt"), n))
        for n in range(count)
    ]
    for process in processes:
        process.start()
    yield processes
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a claimer hangs"


def used(folder: Path) -> list[int]:
    return [int(line) for path in folder.glob("*.txt") for line in path.read_text().split()]


# -- races ----------------------------------------------------------------------------------------


def test_processes_that_race_for_one_stock_get_every_item_exactly_once(
    database: Database, tmp_path: Path
) -> None:
    fill(database, 200)
    with claimers(database, tmp_path, 4) as processes:
        pass
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(used(tmp_path)) == list(range(200))
    assert sum(path.stat().st_size > 0 for path in tmp_path.glob("*.txt")) > 1
    with Store(database, "server") as store:
        assert store.count() == 0


def test_no_item_is_used_twice_however_the_processes_are_killed(
    database: Database, tmp_path: Path
) -> None:
    fill(database, 300)
    rng = random.Random(7)
    killed = 0
    for number in range(6):
        with claimers(database, tmp_path, 3) as processes:
            time.sleep(rng.uniform(0.05, 0.4))
            for process in processes[: 1 + number % 3]:
                process.kill()
        killed += sum(process.exitcode == -signal.SIGKILL for process in processes)
    with claimers(database, tmp_path, 2):
        pass
    ids = used(tmp_path)
    assert killed and len(set(ids)) == len(ids) and max(ids) <= 299
    # What was lost was being claimed when its process was killed: one item each, at most.
    assert 300 - len(ids) <= killed
    with Store(database, "server") as store:
        assert store.count() == 0


def test_many_may_make_the_store_at_once(database: Database) -> None:
    names: set[str] = set()
    start = threading.Barrier(6)

    def begin() -> None:
        start.wait()
        with Store(database, "server") as store:
            names.add(store.id)

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(names) == 1


def test_an_item_is_not_laid_in_under_an_id_that_another_session_burnt(
    database: Database,
) -> None:
    fill(database, 1)
    with Store(database, "server") as one, Store(database, "server") as two:
        mine = stock(one)
        mine.follow(mine.plan(2, claim=False), 2, claim=False)  # ids 1 and 2
        mine.add(1, b"one")
        theirs = stock(two)
        assert theirs.ids == (0, 1)
        theirs.follow(theirs.plan(3, claim=True), 3, claim=True)  # 0, 1 and a new 3
        assert (theirs.load(0), theirs.load(1)) == (content(0), b"one")
        with pytest.raises(RefusedError, match="changed by another session"):
            mine.add(2, b"two")
        with pytest.raises(RefusedError, match="changed by another session"):
            mine.follow(mine.plan(1, claim=True), 1, claim=True)
        with pytest.raises(RefusedError, match="begin a new session"):
            mine.follow(mine.plan(1, claim=True), 1, claim=True)
        assert one.count() == two.count() == 0


# -- items ----------------------------------------------------------------------------------------


def test_large_items_come_back_and_leave_no_copy(database: Database, postgres: Any) -> None:
    fill(database, 1)
    large = os.urandom(2 * PART + 17)
    with Store(database, "server") as store:
        mine = stock(store)
        step = mine.plan(2, claim=False)
        mine.follow(step, 2, claim=False)
        mine.add(1, large)
        mine.add(2, b"")
        assert mine.ids == (0, 1, 2) and store.count() == 3
    with Store(database, "server") as store:  # another process, as it were
        mine = stock(store)
        step = mine.plan(3, claim=True)
        mine.follow(step, 3, claim=True)
        # Gone with the claim, before it is loaded.
        assert postgres.sql("SELECT count(*) FROM pi_system.item", name_of(database)) == "0"
        assert mine.load(1) == large and mine.load(2) == b""
        with pytest.raises(RefusedError, match="gone"):
            mine.load(1)


def test_material_is_in_no_log(database: Database, postgres: Any) -> None:
    fill(database, 1)
    rows = postgres.sql(
        "SELECT relname, relpersistence FROM pg_class WHERE relkind = 'r' AND relnamespace = "
        "'pi_system'::regnamespace ORDER BY 1",
        name_of(database),
    )
    assert rows.splitlines() == ["item|u", "pair|p", "store|p"]


def test_ids_only_increase_whoever_writes(database: Database, postgres: Any) -> None:
    fill(database, 3)
    for change in ("next = 2", "next = 4, burnt = -1", "digest = 'another'"):
        postgres.sql("UPDATE pi_system.pair SET next = 4, burnt = 1", name_of(database))
        with pytest.raises(AssertionError, match="ids only increase"):
            postgres.sql(f"UPDATE pi_system.pair SET {change}", name_of(database))


# -- sessions -------------------------------------------------------------------------------------


def right(sessions: Sessions) -> None:
    x = images(GRAPH, 1)
    assert np.abs(sessions.online(x) - run(GRAPH, x)).max() < 24 * 2.0**-PLAN.f_x


def test_what_one_server_laid_in_another_uses(database: Database, tmp_path: Path) -> None:
    """And each finds what the other burnt."""
    with (
        Store(tmp_path / "client", "client") as client,
        Store(database, "server") as one,
        Store(database, "server") as two,
    ):
        assert one.id == two.id
        with Sessions(GRAPH, stores=(client, one)) as sessions:
            sessions.prepare(3)
        for server, left in ((two, 2), (one, 1), (two, 0)):
            with Sessions(GRAPH, stores=(client, server), dealer_takes_part=False) as sessions:
                sessions.offline(1)
                right(sessions)
                assert sessions.server.stock == sessions.client.stock == left
        with Sessions(GRAPH, Options(batch=2), stores=(client, two)) as sessions:
            assert sessions.client.stock == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_rows_put_back_are_refused_or_harmless(
    database: Database, postgres: Any, tmp_path: Path, steps: int
) -> None:
    """The place is the old one; the client knows better."""
    name = name_of(database)
    with Store(tmp_path / "client", "client") as client, Store(database, "server") as server:
        with Sessions(GRAPH, stores=(client, server)) as sessions:
            sessions.prepare(6)
        postgres.sql(
            "CREATE SCHEMA backup; CREATE TABLE backup.pair AS TABLE pi_system.pair; "
            "CREATE TABLE backup.item AS TABLE pi_system.item",
            name,
        )
        try:
            with Sessions(GRAPH, stores=(client, server), dealer_takes_part=False) as sessions:
                for _ in range(steps):
                    sessions.offline(1)
                    right(sessions)
            postgres.sql(
                "DELETE FROM pi_system.pair; INSERT INTO pi_system.pair OVERRIDING SYSTEM VALUE "
                "TABLE backup.pair; INSERT INTO pi_system.item TABLE backup.item",
                name,
            )
        finally:
            postgres.sql("DROP SCHEMA backup CASCADE", name)
        if steps == 1:  # as if the last step had not arrived: the client's ids hold
            with Sessions(GRAPH, stores=(client, server), dealer_takes_part=False) as sessions:
                assert sessions.server._stock().ids == (1, 2, 3, 4, 5)
                sessions.offline(1)
                right(sessions)
                assert sessions.client._claimed.used == 1
            return
        with pytest.raises(RefusedError, match="restored from a copy"):
            Sessions(GRAPH, stores=(client, server), dealer_takes_part=False)


# -- copies ---------------------------------------------------------------------------------------


def begun_anew(database: Database, old: str) -> None:
    """Once, loudly, with nothing of the old one."""
    with pytest.warns(UserWarning, match="begins anew"), Store(database, "server") as store:
        assert store.id != old and store.ledger.get(PAIR) is None and store.count() == 0
        again = store.id
    with Store(database, "server") as store:
        assert store.id == again


def test_a_copy_of_a_database_begins_anew_and_the_old_one_goes_on(
    database: Database, postgres: Any
) -> None:
    fill(database, 3)
    with Store(database, "server") as store:
        old = store.id
    copy = postgres.database(template=name_of(database))
    begun_anew(Database(postgres.url(copy)), old)
    with Store(database, "server") as store:
        assert store.id == old and store.count() == 3
    postgres.sql(f"DROP DATABASE {copy}")


def test_a_dump_loaded_elsewhere_begins_anew(database: Database, postgres: Any) -> None:
    fill(database, 3)
    with Store(database, "server") as store:
        old = store.id
    copy = postgres.database()
    postgres.copy(name_of(database), copy)
    begun_anew(Database(postgres.url(copy)), old)
    postgres.sql(f"DROP DATABASE {copy}")


@pytest.fixture
def cluster(postgres: Any) -> Iterator[Any]:
    """One of this test's own, to stop and start."""
    made = type(postgres)(postgres.programs)
    yield made
    made.close()


def test_a_crash_costs_material_and_a_recovery_to_a_point_in_time_begins_anew(
    cluster: Any,
) -> None:
    database = Database(cluster.url(cluster.scratch))
    fill(database, 5)
    store = Store(database, "server")
    old = store.id
    mine = stock(store)
    mine.follow(mine.plan(2, claim=True), 2, claim=True)
    cluster.stop("immediate")
    # Away: an error that is a peer's, not a hang and not a surprise.
    with pytest.raises(PeerError, match="cannot reach the ledger's database"):
        stock(store)
    assert store.id == old
    # Who keeps nothing here does not need it, and who looks is told that nobody knows.
    with Sessions(GRAPH, stores=(None, store)) as sessions:
        sessions.offline(1)
        right(sessions)
    backend = FssBackend()
    backend._store = store
    assert backend.stock() is None
    with pytest.raises(PeerError, match=f"cannot reach the ledger's database at {cluster.folder}"):
        Store(database, "server")
    cluster.start()
    # The connections that the crash broke are replaced, the ids burnt, the items gone.
    mine = stock(store)
    assert mine.ids == () and (mine.entry.burnt, mine.entry.next) == (1, 5)
    assert store.id == old and backend.stock() == 0
    store.close()
    cluster.stop()
    cluster.recover()
    begun_anew(database, old)


# -- a database that is lost ----------------------------------------------------------------------


def backends(postgres: Any, database: Database) -> str:
    """Of the stores' connections."""
    found: str = postgres.sql(
        "SELECT string_agg(pid::text, ' ') FROM pg_stat_activity "
        f"WHERE datname = '{name_of(database)}' AND usename = 'pi'"
    )
    return found


def test_an_idle_connection_that_was_closed_is_replaced(database: Database, postgres: Any) -> None:
    fill(database, 2)
    with Store(database, "server") as store:
        mine = stock(store)
        for pid in backends(postgres, database).split():
            postgres.sql(f"SELECT pg_terminate_backend({pid}, 5000)")
        mine.follow(mine.plan(1, claim=True), 1, claim=True)
        assert mine.load(0) == content(0)


@pytest.mark.parametrize("how", ["terminated", "silent"])
def test_a_connection_lost_in_the_middle_of_a_claim_ends_the_session(
    database: Database, postgres: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What it claimed counts as burnt, whether the database has the change or not."""
    fill(database, 3)
    with Store(database, "server") as store:
        mine = stock(store)
        step = mine.plan(1, claim=True)
        (pid,) = backends(postgres, database).split()
        if how == "silent":
            monkeypatch.setattr(connections, "PATIENCE", 0.5)
            os.kill(int(pid), signal.SIGSTOP)
            ending = threading.Timer(1.5, os.kill, (int(pid), signal.SIGCONT))
        else:
            # Another holds the row, so that the claim waits; then its connection is ended.
            holder = subprocess.Popen(
                postgres.psql(name_of(database), f"BEGIN; SELECT * FROM pi_system.pair WHERE pair "
                              f"= '{PAIR}' FOR UPDATE; SELECT pg_sleep(1.5); COMMIT"),
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            time.sleep(0.5)
            ending = threading.Timer(
                0.3, lambda: postgres.sql(f"SELECT pg_terminate_backend({pid})")
            )
        ending.start()
        began = time.monotonic()
        with pytest.raises(PeerError, match="was lost; what was being claimed counts as burnt"):
            mine.follow(step, 1, claim=True)
        assert time.monotonic() - began < 1.4
        with pytest.raises(RefusedError, match="begin a new session"):
            mine.follow(step, 1, claim=True)
        ending.join()
        if how == "terminated":
            assert holder.wait(10) == 0
        mine = stock(store)  # the next session has one of the two states, and its items
        assert mine.ids in ((0, 1, 2), (1, 2))


# -- what cannot be used --------------------------------------------------------------------------


def test_another_role_a_later_layout_and_a_database_without_fsync_are_refused(
    database: Database, postgres: Any
) -> None:
    Store(database, "server").close()
    with pytest.raises(RefusedError, match="is a server's, not a client's"):
        Store(database, "client")
    postgres.sql("UPDATE pi_system.store SET layout = 99", name_of(database))
    with pytest.raises(IntegrityError, match="has layout 99, this version knows up to 1"):
        Store(database, "server")
    postgres.sql("DELETE FROM pi_system.store", name_of(database))
    with pytest.raises(IntegrityError, match="has no store"):
        Store(database, "server")
    postgres.sql("ALTER SYSTEM SET fsync = off")
    postgres.sql("SELECT pg_reload_conf()")
    try:
        time.sleep(0.3)
        with pytest.raises(RefusedError, match="without fsync"):
            Store(Database(postgres.empty()), "server")
    finally:
        postgres.sql("ALTER SYSTEM RESET fsync")
        postgres.sql("SELECT pg_reload_conf()")


def test_a_commit_waits_for_the_disk_whatever_the_database_says(
    database: Database, postgres: Any
) -> None:
    name = name_of(database)
    for setting, expected in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = {setting}")
        with (
            contextlib.closing(PostgresLedger(database, "server")) as ledger,
            ledger.connections.transaction() as session,
        ):
            assert session.execute("SHOW synchronous_commit").fetchone() == (expected,)
    postgres.sql(f"ALTER DATABASE {name} RESET synchronous_commit")


def test_a_password_comes_from_a_file_or_the_environment_and_is_never_told(
    postgres: Any, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = postgres.password
    url = f"postgresql://pi@127.0.0.1:{postgres.port}/{name_of(database)}"
    file = tmp_path / "password"
    file.write_text(password + "\n")
    Store(Database(url, file), "server").close()
    monkeypatch.setenv("PGPASSWORD", password)
    Store(Database(url), "server").close()
    monkeypatch.delenv("PGPASSWORD")
    file.write_text("a wrong one")
    with pytest.raises(PeerError, match="password authentication failed") as found:
        Store(Database(url, file), "server")
    assert "a wrong one" not in str(found.value)
    with pytest.raises(UsageError, match="cannot read the password"):
        Store(Database(url, tmp_path / "none"), "server")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_over_tls_the_certificate_and_its_name_are_checked(
    postgres: Any, database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(postgres.password)

    def at(host: str, root: Path) -> Database:
        place = f"{host}:{postgres.port}/{name_of(database)}?hostaddr=127.0.0.1"
        return Database(f"postgresql://pi@{place}&sslmode=verify-full&sslrootcert={root}", file)

    with postgres.tls("postgres") as certificate:
        with (
            contextlib.closing(PostgresLedger(at("postgres", certificate), "server")) as ledger,
            ledger.connections.transaction() as session,
        ):
            query = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            assert session.execute(query).fetchone() == ("TLSv1.3",)
        with pytest.raises(PeerError, match="does not match host name"):
            PostgresLedger(at("another", certificate), "server")
        certificates.make(tmp_path / "certs", roles=("server",))
        with pytest.raises(PeerError, match="certificate verify failed"):
            PostgresLedger(at("postgres", tmp_path / "certs" / "authority.pem"), "server")
    with pytest.raises(PeerError, match="does not support SSL"):
        PostgresLedger(at("postgres", certificate), "server")


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql://pi:secret@db/pi", "takes no password"),
        ("postgresql://db/pi?password=secret", "takes no password"),
        ("postgresql://pi@db/pi?secret=1", "not a URL that PostgreSQL's library reads"),
        ("host=db password=secret", "takes a URL"),
        ("sqlite:///secret", "takes a URL"),
        ("postgresql://pi@db/pi?sslmode=require", "needs sslmode=verify-full, not require"),
        ("postgresql://pi@127.0.0.1,db/pi?sslmode=disable", "needs sslmode=verify-full"),
    ],
)
def test_addresses_that_are_refused_before_anything_is_sent(url: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as found:
        Store(Database(url), "server")
    assert "secret" not in str(found.value)


def test_another_machine_is_asked_over_checked_tls_and_this_one_as_the_url_says() -> None:
    remote = connections.parameters(Database("postgresql://pi@db.example/pi"))
    assert remote["sslmode"] == "verify-full"
    for host in ("127.0.0.1", "localhost", "%2Frun%2Fpostgresql", ""):
        assert "sslmode" not in connections.parameters(Database(f"postgresql://pi@{host}/pi"))


def test_without_psycopg_it_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['psycopg'] = None\n"
        "from pi_system.cli.party import main\n"
        "sys.argv = ['pi-party', 'server', '--model', 'demo', '--listen', '127.0.0.1:0',\n"
        "            '--dealer', '127.0.0.1:1', '--insecure', '--ledger', 'postgresql://x']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--ledger needs psycopg (pip install 'pi-system[postgres]')" in done.stderr
    assert len(done.stderr.splitlines()) == 1
