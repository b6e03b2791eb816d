"""A TCP proxy that knows messages (frames, or TLS records) and breaks one of them.

Beats are none; over TLS they cannot be told, but none is sent in a session that goes on briskly.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pi_system.net.framing import ABORT, BEAT, END, HEADER

KINDS: Final = ("kill sender", "kill receiver", "reset", "stall", "truncation", "bit flip")
_FULL_RECORD: Final = 16384 + 17
_COMMAND: Final = re.compile(rb"(setup|ping|load|prepare|offline|online)( [0-9]+)?")
_PHASE: Final = {"ping": "probe", "load": "probe", "prepare": "offline"}


class Fault(NamedTuple):
    """What happens to which message.

    Attributes:
        link: the two roles, the connecting one first, as in "client-server".
        sender: of the message.
        number: of the message in that direction, from 0.
        kind: of :data:`KINDS`.
    """

    link: str
    sender: str
    number: int
    kind: str


@dataclass
class Wire:
    """What all links of one deployment share.

    Attributes:
        fault: what is to happen; ``None`` for nothing.
        hit: called with a role to kill.
        fired: when it happened (monotonic).
        phase: by the client's commands, where they can be read.
        seen: per link and sender, the phase and size of every message.
    """

    fault: Fault | None = None
    hit: Callable[[str], None] = lambda role: None
    fired: float | None = None
    phase: str = "handshake"
    seen: dict[tuple[str, str], list[tuple[str, int]]] = field(default_factory=dict)
    release: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(self, fault: Fault | None, hit: Callable[[str], None]) -> None:
        """Before a session."""
        self.release.set()
        with self.lock:
            self.release = threading.Event()
            self.fault, self.hit, self.fired = fault, hit, None
            self.phase, self.seen = "handshake", {}


class Proxy:
    """Relays connections of one link to ``target``, whose port may change between sessions."""

    def __init__(self, link: str, target: int, wire: Wire, *, tls: bool) -> None:
        self.link, self.target = link, target
        self._wire, self._tls = wire, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._join, args=(near, far), daemon=True).start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        connecting, listening = self.link.split("-")
        back = threading.Thread(
            target=self._relay, args=(far, near, listening, connecting), daemon=True
        )
        with near, far:
            back.start()
            self._relay(near, far, connecting, listening)
            back.join()

    def _relay(self, source: socket.socket, target: socket.socket, sender: str, to: str) -> None:
        wire, number = self._wire, 0
        release = wire.release
        with contextlib.suppress(OSError):
            continued = False
            while message := self._read(source):
                if not self._tls and message == HEADER.pack(BEAT):
                    target.sendall(message)
                    continue
                fault = wire.fault
                with wire.lock:
                    self._note(sender, message, continued)
                if continued:  # the rest of a message that did not fit into one record
                    number -= 1
                struck = (
                    fault is not None
                    and not continued
                    and wire.fired is None
                    and fault[:3] == (self.link, sender, number)
                )
                continued = self._tls and len(message) >= _FULL_RECORD
                number += 1
                if not struck or fault is None:
                    target.sendall(message)
                    continue
                wire.fired = time.monotonic()
                match fault.kind:
                    case "kill sender":
                        target.sendall(message)
                        wire.hit(sender)
                    case "kill receiver":
                        wire.hit(to)
                    case "stall":
                        release.wait(60)  # the bytes of this direction end here, its close too
                        _reset(source, target)
                        return
                    case "reset":
                        _reset(source, target)
                        return
                    case "truncation":
                        target.sendall(message[: (len(message) + 1) // 2])
                        for one in (target, source):
                            with contextlib.suppress(OSError):
                                one.shutdown(socket.SHUT_RDWR)
                        return
                    case "bit flip":
                        head = 5 if self._tls else HEADER.size
                        spot = head + (len(message) - head) // 2
                        broken = bytearray(message)
                        broken[min(spot, len(message) - 1)] ^= 0x10
                        target.sendall(broken)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _note(self, sender: str, message: bytes, continued: bool) -> None:
        wire = self._wire
        if not self._tls and (self.link, sender) == ("client-server", "client"):
            if message == HEADER.pack(END):
                wire.phase = "close"
            command = _COMMAND.fullmatch(message[HEADER.size :])
            if command is not None:
                verb = command[1].decode()
                wire.phase = _PHASE.get(verb, verb)
        if not continued:
            seen = wire.seen.setdefault((self.link, sender), [])
            seen.append((wire.phase, len(message)))

    def _read(self, source: socket.socket) -> bytes:
        if self._tls:
            head = _exactly(source, 5)
            return head + _exactly(source, int.from_bytes(head[3:5], "big"))
        head = _exactly(source, HEADER.size)
        if len(head) < HEADER.size:
            return head
        (size,) = HEADER.unpack(head)
        if size in (END, BEAT):
            return head
        if size == ABORT:
            head += _exactly(source, HEADER.size)
            (size,) = HEADER.unpack(head[-HEADER.size :])
        return head + _exactly(source, size)


def _exactly(source: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer at the end of the stream."""
    data = bytearray()
    while len(data) < size and (more := source.recv(min(size - len(data), 1 << 16))):
        data += more
    return bytes(data)


def _reset(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.shutdown(socket.SHUT_RD)  # wakes the thread of the other direction, sends nothing
        with contextlib.suppress(OSError):
            one.close()
