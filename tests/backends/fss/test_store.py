"""Stocks of one-time material: one interface in memory, on disk and in a database that processes
share, and what a disk adds; what a database adds is in test_postgres."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fss_networks import Sessions, images, planned, residual

from pi_system.backends.base import Database, Options
from pi_system.backends.fss import ledger, pairing
from pi_system.backends.fss.ledger import Entry, new_id
from pi_system.backends.fss.material import (
    ClientCodec,
    ClientMaterial,
    ServerCodec,
    ServerMaterial,
)
from pi_system.backends.fss.store import Claimed, Step, Stock, Store
from pi_system.errors import IntegrityError, PiError, ProtocolError, RefusedError, UsageError
from pi_system.graph.execute import run
from pi_system.graph.ir import Graph

Stores = tuple[Store, Store]
GRAPH, PLAN = planned(residual())
ROUNDINGS = 24


class Text:
    """A codec of short byte strings, where the material does not matter."""

    def encode(self, inference: int, item: bytes) -> bytes:
        return item

    def decode(self, inference: int, data: bytearray) -> bytes:
        return bytes(data)


def stock(kept: Store, entry: Entry) -> Stock[bytes]:
    return kept.stock(entry, Text())  # type: ignore[arg-type]


def entry_in(book: ledger.Ledger, peer: str = "", digest: str = "digest") -> Entry:
    made = Entry(new_id(), peer, digest, new_id())
    book.create(made)
    return made


def entry(kept: Store) -> Entry:
    return entry_in(kept.ledger)


KINDS = ["memory", "disk", "postgres"]


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Open the store, closing it first: in memory it is the same one again."""
    where: Path | Database | None = None
    match request.param:
        case "disk":
            where = tmp_path / "store"
        case "postgres":
            where = request.getfixturevalue("database")
    current = [Store(where, "client")]

    def again() -> Store:
        if where is not None:
            current[0].close()
            current[0] = Store(where, "client")
        return current[0]

    yield again
    current[0].close()


def both(client: Stock[bytes], server: Stock[bytes], count: int, *, claim: bool) -> Step:
    step = client.plan(count, claim=claim)
    client.begin(step)
    server.follow(Step.from_json(step.to_json()), count, claim=claim)
    client.confirm(step)
    return step


# -- one interface --------------------------------------------------------------------------------


def test_items_are_laid_in_and_claimed_in_order_and_new_ones_follow(
    opened: Callable[[], Store],
) -> None:
    kept = opened()
    mine = stock(kept, entry(kept))
    step = mine.plan(3, claim=False)
    mine.begin(step)
    for inference in step.made:
        mine.add(inference, b"item %d" % inference)
    assert mine.ids == (0, 1, 2)
    mine = stock(opened(), mine.entry)
    assert mine.ids == (0, 1, 2)
    step = mine.plan(2, claim=True)
    assert (step.kept, len(step.made)) == ((0, 1), 0)
    mine.begin(step)
    assert [mine.load(i) for i in step.kept] == [b"item 0", b"item 1"]
    mine = stock(opened(), mine.entry)
    assert mine.ids == (2,) and mine.entry.burnt == 1
    step = mine.plan(3, claim=True)
    assert (step.kept, step.made) == ((2,), range(3, 5))
    mine.begin(step)
    assert (mine.ids, mine.entry.burnt, mine.entry.next) == ((), 4, 5)
    for inference in (0, 2, 4):
        with pytest.raises(RefusedError, match="cannot be filled"):
            mine.add(inference, b"again")


