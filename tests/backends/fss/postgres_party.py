"""Processes that claim from one stock in a database, for tests that race and kill them."""

from __future__ import annotations

import os
import random
import time
from typing import Any

from pi_system.backends.base import Database
from pi_system.backends.fss.ledger import Entry, new_id
from pi_system.backends.fss.store import Stock, Store
from pi_system.errors import RefusedError

PAIR = "ab" * 16


class Text:
    """A codec of short byte strings, where the material does not matter."""

    def encode(self, inference: int, item: bytes) -> bytes:
        return item

    def decode(self, inference: int, data: bytearray) -> bytes:
        return bytes(data)


def content(inference: int) -> bytes:
    return b"item %d" % inference


def fill(where: Database, count: int) -> None:
    """A pair with so many items in stock."""
    with Store(where, "server", limit=count) as store:
        first = Entry(PAIR, "", "digest", new_id())
        store.ledger.create(first)
        mine = stock(store)
        step = mine.plan(count, claim=False)
        mine.follow(step, count, claim=False)
        for inference in step.made:
            mine.add(inference, content(inference))


def stock(store: Store) -> Stock[bytes]:
    entry = store.ledger.get(PAIR)
    assert entry is not None
    codec: Any = Text()
    return store.stock(entry, codec)


def claim(where: Database, record: str, seed: int) -> None:
    """Claim one item at a time until none is left, writing down each id that was used."""
    rng = random.Random(seed)
    target = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with Store(where, "server") as store:
        while True:
            try:
                mine = stock(store)
                for _ in range(rng.randrange(1, 4)):
                    step = mine.plan(1, claim=True)
                    if step.made:
                        return
                    mine.follow(step, 1, claim=True)
                    (inference,) = step.kept
                    assert mine.load(inference) == content(inference)
                    os.write(target, b"%d\n" % inference)
            except RefusedError:
                time.sleep(rng.uniform(0, 0.01))  # another process was quicker
