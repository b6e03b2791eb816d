"""One-time material: laid in ahead, claimed, and so burnt, before anything depends on it.

Used twice, an item gives the server the difference of two images and the client the difference
of two activations at every layer, from which a first layer's weights follow. So:

**Claim = burn.** A claim first moves the ledger's ``burnt`` up to the claimed id, durably, on the
client's side and then on the server's; only then is the item read, its file removed, and a byte
sent that depends on it. It exists in memory alone from there on. All ids up to ``burnt`` are spent
whatever happens: a process killed at any instruction either did not move ``burnt``, and then
nothing was sent, or did, and then no later process reads the item. Files are no part of the
argument: one that a crash left behind has a burnt id and is deleted when the store is opened.
Claims are made ahead of a query, so that the online phase writes nothing.

**Ids only increase.** ``next`` moves, durably, before material of the ids below it is made, so a
crash leaves a gap and never a second item of one id.

**One writer.** A directory's ledger is locked from opening to closing (:mod:`.ledger`); in a shared
database every change is a comparison with what its session last saw (:mod:`.postgres`). Within a
process a later session of a pair ends the claims of an earlier one.

**Copies.** A copy of a directory has other inodes and birth times than its ledger remembers and
is refused. An older ledger written back over the same file has not; it is found by the peer: every
change of an entry is a step of a chain of random links that client and server walk together (the
client first: it notes the new link as pending, the server takes it over, and its confirmation
is noted with the next step). At the beginning of a session the server's link must be the
client's or its pending one, and the client's ids must not lie below the server's. A client put back
by one step or more has a link that the server has left: refused. A server put back by two steps or
more has a link that the client has left: refused. A server put back by exactly the last step looks
as if that step had been lost on the way; then, as after a real loss, the client's higher ids hold
on both sides, which burns what the step burnt. Two copies of a client that take turns are the
first case. **Not found** is one thing: client and server both put back to one moment, each in a
way that keeps inodes and birth times (snapshots of whole disks or machines). Do not snapshot or
back up stores; losing one costs only material.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from ...errors import ProtocolError, RefusedError, UsageError
from ..base import Database
from .depot import Depot, Directory, Memory, Shelf, is_name
from .ledger import Entry, Ledger, new_id
from .material import Codec

Item = TypeVar("Item")


@dataclass(frozen=True)
class Step:
    """One change of a pair's entry, that the client makes first and the server after it.

    Attributes:
        kept: ids of items in stock that are claimed.
        made: new ids, for material that is to be made.
        claim: whether ``made`` is claimed at once, and so never laid in.
        link: the entry's next link.
    """

    kept: tuple[int, ...]
    made: range
    claim: bool
    link: str

    def to_json(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "first": self.made.start,
            "count": len(self.made),
            "claim": self.claim,
            "link": self.link,
        }

    @classmethod
    def from_json(cls, data: Any) -> Step:
        """What a client sent.

        Raises:
            ProtocolError: it is no step.
        """
        try:
            kept, first, count = tuple(data["kept"]), data["first"], data["count"]
            claim, link = data["claim"], data["link"]
        except (TypeError, KeyError) as error:
            raise ProtocolError("the client sent no request for material") from error
        numbers = (*kept, first, count)
        if not all(type(number) is int and 0 <= number < 1 << 53 for number in numbers):
            raise ProtocolError("the client's request holds no inference ids")
        if type(claim) is not bool or not is_name(link):
            raise ProtocolError("the client's request has no valid link")
        return cls(kept, range(first, first + count), claim, link)


class Stock(Generic[Item]):
    """One party's items of one pair, as one session uses them.

    Made by :meth:`Store.stock`. The client plans a step and makes it (:meth:`begin`), the
    server follows, the client notes that it did (:meth:`confirm`).

    Attributes:
        limit: items it may hold.
    """

    def __init__(self, entry: Entry, shelf: Shelf[Item]) -> None:
        self._stored = entry
        self._link = entry.link
        self._shelf = shelf
        self._over = ""
        self.limit = Store.DEFAULT_LIMIT
        stale = [i for i in shelf.ids() if not entry.burnt < i < entry.next]
        shelf.drop(stale)
        self._ids = shelf.ids()

    @property
    def entry(self) -> Entry:
        """As the ledger holds it."""
        return self._stored

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the items in stock, in increasing order."""
        return tuple(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def revoke(self) -> None:
        """Another session has the pair now."""
        self._over = f"another session has taken over pair {self._stored.pair[:8]}"

    def settle(self, ids: Iterable[int], *, next_id: int, burnt: int, link: str) -> None:
        """Begin a session: take over the other side's higher ids, keep the items both have."""
        entry = self._stored
        higher = dataclasses.replace(
            entry, next=max(entry.next, next_id), burnt=max(entry.burnt, burnt)
        )
        if higher != entry:
            self._replace(higher)
        self._link = link
        both = {i for i in ids if i > higher.burnt}.intersection(self._ids)
        self._shelf.drop(set(self._ids) - both)
        self._ids = sorted(both)

    def plan(self, count: int, *, claim: bool) -> Step:
        """The step that claims ``count`` items, made where stock ends, or lays in as many."""
        kept = tuple(self._ids[:count]) if claim else ()
        first = self._stored.next
        return Step(kept, range(first, first + count - len(kept)), claim, new_id())

    def begin(self, step: Step) -> None:
        """The client's half, durable on return."""
        self._advance(step, link=self._link, pending=step.link)

    def follow(self, step: Step, count: int, *, claim: bool) -> None:
        """The server's half, durable on return.

        Raises:
            RefusedError: the step is not the one that this stock leads to.
        """
        mine = dataclasses.replace(self.plan(count, claim=claim), link=step.link)
        if step != mine:
            raise RefusedError(
                f"the client's step does not follow here: it names ids {_brief(step)}, "
                f"next here are {_brief(mine)}; ids only increase"
            )
        self._advance(step, link=step.link, pending=None)
        self._link = step.link

    def confirm(self, step: Step) -> None:
        """The server has followed; the ledger will say so with the next step."""
        self._link = step.link

    def _advance(self, step: Step, *, link: str, pending: str | None) -> None:
        self._check()
        entry = self._stored
        burnt = entry.burnt
        if step.claim:
            burnt = max((burnt, *step.kept[-1:], *step.made[-1:]))
        after = dataclasses.replace(
            entry, next=max(entry.next, step.made.stop), burnt=burnt, link=link, pending=pending
        )
        self._replace(after, step.kept)
        if step.claim:
            self._ids = [i for i in self._ids if i > burnt]

    def _replace(self, after: Entry, claimed: tuple[int, ...] = ()) -> None:
        try:
            self._shelf.advance(self._stored, after, claimed)
        except BaseException:
            # Whether the ledger has the change may be unknown: what it claims counts as burnt.
            self._over = f"a change of pair {self._stored.pair[:8]} failed; begin a new session"
            raise
        self._stored = after

    def load(self, inference: int) -> Item:
        """The item of a claimed id; its file is gone on return, whatever the outcome.

        Raises:
            RefusedError: it is missing, damaged or not this pair's.
        """
        assert inference <= self._stored.burnt
        self._check()
        return self._shelf.take(inference)

    def add(self, inference: int, item: Item) -> None:
        """Lay in the material of an id that was given out.

        Raises:
            RefusedError: the id is burnt, in stock or was not given out.
            PiError: it cannot be written.
        """
        self._check()
        if not self._stored.burnt < inference < self._stored.next or inference in self._ids:
            raise RefusedError(f"inference {inference} cannot be filled: burnt, full or unknown")
        self._shelf.put(inference, item)
        self._ids = sorted((*self._ids, inference))

    def _check(self) -> None:
        if self._over:
            raise RefusedError(self._over)


class Claimed(Generic[Item]):
    """Items that are burnt and not used yet, in memory; each is handed out once, in order."""

    def __init__(self) -> None:
        self._items: dict[int, Item] = {}
        self._used = -1

    def __len__(self) -> int:
        return len(self._items)

    @property
    def used(self) -> int:
        """The highest id handed out, -1 for none."""
        return self._used

    def add(self, inference: int, item: Item) -> None:
        if inference <= self._used or inference in self._items:
            raise RefusedError(f"inference {inference} is spent; it cannot be filled again")
        self._items[inference] = item

    def take_next(self) -> tuple[int, Item]:
        """The item with the lowest id.

        Raises:
            RefusedError: there is none.
        """
        if not self._items:
            raise RefusedError("no one-time material is left; run the offline phase first")
        inference = min(self._items)
        return inference, self.take(inference)

    def take(self, inference: int) -> Item:
        """The item of ``inference``; those with lower ids are given up.

        Raises:
            RefusedError: the id was used before, or was not claimed.
        """
        if inference <= self._used:
            raise RefusedError(
                f"inference {inference} is spent (ids up to {self._used} are); "
                "one-time material is never used twice"
            )
        if inference not in self._items:
            raise RefusedError(f"there is no one-time material for inference {inference}")
        self._used = inference
        item = self._items.pop(inference)
        for skipped in [key for key in self._items if key < inference]:
            del self._items[skipped]
        return item


class Store:
    """One party's material of all its pairs.

    Attributes:
        DEFAULT_LIMIT: items kept for one pair, if nothing else is said.

    Args:
        where: a directory of this process's own, a database that it shares with others, or
            ``None`` for material that ends with the process.
        role: "client" or "server".
        limit: items kept for one pair.

    Raises:
        RefusedError: it is in use, open to others, a copy, or of the other role.
        UsageError: the directory holds other things, or the database cannot be used so.
        PeerError: the database cannot be reached.
        PiError: it cannot be written.
    """

    DEFAULT_LIMIT: Final = 256

    def __init__(
        self, where: Path | Database | None, role: str, *, limit: int = DEFAULT_LIMIT
    ) -> None:
        self.limit = limit
        self._depot = _depot(where, role)
        self._open: dict[str, Stock[Any]] = {}
        self._lock = threading.Lock()

    @property
    def ledger(self) -> Ledger:
        return self._depot.ledger

    @property
    def id(self) -> str:
        """The store's own random name."""
        return self.ledger.id

    def stock(self, entry: Entry, codec: Codec[Item]) -> Stock[Item]:
        """The stock of a pair in the ledger, for a new session of that pair.

        A session that had it before (of a client that has gone, say) can take nothing more.
        """
        self._replace(entry.pair, None)
        stock = Stock(entry, self._depot.shelf(entry.pair, codec))
        self._replace(entry.pair, stock)
        return stock

    def _replace(self, pair: str, stock: Stock[Any] | None) -> None:
        with self._lock:
            older = self._open.pop(pair, None)
            if older is not None:
                older.revoke()
            if stock is not None:
                self._open[pair] = stock

    def count(self) -> int:
        """Items in stock, of all pairs."""
        return self._depot.count()

    def close(self) -> None:
        """Give up the lock; claimed items that were not used are lost."""
        self._depot.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _depot(where: Path | Database | None, role: str) -> Depot:
    match where:
        case None:
            return Memory(role)
        case Path():
            return Directory(where, role)
        case _:
            try:
                from .postgres import Postgres
            except ImportError as error:
                raise UsageError(
                    f"--ledger needs psycopg (pip install 'pi-system[postgres]'): {error}"
                ) from error
            return Postgres(where, role)


def _brief(step: Step) -> str:
    ids = [*step.kept[:3], *step.made[:3]]
    return ", ".join(map(str, ids)) + (" ..." if len(step.kept) + len(step.made) > len(ids) else "")