@pytest.mark.parametrize("seed", range(5))
def test_no_item_is_handed_out_twice_whatever_is_lost(
    opened: Callable[[], Store], seed: int
) -> None:
    """Random steps, ended before or after the other side took part, by the client reopening."""
    rng = random.Random(seed)
    kept, server = opened(), Store(None, "server")
    first = entry(kept)
    server.ledger.create(dataclasses.replace(first))
    used: list[int] = []
    highest = -1
    for _ in range(25):
        kept = opened()
        mine, theirs = kept.ledger.get(first.pair), server.ledger.get(first.pair)
        assert mine is not None and theirs is not None
        assert theirs.link in (mine.link, mine.pending)
        client, other = stock(kept, mine), stock(server, theirs)
        ids = set(client.ids) & set(other.ids)
        other.settle(ids, next_id=mine.next, burnt=mine.burnt, link=theirs.link)
        client.settle(ids, next_id=mine.next, burnt=mine.burnt, link=theirs.link)
        assert client.ids == other.ids
        for _ in range(rng.randrange(3)):
            claim, count = rng.random() < 0.6, rng.randrange(1, 4)
            if rng.random() < 0.25:  # lost before the server hears of it
                client.begin(client.plan(count, claim=claim))
                break
            step = both(client, other, count, claim=claim)
            if claim:
                for inference in step.kept:
                    assert client.load(inference) == other.load(inference)
                used += [*step.kept, *step.made]
                assert used[-1] > highest
                highest = used[-1]
            else:
                for inference in step.made[: rng.randrange(count + 1)]:
                    client.add(inference, b"%d" % inference)
                    if rng.random() < 0.9:
                        other.add(inference, b"%d" % inference)
                if client.ids != other.ids:
                    break  # the session ended while material was made
    assert used and used == sorted(set(used))


def test_a_server_refuses_a_step_that_does_not_follow(opened: Callable[[], Store]) -> None:
    kept = opened()
    server = stock(kept, entry(kept))
    good = server.plan(2, claim=True)
    for wrong in (
        dataclasses.replace(good, made=range(1, 3)),
        dataclasses.replace(good, made=range(0, 3)),
        dataclasses.replace(good, kept=(0,)),
        dataclasses.replace(good, claim=False),
    ):
        with pytest.raises(RefusedError, match="does not follow here"):
            server.follow(wrong, 2, claim=True)
    server.follow(good, 2, claim=True)
    with pytest.raises(RefusedError, match="does not follow here"):
        server.follow(good, 2, claim=True)


@pytest.mark.parametrize(
    "change",
    [{"kept": [-1]}, {"kept": 3}, {"first": "0"}, {"count": True}, {"claim": 1}, {"link": "x"}],
)
def test_a_step_that_is_none_is_a_protocol_error(change: dict[str, Any]) -> None:
    good = Step((1, 2), range(3, 4), True, new_id()).to_json()
    with pytest.raises(ProtocolError):
        Step.from_json({**good, **change})


def test_a_later_session_of_a_pair_ends_the_earlier_one(opened: Callable[[], Store]) -> None:
    kept = opened()
    first = stock(kept, entry(kept))
    second = stock(kept, first.entry)
    with pytest.raises(RefusedError, match="another session has taken over"):
        first.begin(first.plan(1, claim=True))
    second.begin(second.plan(1, claim=True))


def test_claimed_items_are_handed_out_once_and_in_order() -> None:
    claimed: Claimed[str] = Claimed()
    for inference in (1, 2, 5):
        claimed.add(inference, f"item {inference}")
    assert claimed.take(2) == "item 2"
    for inference in (1, 2):
        with pytest.raises(RefusedError, match="spent"):
            claimed.take(inference)
        with pytest.raises(RefusedError, match="spent"):
            claimed.add(inference, "again")
    with pytest.raises(RefusedError, match="no one-time material for inference 3"):
        claimed.take(3)
    assert claimed.take_next() == (5, "item 5")
    with pytest.raises(RefusedError, match="no one-time material is left"):
        claimed.take_next()


# -- the ledger -----------------------------------------------------------------------------------


def test_of_two_writers_one_is_refused_and_ids_only_increase(opened: Callable[[], Store]) -> None:
    book = opened().ledger
    start = entry_in(book)
    later = dataclasses.replace(start, next=5, burnt=2)
    book.advance(start, later)
    with pytest.raises(RefusedError, match="changed by another session"):
        book.advance(start, dataclasses.replace(start, next=6))
    # A change of the link alone is one, too: what follows it must have seen it.
    other = dataclasses.replace(later, link=new_id(), pending=new_id())
    book.advance(later, other)
    for last in (later, dataclasses.replace(other, pending=None)):
        with pytest.raises(RefusedError, match="changed by another session"):
            book.advance(last, dataclasses.replace(last, next=6))
    book.advance(other, later)
    for lower in ({"next": 4}, {"burnt": 1}):
        with pytest.raises(RefusedError, match="only increase"):
            book.advance(later, dataclasses.replace(later, **lower))
    assert book.get(start.pair) == later


