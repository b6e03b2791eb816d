"""Material made before it is asked for: once per seed, bounded, and the same as any other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pi_system.backends.fss.ahead import Ahead, Held, parse
from pi_system.errors import ProtocolError


class Kept:
    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def send(self, data: Any) -> None:
        self.messages.append(bytes(data))

    def send_array(self, array: Any) -> None:
        raise AssertionError("a held message is bytes")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_each_is_made_once_and_handed_out_once_for_its_own_seed() -> None:
    made: list[tuple[bytes, int]] = []

    def make(seed: bytes, inference: int) -> Held:
        made.append((seed, inference))
        held = Held()
        held.outlet("server").send(seed)
        held.outlet("client").send_array(np.array([inference], np.uint64))
        held.outlet("server").send(b"last")
        return held

    ahead = Ahead(make, 2)
    ahead.want({7: b"g", 5: b"e", 6: b"f"})
    until(lambda: len(made) == 2)  # 5 and 6; no more than the limit
    held = ahead.take(5, b"e")
    assert held is not None
    server, client = Kept(), Kept()
    held.release(server, client)
    assert server.messages == [b"e", b"last"] and client.messages == [b"\5" + bytes(7)]
    assert ahead.take(5, b"e") is None  # once
    assert ahead.take(6, b"x") is None and ahead.take(6, b"f") is None  # another seed: forgotten
    assert ahead.take(7, b"g") is None
    time.sleep(0.05)
    assert made == [(b"e", 5), (b"f", 6)]
    ahead.close()
    assert not any(thread.name == "ahead" for thread in threading.enumerate())


def test_one_that_is_being_made_is_waited_for_and_a_failure_is_no_end() -> None:
    go = threading.Event()

    def make(seed: bytes, inference: int) -> Held:
        go.wait(5)
        if inference == 2:
            raise ValueError
        return Held()

    ahead = Ahead(make, 8)
    ahead.want({1: b"a", 2: b"b", 3: b"c"})
    threading.Timer(0.1, go.set).start()
    assert ahead.take(1, b"a") is not None
    assert ahead.take(2, b"b") is None
    until(lambda: 3 in ahead._made)
    assert ahead.take(3, b"c") is not None
    ahead.close()


@pytest.mark.parametrize(
    "value",
    [None, 3, [1], [[1, "00"]], [["1", "00" * 16]], [[-1, "00" * 16]], [[1, 5]],
     [[i, "00" * 16] for i in range(65)]],
)  # fmt: skip
def test_seeds_that_are_none(value: Any) -> None:
    with pytest.raises(ProtocolError, match="no valid seeds"):
        parse(value)
    assert parse([[3, "ab" * 16]]) == {3: b"\xab" * 16}
