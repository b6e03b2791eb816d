"""Emulated networks: delay, bandwidth and loss put on a real connection, without privileges.

A :class:`Shaped` socket stands between a channel and its socket. The sender knows when each of
its bytes would leave a link of the given rate and stamps them with the time of their arrival;
the receiver, on the same machine and so on the same clock, hands them out no earlier. Whatever
the machine itself needs to carry the bytes is hidden in that time, so the link is as asked for
and not slower by the cost of emulating it. Both ends of a connection must be shaped.

What is modelled, per direction: propagation (half the round trip), a link that sends one packet
after another at its rate (headers included), TCP's congestion window (it starts with ten
packets and grows by what is acknowledged while it is the limit), and loss (a lost packet comes
one round trip later, or after a retransmission timeout where too little follows it). Not
modelled: queues that overflow, other traffic, jitter.
"""

from __future__ import annotations

import ctypes
import math
import random
import re
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UsageError

SEGMENT: Final = 1448
"""Payload bytes of a full TCP packet on Ethernet, with timestamps."""
HEADERS: Final = 52
"""Bytes of its IP and TCP headers."""
FIRST_WINDOW: Final = 10
"""Packets in flight at the start (RFC 6928)."""
MIN_TIMEOUT: Final = 0.2
"""Seconds of the shortest retransmission timeout on Linux."""

_CHUNK: Final = 1 << 16
_STAMP: Final = struct.Struct("<dI")
_SPIN: Final = 4e-5
"""Seconds a wait ends with asking for the time: about what waking up takes."""
_OWN_WORK: Final = 2e-5
"""Seconds of a message's way through both ends of a channel, which are part of the delay."""
_SET_TIMER_SLACK: Final = 29
_WOULD_BLOCK: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_OWN: Final = re.compile(r"([0-9.]+):([0-9.]+)(?::([0-9.]+))?")


@dataclass(frozen=True)
class Link:
    """A symmetric link.

    Attributes:
        rtt_ms: round trip, milliseconds, of an empty message.
        mbps: 10^6 bits per second, each direction.
        loss: fraction of packets lost.
    """

    name: str
    rtt_ms: float
    mbps: float
    loss: float = 0.0


PRESETS: Final = {"lan": Link("lan", 0.3, 1000.0), "wan": Link("wan", 40.0, 100.0)}


def parse(text: str) -> Link | None:
    """``loopback`` (None), ``lan``, ``wan`` or ``RTT:MBPS[:LOSS]`` in ms, Mbit/s and a fraction.

    Raises:
        UsageError: anything else.
    """
    if text == "loopback":
        return None
    if text in PRESETS:
        return PRESETS[text]
    match = _OWN.fullmatch(text)
    try:
        rtt, mbps, loss = (float(part or 0) for part in match.groups()) if match else (0, 0, 0)
    except ValueError:
        rtt = mbps = loss = 0.0
    if not (0 <= rtt <= 10_000 and 0.01 <= mbps <= 1_000_000 and 0 <= loss < 0.5):
        raise UsageError(
            f"no network {text!r}: give loopback, {', '.join(PRESETS)} or RTT:MBPS[:LOSS] "
            "(milliseconds, at most 10000; Mbit/s, 0.01 to 1000000; fraction lost, below 0.5)"
        )
    return Link(text, rtt, mbps, loss)