def test_entries_are_found_by_peer_and_digest_and_survive(opened: Callable[[], Store]) -> None:
    book = opened().ledger
    made = {
        (peer, digest): entry_in(book, peer, digest) for peer in ("a", "b") for digest in ("x", "y")
    }
    younger = entry_in(book, "a", "x")
    book = opened().ledger
    assert book.find("b", "y") == made["b", "y"]
    assert book.find("a", "x") == younger
    assert book.find("c", "x") is None and book.get("none") is None
    book.forget(younger.pair)
    assert book.find("a", "x") == made["a", "x"]


@pytest.mark.parametrize("kind", ["disk", "postgres"])
def test_a_ledger_is_bounded_and_gives_up_pairs_that_never_had_an_id(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    book: ledger.Ledger
    if kind == "disk":
        book = ledger.SqliteLedger(tmp_path, "server", max_pairs=3)
    else:
        from pi_system.backends.fss.postgres import PostgresLedger

        book = PostgresLedger(request.getfixturevalue("database"), "server", max_pairs=3)
    used = [entry_in(book) for _ in range(2)]
    for made in used:
        book.advance(made, dataclasses.replace(made, next=1))
    for _ in range(5):
        entry_in(book)
    last = entry_in(book)
    book.advance(last, dataclasses.replace(last, next=1))
    with pytest.raises(RefusedError, match="holds 3 pairs"):
        entry_in(book)
    assert all(book.get(made.pair) for made in used)
    book.close()


def test_a_commit_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    """Full synchronisation is in force, and the file a killed process leaves has the commit."""
    book = ledger.SqliteLedger(tmp_path, "client")
    assert book._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert book._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    made = entry_in(book)
    book.close()
    code = (
        "import os, sys, dataclasses\n"
        "from pathlib import Path\n"
        "from pi_system.backends.fss.ledger import SqliteLedger\n"
        "book = SqliteLedger(Path(sys.argv[1]), 'client')\n"
        "entry = book.get(sys.argv[2])\n"
        "book.advance(entry, dataclasses.replace(entry, next=9, burnt=7))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), made.pair])
    assert done.returncode == -signal.SIGKILL
    book = ledger.SqliteLedger(tmp_path, "client")
    assert book.get(made.pair) == dataclasses.replace(made, next=9, burnt=7)
    book.close()


# -- directories ----------------------------------------------------------------------------------

OPEN = (
    "import sys\n"
    "from pathlib import Path\n"
    "from pi_system.backends.fss.store import Store\n"
    "from pi_system.errors import PiError\n"
    "try:\n"
    "    Store(Path(sys.argv[1]), 'client')\n"
    "except PiError as error:\n"
    "    print(error)\n"
    "    sys.exit(error.exit_code)\n"
)


def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    where = tmp_path / "store"
    with Store(where, "client"):
        command = [sys.executable, "-c", OPEN, str(where)]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 6
        assert second.stdout == f"{where} is in use by another process\n"
        with pytest.raises(RefusedError, match="in use"):  # nor twice in one process
            Store(where, "client")
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    where = tmp_path / "store"
    before = os.umask(0)
    try:
        with Store(where, "client") as kept:
            mine = stock(kept, entry(kept))
            mine.begin(mine.plan(1, claim=False))
            mine.add(0, b"secret")
    finally:
        os.umask(before)
    for path in (where, *where.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    where.chmod(0o750)
    with pytest.raises(RefusedError, match="chmod 700"):
        Store(where, "client")


def test_a_copy_is_refused_and_a_moved_store_is_not(tmp_path: Path) -> None:
    where = tmp_path / "store"
    Store(where, "client").close()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(where), str(copy)], check=True)
    with pytest.raises(RefusedError, match="is a copy or was restored from one"):
        Store(copy, "client")
    where.rename(tmp_path / "moved")
    Store(tmp_path / "moved", "client").close()
    # Restored in its old place, from a backup.
    shutil.rmtree(tmp_path / "moved")
    shutil.copytree(copy, tmp_path / "moved")
    with pytest.raises(RefusedError, match="is a copy or was restored from one"):
        Store(tmp_path / "moved", "client")
    os.replace(copy / ledger.FILE, tmp_path / "moved" / ledger.FILE)
    with pytest.raises(RefusedError, match="is a copy or was restored from one"):
        Store(tmp_path / "moved", "client")


def test_directories_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="neither empty nor a store"):
        Store(tmp_path, "client")
    with pytest.raises(PiError, match="cannot use"):
        Store(tmp_path / "thesis.tex" / "x", "client")
    where = tmp_path / "store"
    Store(where, "client").close()
    with pytest.raises(RefusedError, match="a client's store, not a server's"):
        Store(where, "server")
    with open(where / ledger.FILE, "r+b") as file:
        file.write(b"not a database")
    with pytest.raises(IntegrityError, match="damaged"):
        Store(where, "client")


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    where = tmp_path / "store"
    with Store(where, "client") as kept:
        mine = stock(kept, entry(kept))
        mine.begin(mine.plan(4, claim=False))
        for inference in range(3):
            mine.add(inference, b"item")
        mine.begin(mine.plan(2, claim=True))  # and killed before it read them
        left = mine.entry
    folder = where / left.pair
    (folder / ".0000000003.item.99.tmp").write_bytes(b"half")
    (folder / "0000000009.item").write_bytes(b"never given out")
    unknown = where / ("f" * 32)
    unknown.mkdir()
    (unknown / "0000000000.item").write_bytes(b"of a pair that is not in the ledger")
    with Store(where, "client") as kept:
        mine = stock(kept, left)
        assert mine.ids == (2,) and not unknown.exists()
        assert [path.name for path in folder.iterdir()] == ["0000000002.item"]


