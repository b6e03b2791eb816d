"""A connection between two parties: length-framed messages over one TCP socket.

A frame is four bytes of length (little endian) and its payload. Sizes are checked before
anything is allocated, every wait has a limit, and a lost peer is a :class:`PeerError` whatever
the system called it. Frames are opaque here; what they mean is the backends' matter.

Limits on waiting. A peer may be silent for ``timeout`` seconds; a frame under way must moreover
keep an average of :data:`MIN_RATE`, so that a peer that trickles bytes cannot hold a party. Where
``timeout`` is long, because a peer may compute for long, signs of life are asked for meanwhile
(:mod:`.heartbeat`). A process that dies closes its socket and is noticed at once.

The socket is non-blocking and tried before it is waited for, which serves plain and TLS sockets
alike. A lock is held for each call on it: TLS bears no two threads at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from ..errors import PeerError, PeerTimeout, ProtocolError, RefusedError, UsageError
from .framing import (
    BEAT,
    BUFFER,
    END,
    HEADER,
    Array,
    Data,
    Deadline,
    Incoming,
    abort_message,
    bytes_of,
    little_endian,
)
from .framing import MAX_FRAME as MAX_FRAME
from .framing import PeerClosed as PeerClosed
from .framing import PeerLost as PeerLost
from .link import Link, Shaped
from .meter import Direction, Meter
from .tls import refused, role_of

DEFAULT_TIMEOUT: Final = 8.0

_MAX_JSON: Final = 1 << 20
_SMALL: Final = 1 << 14
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
_LOOK_UP: Final = 0.2
"""Seconds between two calls of :attr:`Channel.while_silent`."""
_OTHERS: Final = 2e-5
"""Seconds of a yield after which somebody else must have had the processor."""
_busy: Final = threading.Lock()
_UNREAD: Final = 64
"""Buffers of what the peer sent that are taken in before closing, at most."""
_WOULD_BLOCK: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Channel:
    """One connection to a peer. Not for use by several threads at once, but for :meth:`beat`
    and :meth:`cut`.

    After a failed send or receive only :meth:`abort` and :meth:`close` are of use.

    Attributes:
        peer: what the peer is called in messages and in the log ("server", "client", "dealer").
        meter: counts every frame; shared by the channels of a party.
        timeout: seconds a peer may be silent; ``None`` waits for ever.
        life: seconds it may give no sign of life, be it a beat; ``None`` where it sends none.
        spin: seconds to keep asking for bytes before sleeping until some come; see
            :meth:`spinning`.
        role: what the peer's certificate speaks for; ``None`` without TLS.
        tap: called with the direction and the payload of every whole frame (see ``net/tap.py``).
        ended: whether the peer has ended the session.
        who: the peer for limits and logs: its certificate's fingerprint or else its address, as it
            was at the beginning.
        while_silent: called several times a second with the seconds of the peer's silence, while
            its frame is waited for; may raise a :class:`PeerError`.

    With ``link``, an emulated network lies between the two (see :mod:`.link`); both ends say so.
    """

    _spinning: ClassVar = 0
    """Channels of this process within :meth:`spinning`."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        peer: str = "peer",
        meter: Meter | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        link: Link | None = None,
    ) -> None:
        self.peer = peer
        self.meter = Meter() if meter is None else meter
        self.timeout = timeout
        self.life: float | None = None
        self.spin = 0.0
        self.role = role_of(sock.getpeercert()) if isinstance(sock, ssl.SSLSocket) else None
        self.who = _who(sock)
        self.tap: Callable[[Direction, memoryview], None] | None = None
        self.while_silent: Callable[[float], None] | None = None
        self._raw = sock
        self._socket = sock if link is None else Shaped(sock, link)
        self._closed = self._failed = self.ended = False
        self._buffer = bytearray(BUFFER)
        self._start = self._end = 0
        self._ahead = 0
        self._ended = False
        self._lock = threading.Lock()
        self._sending = False
        self._unsent = b""
        self._spoke = self._heard = time.monotonic()
        if sock.family in _INTERNET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)

    # -- frames -------------------------------------------------------------------------------

    def send(self, data: Data) -> None:
        """Send one frame."""
        outgoing = self._open_frame(data)
        self._run(outgoing)

    def recv(self, limit: int = MAX_FRAME) -> bytes:
        """Receive one frame of at most ``limit`` bytes.

        Raises:
            ProtocolError: the frame is longer.
            PeerClosed: the peer has ended the session instead.
            PeerLost: the connection was closed.
            PeerTimeout, PeerError: the peer was silent for too long, or lost.
        """
        incoming = Incoming(limit=limit)
        self._run([], incoming)
        return self._received(incoming)

    def recv_into(self, buffer: Data | Array) -> None:
        """Receive one frame of exactly the size of the writable, contiguous ``buffer``."""
        incoming = Incoming(into=bytes_of(buffer))
        self._run([], incoming)
        self._count(incoming)

    def exchange(self, data: Data, limit: int = MAX_FRAME) -> bytes:
        """Send a frame and receive one at the same time, whatever their sizes.

        Both peers call this; neither waits for the other to drain its frame.
        """
        outgoing, incoming = self._open_frame(data), Incoming(limit=limit)
        self._run(outgoing, incoming)
        return self._received(incoming)

    @contextlib.contextmanager
    def spinning(self, seconds: float) -> Iterator[None]:
        """Within, a wait begins with up to ``seconds`` of asking again and again.

        Being woken costs more than most answers of a peer that computes at the same time take
        to come. A processor without other work is kept busy by this, one with other work is
        yielded at every turn, and where another process takes it the wait goes on asleep: two
        parties that ask in turns on one processor would never be moved apart. Of several threads
        of one process nobody asks: each would keep the interpreter from those that compute.
        """
        before, self.spin = self.spin, seconds
        with _busy:
            Channel._spinning += 1
        try:
            yield
        finally:
            self.spin = before
            with _busy:
                Channel._spinning -= 1

    @contextlib.contextmanager
    def reading_ahead(self, limit: int) -> Iterator[None]:
        """Within, a send that waits takes in up to ``limit`` bytes of what comes meanwhile.

        So that two parties that send more than the network holds do not wait for each other.
        """
        before, self._ahead = self._ahead, limit
        try:
            yield
        finally:
            self._ahead = before

    # -- arrays and JSON ----------------------------------------------------------------------

    def send_array(self, array: Array) -> None:
        """Send the little-endian bytes of a C-contiguous array as one frame, uncopied."""
        self._run(self._open_frame(little_endian(array)))

    def recv_array(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
        """Receive an array whose type and shape both sides know."""
        array = np.empty(shape, np.dtype(dtype).newbyteorder("<"))
        self.recv_into(array)
        return array

    def exchange_array(self, array: Array) -> Array:
        """Send an array and receive one of the same type and shape at the same time."""
        out = little_endian(array)
        result = np.empty_like(out)
        outgoing, incoming = self._open_frame(out), Incoming(into=bytes_of(result))
        self._run(outgoing, incoming)
        self._count(incoming)
        return result

    def send_json(self, value: Any) -> None:
        """Send a small JSON document as one frame."""
        self.send(json.dumps(value, separators=(",", ":")).encode())

    def recv_json(self, limit: int = _MAX_JSON) -> Any:
        """Receive a JSON document of at most ``limit`` bytes."""
        data = self.recv(limit)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the {self.peer} sent no valid JSON") from error

    # -- from other threads -------------------------------------------------------------------

    def cut(self) -> None:
        """Break the connection: whoever waits on it has lost its peer."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._raw, socket.SHUT_RDWR)

    def beat(self, every: float) -> None:
        """Give a sign of life, if nothing was sent for ``every`` seconds and this cannot wait."""
        if time.monotonic() - self._spoke < every or not self._lock.acquire(blocking=False):
            return
        try:
            if not (self._sending or self._failed or self._closed):
                self._unsent = self._unsent or HEADER.pack(BEAT)
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
                self._spoke = time.monotonic()
        except _WOULD_BLOCK:
            pass  # TLS has a record of it by now: these very bytes must go first
        except OSError:
            self._spoke = math.inf  # whoever uses the channel next is told
        finally:
            self._lock.release()

    # -- ends ---------------------------------------------------------------------------------

    def abort(self, error: Exception) -> None:
        """Tell the peer why this side gives up, if that is still possible, and close.

        The peer's next receive raises :class:`RefusedError` or :class:`PeerError` with the reason.
        """
        self._finish(abort_message(error))

    def end(self) -> None:
        """Tell the peer, unless it has said so itself, that the session is over, and close.

        The peer's next receive raises :class:`PeerClosed`. Ends and aborts are not counted.
        """
        self._finish(b"" if self._failed or self.ended else HEADER.pack(END))

    def await_end(self) -> None:
        """Wait for the peer's :meth:`end`, unless it has come already.

        Raises:
            PeerError: the peer was lost, or sent something else.
        """
        if not self.ended:
            with contextlib.suppress(PeerClosed):
                self.recv(0)
                raise ProtocolError(f"the {self.peer} sent a message after the session was over")

    def close(self) -> None:
        """Close the connection and say nothing; a second call does nothing."""
        with self._lock:
            self._closed = True
            self._socket.close()

    def _finish(self, words: bytes) -> None:
        """Send last words, if any, and close so that the peer can hear them.

        Closing with bytes unread, as beats would be, resets the connection and loses what is
        under way.
        """
        with self._lock:
            if not self._closed and words:
                with contextlib.suppress(OSError):  # the peer will see the connection close anyway
                    for part in filter(None, (self._unsent, words)):
                        self._socket.send(part)
                    self._socket.shutdown(socket.SHUT_WR)
                    for _ in range(_UNREAD):
                        if not self._raw.recv(BUFFER):
                            break
            self._closed = True
            self._socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if value is None:
            self.end()
        else:
            self.close()

    # -- inside -------------------------------------------------------------------------------

    def _open_frame(self, data: Data | Array) -> list[memoryview]:
        """Count a frame to be sent; returns its pieces, uncopied where large."""
        payload = bytes_of(data)
        size = len(payload)
        if size > MAX_FRAME:
            raise UsageError(f"a message of {size} bytes is over the limit of {MAX_FRAME}")
        header = HEADER.pack(size)
        self.meter.frame(self.peer, "sent", len(header) + size)
        if self.tap is not None:
            self.tap("sent", payload)
        if size <= _SMALL:
            return [memoryview(header + payload)]
        return [memoryview(header), payload]

    def _received(self, incoming: Incoming) -> bytes:
        self._count(incoming)
        return bytes(incoming.data)

    def _count(self, incoming: Incoming) -> None:
        self.meter.frame(self.peer, "received", HEADER.size + incoming.size)
        if self.tap is not None:
            self.tap("received", incoming.payload)

    def _run(self, outgoing: list[memoryview], incoming: Incoming | None = None) -> None:
        """Send all of ``outgoing`` and fill ``incoming``, waiting as long as allowed."""
        if self._closed or self._failed:
            raise PeerError(f"the connection to the {self.peer} is closed")
        deadline = Deadline(self.timeout)
        if self.life is not None:  # who did not listen until now gives the peer some time yet
            self._heard = max(self._heard, time.monotonic() - self.life / 2)
        deadline.expect(sum(map(len, outgoing)))
        pending = outgoing[::-1]
        if pending:
            with self._lock:
                self._sending = True
                if self._unsent:
                    pending.append(memoryview(self._unsent))
                    self._unsent = b""
        alone = True
        try:
            while True:
                moved = self._send_some(pending) if pending else False
                reading = incoming is not None and not incoming.complete
                if incoming is not None and reading:
                    moved |= self._receive_some(incoming, deadline)
                    reading = not incoming.complete
                if not pending and not reading:
                    return
                if moved:
                    deadline.progress()
                elif not reading and self._read_ahead():
                    continue
                elif alone and self._may_spin(deadline):
                    alone = _yield_processor()
                else:
                    self._wait(reading, bool(pending), deadline)
        except ssl.SSLError as error:
            self._failed = True
            self.close()
            raise refused(error, self.peer) from error
        except PeerClosed:
            self.ended = True
            raise
        except (PeerError, RefusedError):
            self._failed = True
            if pending:
                self.close()
            raise
        except OSError as error:
            self._failed = True
            self._last_words()
            self.close()
            reason = error.strerror or str(error)
            raise PeerError(f"lost the {self.peer}: {reason}") from error
        except BaseException:
            self.close()  # a frame may be half sent
            raise

    def _send_some(self, pending: list[memoryview]) -> bool:
        moved = False
        while pending:
            try:
                with self._lock:
                    sent = self._socket.send(pending[-1])
            except _WOULD_BLOCK:
                return moved
            moved = True
            if sent == len(pending[-1]):
                pending.pop()
            else:
                pending[-1] = pending[-1][sent:]
        self._spoke = time.monotonic()
        self._sending = False
        return moved

    def _receive_some(self, incoming: Incoming, deadline: Deadline) -> bool:
        before = incoming.arrived
        while not incoming.complete:
            if self._start < self._end:
                view = memoryview(self._buffer)[self._start : self._end]
                try:
                    self._start += incoming.take(view, self.peer, deadline)
                finally:
                    view.release()
                continue
            direct = incoming.room()
            target = memoryview(self._buffer) if direct is None else direct
            try:
                with self._lock:
                    count = self._socket.recv_into(target)
            except _WOULD_BLOCK:
                return incoming.arrived > before
            self._heard = time.monotonic()
            if count == 0:
                if incoming.begun:
                    raise PeerLost(f"lost the {self.peer} in the middle of a message")
                raise PeerLost(f"lost the {self.peer}: it closed the connection")
            if direct is None:
                self._start, self._end = 0, count
            else:
                incoming.advance(count)
        return True

    def _may_spin(self, deadline: Deadline) -> bool:
        return Channel._spinning == 1 and deadline.silence() < self.spin and deadline.left() > 0

    def _read_ahead(self) -> bool:
        """Take in what has come, if there is room; whether anything has."""
        if not self._has_room():
            return False
        held = self._end - self._start
        self._buffer[:held] = self._buffer[self._start : self._end]
        self._start, self._end = 0, held
        room = self._room()
        if len(self._buffer) < min(held + BUFFER, room):
            self._buffer += bytes(BUFFER)
        try:
            with self._lock:
                count = self._socket.recv_into(memoryview(self._buffer)[held:room])
        except _WOULD_BLOCK:
            return False
        self._heard = time.monotonic()
        self._ended = count == 0
        self._end += count
        return count > 0

    def _room(self) -> int:
        """Bytes that may be read ahead; a peer that is to give signs of life is always heard."""
        return max(self._ahead, 0 if self.life is None else BUFFER)

    def _has_room(self) -> bool:
        return not self._ended and self._end - self._start < self._room()

    def _wait(self, reading: bool, writing: bool, deadline: Deadline) -> None:
        left = deadline.left()
        if left <= 0:
            what = "sent nothing" if reading else "took nothing"
            raise PeerTimeout(f"the {self.peer} {what} within {self.timeout:g} s")
        if self.while_silent is not None and not writing:
            self.while_silent(deadline.silence())
            left = min(left, _LOOK_UP)
        reading = reading or self._has_room()
        if self.life is not None and (reading or self._ended):
            alive = self._heard + self.life - time.monotonic()
            if alive <= 0:
                raise PeerTimeout(f"the {self.peer} gave no sign of life for {self.life:g} s")
            left = min(left, alive)
        if isinstance(self._socket, Shaped):
            self._socket.wait(reading, writing, left)
            return
        poll = select.poll()
        poll.register(
            self._socket, (select.POLLIN if reading else 0) | (select.POLLOUT if writing else 0)
        )
        poll.poll(None if math.isinf(left) else math.ceil(left * 1000))

    def _last_words(self) -> None:
        """Raise the reason of a peer that aborted while this side was still sending."""
        deadline = Deadline(self.timeout)
        while True:
            incoming = Incoming()
            try:
                self._receive_some(incoming, deadline)
            except PeerLost:
                return
            except (PeerError, RefusedError):
                self.close()
                raise
            except OSError:
                return
            if not incoming.complete:
                return


def _who(sock: socket.socket) -> str:
    if isinstance(sock, ssl.SSLSocket):
        certificate = sock.getpeercert(binary_form=True) or b""
        return f"cert:{hashlib.sha256(certificate).hexdigest()[:16]}"
    if sock.family not in _INTERNET:
        return "local"
    try:
        return f"host:{sock.getpeername()[0]}"
    except OSError:
        return "gone"


def _yield_processor() -> bool:
    """Let others run; whether there were none."""
    before = time.perf_counter()
    os.sched_yield()
    return time.perf_counter() - before < _OTHERS


def channel_pair(
    *,
    timeout: float | None = DEFAULT_TIMEOUT,
    names: tuple[str, str] = ("server", "client"),
    link: Link | None = None,
) -> tuple[Channel, Channel]:
    """Two connected channels, each with a meter, for tests; ``names`` says who holds which."""
    first, second = socket.socketpair()
    return (
        Channel(first, peer=names[1], timeout=timeout, link=link),
        Channel(second, peer=names[0], timeout=timeout, link=link),
    )