class Schedule:
    """When the bytes sent in one direction arrive."""

    def __init__(self, link: Link, chance: random.Random | None = None) -> None:
        self._delay = link.rtt_ms / 2000
        self._per_byte = 8 / (link.mbps * 1e6)
        self._loss = link.loss
        self._chance = chance or random.Random()
        self._free = 0.0
        self._latest = 0.0
        self._window = FIRST_WINDOW * SEGMENT
        self._in_flight = 0
        self._acks: deque[tuple[float, int]] = deque()
        self._growing = 0

    def arrival(self, size: int, now: float) -> float:
        """The time at which all of ``size`` bytes, handed over at ``now``, have arrived."""
        if not self._loss and self._at_once(size, now):
            return self._latest
        left = size
        while left > 0:
            segment = min(left, SEGMENT)
            left -= segment
            start = self._admit(segment, max(now, self._free))
            self._free = start + (segment + HEADERS) * self._per_byte
            arrives = self._free + self._delay
            while self._loss and self._chance.random() < self._loss:
                # A loss is noticed by three packets behind it, else by a timeout.
                wait = 2 * self._delay
                arrives += wait if left >= 3 * SEGMENT else max(MIN_TIMEOUT, 2 * wait)
            self._latest = max(self._latest, arrives)
            self._in_flight += segment
            self._acks.append((self._latest + self._delay, segment))
        return self._latest

    def _at_once(self, size: int, now: float) -> bool:
        """Schedule everything as one, where the window has room for it."""
        start = max(now, self._free)
        self._acknowledge(start)
        if self._in_flight + size > self._window:
            return False
        packets = -(-size // SEGMENT)
        self._free = start + (size + packets * HEADERS) * self._per_byte
        self._latest = self._free + self._delay
        self._in_flight += size
        self._acks.append((self._latest + self._delay, size))
        return True

    def _admit(self, size: int, now: float) -> float:
        """When the window lets ``size`` bytes go."""
        self._acknowledge(now)
        while self._in_flight + size > self._window and self._acks:
            self._growing = len(self._acks)
            now = max(now, self._acks[0][0])
            self._acknowledge(now)
        return now

    def _acknowledge(self, now: float) -> None:
        while self._acks and self._acks[0][0] <= now:
            _, size = self._acks.popleft()
            self._in_flight -= size
            if self._growing:
                self._growing -= 1
                self._window += size


class Shaped:
    """A non-blocking socket at one end of an emulated link; for :class:`~.channel.Channel`."""

    def __init__(self, sock: socket.socket, link: Link) -> None:
        self._socket = sock
        self._schedule = Schedule(link)
        self._stamp = b""
        self._owed = 0
        self._raw = bytearray()
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._ended = False

    def send(self, data: memoryview | bytes) -> int:
        """Hand over the front of ``data``; the rest must be offered again.

        Raises:
            BlockingIOError: nothing can be taken now.
        """
        view = memoryview(data)
        if not self._owed:
            self._owed = min(len(view), _CHUNK)
            due = self._schedule.arrival(self._owed, time.monotonic()) - _OWN_WORK
            self._stamp = _STAMP.pack(due, self._owed)
        piece = view[: self._owed]
        stamp, self._stamp = self._stamp, b""
        try:
            sent = self._socket.send(stamp + bytes(piece) if stamp else piece)
        except _WOULD_BLOCK:
            self._stamp = stamp
            raise
        if sent < len(stamp):
            self._stamp = stamp[sent:]
            raise BlockingIOError
        taken = sent - len(stamp)
        self._owed -= taken
        if not taken:
            raise BlockingIOError
        return taken

    def recv_into(self, target: memoryview | bytearray) -> int:
        """Bytes that have arrived; 0 at the end of the connection.

        Raises:
            BlockingIOError: none have, yet.
        """
        if not self._queue or self._queue[0][0] > time.monotonic():
            self._drain()
        if not self._queue:
            if self._ended:
                return 0
            raise BlockingIOError
        due, data = self._queue[0]
        if due > time.monotonic():
            raise BlockingIOError
        count = min(len(data), len(target))
        memoryview(target)[:count] = data[:count]
        if count == len(data):
            self._queue.popleft()
        else:
            self._queue[0] = (due, data[count:])
        return count

    def wait(self, reading: bool, writing: bool, seconds: float) -> None:
        """Wait until one of the two may be possible, or ``seconds`` (or infinity) are over."""
        if reading and self._queue:
            seconds = min(seconds, self._queue[0][0] - time.monotonic())
            if not writing:
                _sleep(seconds)
                return
        poll = select.poll()
        events = (select.POLLIN if reading else 0) | (select.POLLOUT if writing else 0)
        poll.register(self._socket, events)
        poll.poll(None if math.isinf(seconds) else math.ceil(max(0.0, seconds) * 1000))

    def _drain(self) -> None:
        """Take what the socket holds, so that the sender is not held up by this side's buffer."""
        while not self._ended:
            try:
                data = self._socket.recv(4 * _CHUNK)
            except _WOULD_BLOCK:
                break
            self._ended = not data
            self._raw += data
        while len(self._raw) >= _STAMP.size:
            due, size = _STAMP.unpack_from(self._raw)
            end = _STAMP.size + size
            if len(self._raw) < end:
                break
            self._queue.append((due, memoryview(bytes(self._raw[_STAMP.size : end]))))
            del self._raw[:end]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def _sleep(seconds: float) -> None:
    """Sleep, exact to a few microseconds.

    Most of it is slept even where it is short: the peer that is waited for may need the processor.
    """
    end = time.monotonic() + seconds
    if seconds > _SPIN:
        if not hasattr(_exact, "timers"):
            _exact.timers = _without_timer_slack()
        time.sleep(seconds - _SPIN)
    while time.monotonic() < end:
        pass


_exact: Final = threading.local()


def _without_timer_slack() -> bool:
    """Have this thread woken when it asked for, not up to 50 us later; whether that is possible."""
    try:
        return bool(ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):  # no Linux
        return False