def test_a_full_disk_is_named_and_burns(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the item's write fails half way."""
    where = tmp_path / "store"
    with Store(where, "client") as kept:
        made = entry(kept)
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from pi_system.backends.fss.store import Store\n"
        "from pi_system.errors import PiError\n"
        "class Raw:\n"
        "    encode = staticmethod(lambda inference, item: item)\n"
        "store = Store(Path(sys.argv[1]), 'client')\n"
        "stock = store.stock(store.ledger.get(sys.argv[2]), Raw())\n"
        "stock.begin(stock.plan(3, claim=False))\n"
        "stock.add(0, bytes(1000))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "try:\n"
        "    stock.add(1, bytes(1 << 20))\n"
        "except PiError as error:\n"
        "    print(error)\n"
        "try:\n"
        "    for _ in range(1000):\n"
        "        stock.begin(stock.plan(1, claim=True))\n"
        "except PiError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(where), made.pair, str(1 << 18)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first.startswith("cannot write ") and "File too large; make space" in first
    assert "cannot write the ledger" in second
    with Store(where, "client") as kept:
        after = kept.ledger.get(made.pair)
        assert after is not None and after.next >= 3 and after.burnt >= 0
        mine = stock(kept, after)
        assert mine.ids == () and mine.plan(1, claim=True).made.start >= 3
        assert not list((where / made.pair).iterdir())


# -- items ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items() -> dict[str, Any]:
    """An item of each party as one session made it."""
    with Sessions(GRAPH) as sessions:
        sessions.prepare(1)
        public = sessions.client._public
        stocks = sessions.client._stock(), sessions.server._stock()
        shelves: Any = [each._shelf for each in stocks]
        client, server = (shelf._items[0] for shelf in shelves)
    return {"public": public, "client": client, "server": server}


def encoded(items: dict[str, Any], role: str, **changes: Any) -> bytes:
    codec = {"client": ClientCodec, "server": ServerCodec}[role]
    pair, inference = changes.pop("pair", "0" * 32), changes.pop("inference", 0)
    public = dataclasses.replace(items["public"], **changes)
    return codec(public, pair).encode(inference, items[role])


@pytest.mark.parametrize("role", ["client", "server"])
def test_an_item_comes_back_as_it_was(items: dict[str, Any], role: str) -> None:
    codec: Any = {"client": ClientCodec, "server": ServerCodec}[role](items["public"], "0" * 32)
    again = codec.decode(0, bytearray(encoded(items, role)))
    assert type(again) is (ClientMaterial if role == "client" else ServerMaterial)

    def same(a: Any, b: Any) -> None:
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and np.array_equal(a, b) and b.flags.c_contiguous
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                same(a[key], b[key])
        elif isinstance(a, tuple):
            for x, y in zip(a, b, strict=True):
                same(x, y)
        elif dataclasses.is_dataclass(a):
            for field in dataclasses.fields(a):
                same(getattr(a, field.name), getattr(b, field.name))
        else:
            assert a == b

    same(items[role], again)


def test_material_of_something_else_is_refused_by_name(items: dict[str, Any]) -> None:
    codec = ClientCodec(items["public"], "0" * 32)
    longer = dataclasses.replace(PLAN, retry_rate=0.5)
    rows: list[tuple[dict[str, Any], str]] = [
        ({"model": "ab" * 32}, "another model: abab"),
        ({"plan": longer}, "another plan: "),
        ({"pair": "f" * 32}, "another pair of client and server: ffff"),
        ({"inference": 7}, "another inference: 7, here 0"),
        ({"batch": 2}, "another batch size: 2, here 1"),
    ]
    cases = [(encoded(items, "client", **change), word) for change, word in rows]
    cases.append((encoded(items, "server"), "another party: server, here client"))
    for data, word in cases:
        with pytest.raises(RefusedError, match=word):
            codec.decode(0, bytearray(data))


def test_damaged_and_cut_items_are_refused(items: dict[str, Any]) -> None:
    good = encoded(items, "client")
    codec = ClientCodec(items["public"], "0" * 32)
    codec.decode(0, bytearray(good))
    rng = random.Random(1)
    for at in (*range(256), *(rng.randrange(256, len(good)) for _ in range(200))):
        data = bytearray(good)
        data[at] ^= 1 << rng.randrange(8)
        with pytest.raises(RefusedError):
            codec.decode(0, data)
    for size in (0, 1, 255, 256, 257, len(good) // 2, len(good) - 1):
        with pytest.raises(IntegrityError):
            codec.decode(0, bytearray(good[:size]))
    with pytest.raises(IntegrityError):
        codec.decode(0, bytearray(good + b"\0"))


# -- sessions -------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Callable[[], Stores]]:
    """Both parties' stores on disk, closed and opened again at each call."""
    yield from _stores(tmp_path / "client", tmp_path / "server")


@pytest.fixture(params=["disk", "postgres"])
def any_stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Stores]]:
    """The same, with the server's on disk or in a database."""
    shared = request.param == "postgres"
    server = request.getfixturevalue("database") if shared else tmp_path / "server"
    yield from _stores(tmp_path / "client", server)


