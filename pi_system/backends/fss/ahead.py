"""Material that the dealer makes before it is asked for, while its session is idle.

The client names the ids and seeds of the inferences that will come next with its request for those
that come now. A seed serves one inference, whether its material is made ahead or not; what is not
asked for ends with the session.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

from ...errors import ProtocolError
from ...net.framing import Array, Data, bytes_of
from . import prg

MOST = 64
"""Seeds that a client may name at once."""

Peer = Literal["server", "client"]


class Outlet(Protocol):
    """What :func:`.offline.deal` needs of a channel."""

    def send(self, data: Data) -> None: ...
    def send_array(self, array: Array) -> None: ...


class Held:
    """Messages to both parties, kept in their order: either may wait for the other's."""

    def __init__(self) -> None:
        self._messages: list[tuple[Peer, Data]] = []

    def outlet(self, peer: Peer) -> Outlet:
        """Takes messages for ``peer``."""
        return _Outlet(self._messages, peer)

    def release(self, server: Outlet, client: Outlet) -> None:
        """Send them all."""
        for peer, message in self._messages:
            (server if peer == "server" else client).send(message)


class _Outlet:
    def __init__(self, messages: list[tuple[Peer, Data]], peer: Peer) -> None:
        self._messages, self._peer = messages, peer

    def send(self, data: Data) -> None:
        self._messages.append((self._peer, data))

    def send_array(self, array: Array) -> None:
        little = array.astype(array.dtype.newbyteorder("<"), order="C")
        self.send(bytes_of(little))


class Ahead:
    """Makes material in a thread of its own, for at most ``limit`` inferences at a time.

    Args:
        make: the material of a seed and an inference id.
    """

    def __init__(self, make: Callable[[bytes, int], Held], limit: int) -> None:
        self._make = make
        self._limit = limit
        self._change = threading.Condition()
        self._seeds: dict[int, bytes] = {}
        self._made: dict[int, Held] = {}
        self._making: int | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def want(self, seeds: dict[int, bytes]) -> None:
        """These will be asked for next, and none of those wanted before that are not among them."""
        with self._change:
            self._seeds = dict(sorted(seeds.items())[: self._limit])
            self._made = {i: held for i, held in self._made.items() if i in self._seeds}
            if self._thread is None and self._seeds:
                self._thread = threading.Thread(target=self._run, daemon=True, name="ahead")
                self._thread.start()
            self._change.notify_all()

    def take(self, inference: int, seed: bytes) -> Held | None:
        """What was made for this id and seed, if anything; it is handed out once."""
        with self._change:
            wanted = self._seeds.pop(inference, None) == seed
            while wanted and self._making == inference:
                self._change.wait()
            held = self._made.pop(inference, None)
            return held if wanted else None

    def close(self) -> None:
        """End the thread and forget everything."""
        with self._change:
            self._closed = True
            self._seeds.clear()
            self._made.clear()
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                while not (missing := [i for i in self._seeds if i not in self._made]):
                    if self._closed:
                        return
                    self._change.wait()
                inference = self._making = missing[0]
                seed = self._seeds[inference]
            try:
                held = self._make(seed, inference)
            except BaseException:
                held = None  # the session will meet the same error when it makes this itself
            with self._change:
                self._making = None
                if held is None or self._closed:
                    self._seeds.pop(inference, None)
                else:
                    self._made[inference] = held
                self._change.notify_all()


def parse(value: Any) -> dict[int, bytes]:
    """The ids and seeds of a client's request, ``[[id, hexadecimal seed], ...]``.

    Raises:
        ProtocolError: it is no such list.
    """
    try:
        seeds = {i: bytes.fromhex(text) for i, text in value}
    except (TypeError, ValueError) as error:
        raise ProtocolError("the client named no valid seeds") from error
    sound = all(type(i) is int and 0 <= i < 1 << 53 for i in seeds)
    if not sound or len(seeds) > MOST or any(len(s) != prg.SEED_BYTES for s in seeds.values()):
        raise ProtocolError("the client named no valid seeds")
    return seeds
