"""Sessions that race for one stock of one-time material: no item is ever handed out twice."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose

from pi_system.backends import base
from pi_system.backends.fss.ledger import Entry, new_id
from pi_system.backends.fss.store import Store
from pi_system.errors import PeerError, PiError, RefusedError
from pi_system.net.tap import Tape
from pi_system.parties.classify import prepare
from pi_system.parties.client import Client


class Text:
    """A codec of short byte strings."""

    def encode(self, inference: int, item: bytes) -> bytes:
        return item

    def decode(self, inference: int, data: bytearray) -> bytes:
        return bytes(data)


@pytest.mark.parametrize("kind", ["memory", "disk", "postgres"])
def test_threads_that_claim_from_one_pair_never_get_one_item_twice(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    codec: Any = Text()
    where: Any = {"memory": None, "disk": tmp_path / "store"}.get(kind)
    if kind == "postgres":
        where = request.getfixturevalue("database")
    with Store(where, "client", limit=1000) as store:
        first = Entry(new_id(), "", "digest", new_id())
        store.ledger.create(first)
        stock = store.stock(first, codec)
        step = stock.plan(120, claim=False)
        stock.begin(step)
        for inference in step.made:
            stock.add(inference, b"%d" % inference)
        got: list[int] = []
        start = threading.Barrier(6)

        def race(number: int) -> None:
            session, misses = 1 + number % 3, 0
            start.wait()
            while True:
                entry = store.ledger.get(first.pair)
                assert entry is not None
                try:
                    mine = store.stock(entry, codec)
                    for _ in range(session):  # some come back for more in one session
                        step = mine.plan(1, claim=True)
                        if step.made:
                            return
                        mine.begin(step)
                        (inference,) = step.kept
                        assert mine.load(inference) == b"%d" % inference
                        got.append(inference)
                        misses = 0
                except RefusedError:  # taken over by another, which is to get on, however slowly
                    misses += 1
                    time.sleep(random.uniform(0, 0.002 * 2 ** min(misses, 7)))

        threads = [threading.Thread(target=race, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert got and max(Counter(got).values()) == 1
        after = store.ledger.get(first.pair)
        assert after is not None and after.burnt == 119


def test_two_sessions_of_one_client_never_use_one_item_twice(
    deploy: Callable[..., Any], tmp_path: Path, toys: ModuleType,
    toy_images: npt.NDArray[np.float32],
) -> None:  # fmt: skip
    made = deploy("--store", str(tmp_path / "server"), backend="fss")
    backend = base.get("fss")
    base.open_store(backend, tmp_path / "client", "client")
    settings = made.client(backend=backend)
    prepare(settings, 12)
    expected = toys.forward(toys.toy_graph(), toy_images)
    used: list[tuple[int, bytes]] = []
    ended: list[PiError] = []

    def race(row: int) -> None:
        answers, until = 0, time.monotonic() + 20
        while answers < 4 and time.monotonic() < until:
            tape = Tape()
            try:
                with Client(settings) as client:
                    client.setup()
                    tape.attach(client._channels["server"])
                    while answers < 4:
                        client.offline(1)
                        logits = client.online(toy_images[row : row + 1])
                        assert_allclose(logits[0], expected[row], atol=0.05)
                        answers += 1
            except (RefusedError, PeerError) as error:  # the other session has the pair now
                ended.append(error)
                time.sleep(0.02 * row)
            finally:
                for frame in tape.frames:
                    if (frame.phase, frame.direction) == ("online", "sent") and frame.layer:
                        first = frame.layer == "input"
                        used.extend([(int.from_bytes(frame.data[:8], "little"), b"")] * first)
        assert answers == 4

    threads = [threading.Thread(target=race, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended and len(used) >= 12
    assert max(Counter(number for number, _ in used).values()) == 1
    assert made.server.stop()[0] == 0