def _stores(client: Path, server: Path | Database) -> Iterator[Callable[[], Stores]]:
    current: list[Store] = []

    def again() -> Stores:
        for kept in current:
            kept.close()
        current[:] = [Store(client, "client"), Store(server, "server")]
        return current[0], current[1]

    yield again
    for kept in current:
        kept.close()


def right(sessions: Sessions, graph: Graph = GRAPH) -> None:
    x = images(graph, 1)
    assert np.abs(sessions.online(x) - run(graph, x)).max() < ROUNDINGS * 2.0**-PLAN.f_x


def test_material_of_one_session_serves_later_ones_without_a_dealer(
    any_stores: Callable[[], Stores],
) -> None:
    with Sessions(GRAPH, stores=any_stores()) as sessions:
        assert sessions.prepare(3) == 3
        assert sessions.prepare(2) == 5
    for left in (3, 1):
        with Sessions(GRAPH, stores=any_stores(), dealer_takes_part=False) as sessions:
            for _ in range(2):
                sessions.offline(1)
                right(sessions)
            assert sessions.client.stock == sessions.server.stock == left
            with pytest.raises(UsageError, match="only a session with a dealer"):
                sessions.client.prepare(1)
    with (
        Sessions(GRAPH, stores=any_stores(), dealer_takes_part=False) as sessions,
        pytest.raises(RefusedError, match="1 items of one-time material are in stock for 2"),
    ):
        sessions.offline(2)
    with Sessions(GRAPH, stores=any_stores()) as sessions:  # the rest is made
        sessions.offline(3)
        for _ in range(3):
            right(sessions)


def test_a_store_has_a_limit_for_each_client(tmp_path: Path) -> None:
    with (
        Store(tmp_path / "client", "client") as kept,
        Store(tmp_path / "server", "server", limit=3) as held,
        Sessions(GRAPH, stores=(kept, held)) as sessions,
    ):
        assert sessions.prepare(2) == 2
        with pytest.raises(UsageError, match="over the limit of 3"):
            sessions.client.prepare(2)
        with pytest.raises(RefusedError, match="over the server's limit of 3"):
            sessions.server.prepare(2)


def test_a_client_that_keeps_nothing_gets_material_for_its_session_alone(
    any_stores: Callable[[], Stores],
) -> None:
    for chosen in (lambda a, b: (a, None), lambda a, b: (None, b)):
        with Sessions(GRAPH, stores=chosen(*any_stores())) as sessions:
            assert sessions.prepare(2) == 2
            sessions.offline(3)
            right(sessions)
        with Sessions(GRAPH, stores=any_stores()) as sessions:
            assert sessions.client.stock == 0


def test_another_plan_batch_or_server_has_a_stock_of_its_own(
    any_stores: Callable[[], Stores], tmp_path: Path
) -> None:
    with Sessions(GRAPH, stores=any_stores()) as sessions:
        sessions.prepare(2)
    other, _ = planned(residual(seed=1))
    with Sessions(other, stores=any_stores()) as sessions:
        assert sessions.client.stock == 0
        sessions.prepare(1)
    with Sessions(GRAPH, Options(batch=2), stores=any_stores()) as sessions:
        assert sessions.client.stock == 0
    kept, _ = any_stores()
    with (
        Store(tmp_path / "another", "server") as another,
        Sessions(GRAPH, stores=(kept, another)) as sessions,
    ):
        assert sessions.client.stock == 0
    for graph, count in ((GRAPH, 2), (other, 1)):
        with Sessions(graph, stores=any_stores(), dealer_takes_part=False) as sessions:
            assert sessions.client.stock == sessions.server.stock == count


def test_what_only_one_side_still_has_is_dropped(
    stores: Callable[[], Stores], tmp_path: Path
) -> None:
    with Sessions(GRAPH, stores=stores()) as sessions:
        sessions.prepare(4)
    (file,) = (tmp_path / "client").glob("*/0000000001.item")
    file.unlink()
    (file,) = (tmp_path / "server").glob("*/0000000002.item")
    file.unlink()
    with Sessions(GRAPH, stores=stores(), dealer_takes_part=False) as sessions:
        assert sessions.client._stock().ids == sessions.server._stock().ids == (0, 3)
        sessions.offline(2)
        right(sessions)
        right(sessions)


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_damaged_item_is_refused_and_burnt_and_the_next_is_used(
    stores: Callable[[], Stores], tmp_path: Path, role: str
) -> None:
    with Sessions(GRAPH, stores=stores()) as sessions:
        sessions.prepare(2)
    (file,) = (tmp_path / role).glob("*/0000000000.item")
    with open(file, "r+b") as target:
        target.seek(-1000, os.SEEK_END)
        target.write(b"damage")
    with (
        Sessions(GRAPH, stores=stores(), dealer_takes_part=False) as sessions,
        pytest.raises(RefusedError, match="is damaged: its hash does not fit"),
    ):
        sessions.offline(1)
    with Sessions(GRAPH, stores=stores(), dealer_takes_part=False) as sessions:
        assert sessions.client._stock().ids == (1,)
        sessions.offline(1)
        right(sessions)


class Backup:
    """The files of a store, and the same put back into the same files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.content = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    def restore(self) -> None:
        for path, data in self.content.items():
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.truncate()
                file.write(data)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("role", ["client", "server"])
def test_a_store_restored_into_its_own_files_is_refused_or_harmless(
    stores: Callable[[], Stores], tmp_path: Path, role: str, steps: int
) -> None:
    """Inodes and birth times are the old ones; the other side knows better."""
    with Sessions(GRAPH, stores=stores()) as sessions:
        sessions.prepare(6)
    stores()
    backup = Backup(tmp_path / role)
    with Sessions(GRAPH, stores=stores(), dealer_takes_part=False) as sessions:
        for _ in range(steps):
            sessions.offline(1)
            right(sessions)
    stores()[role == "server"].close()
    backup.restore()
    if (role, steps) == ("server", 1):
        # As if the last step had not arrived: the client's ids hold.
        with Sessions(GRAPH, stores=stores(), dealer_takes_part=False) as sessions:
            assert sessions.server._stock().ids == (1, 2, 3, 4, 5)
            assert sessions.server._stock().entry.burnt == 0
            sessions.offline(1)
            right(sessions)
            assert sessions.client._claimed.used == 1
        return
    with pytest.raises(RefusedError, match="restored from a copy"):
        Sessions(GRAPH, stores=stores(), dealer_takes_part=False)


def test_two_copies_of_a_client_that_take_turns_are_refused(
    stores: Callable[[], Stores], tmp_path: Path
) -> None:
    """Even where the second has given out as many ids as the first."""
    with Sessions(GRAPH, stores=stores()) as sessions:
        sessions.prepare(1)
    stores()[0].close()
    fork = Backup(tmp_path / "client")
    with Sessions(GRAPH, stores=stores()) as sessions:
        sessions.prepare(1)
    kept, _ = stores()
    kept.close()
    fork.restore()
    kept, held = stores()
    (row,) = kept.ledger._db.execute("SELECT pair FROM pair").fetchall()  # type: ignore[attr-defined]
    mine = kept.ledger.get(row[0])
    assert mine is not None
    kept.ledger.advance(mine, dataclasses.replace(mine, next=mine.next + 1))
    with pytest.raises(RefusedError, match="do not share the last state"):
        Sessions(GRAPH, stores=(kept, held))


def test_a_server_that_lost_its_pairs_is_refused(
    stores: Callable[[], Stores], tmp_path: Path
) -> None:
    stores()[1].close()
    empty = Backup(tmp_path / "server")
    with Sessions(GRAPH, stores=stores()) as sessions:
        sessions.prepare(1)
    stores()[1].close()
    empty.restore()
    with pytest.raises(RefusedError, match="does not know the client's pair"):
        Sessions(GRAPH, stores=stores())


def test_the_online_phase_writes_nothing(stores: Callable[[], Stores], tmp_path: Path) -> None:
    kept, held = stores()
    with Sessions(GRAPH, stores=(kept, held)) as sessions:
        sessions.prepare(2)
        sessions.offline(2)
        statements: list[str] = []
        for each in (kept, held):
            each.ledger._db.set_trace_callback(statements.append)  # type: ignore[attr-defined]
        _calls.clear()
        _watching.append(True)
        before = _state(tmp_path)
        right(sessions)
        right(sessions)
        assert (statements, _calls, _state(tmp_path)) == ([], [], before)
        sessions.prepare(1)  # which all of these would notice
        _watching.clear()
        assert statements and _calls and _state(tmp_path) != before


_watching: list[bool] = []
_calls: list[str] = []
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in _EVENTS:
        _calls.append(event)


sys.addaudithook(_hook)


def _state(root: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.stat()
        found[str(path)] = (status.st_mtime_ns, status.st_size)
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"burnt": "x"}, {"burnt": -2}, {"burnt": None}, {"next": True}, {"next": 1 << 53},
        {"ids": 3}, {"ids": [[1]]}, {"ids": "ab"}, {"link": 5}, {"pending": "x"}, {"more": 1},
    ],
)  # fmt: skip
def test_a_client_that_says_nonsense_of_its_store_is_a_protocol_error(
    change: dict[str, object],
) -> None:
    name = "0" * 32
    good = {"pair": name, "link": name, "pending": None, "next": 0, "burnt": -1, "ids": []}
    assert pairing.Claim.from_json(good) is not None
    with pytest.raises(ProtocolError):
        pairing.Claim.from_json({**good, **change})
