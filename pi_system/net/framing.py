"""Frames on the wire: four bytes of length (little endian) and a payload.

The length 0xFFFFFFFF opens an abort: one more length and a short reason, after which the peer
closes. The length 0xFFFFFFFE alone is the orderly end: a connection that closes without one of the
two is a lost peer. The length 0xFFFFFFFD alone, between two frames, is a beat: the peer lives, and
that is all. Every length is checked before anything is allocated.
"""

from __future__ import annotations

import math
import struct
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import BusyError, PeerError, ProtocolError, RefusedError, UsageError

Data = bytes | bytearray | memoryview
Array = npt.NDArray[Any]

HEADER: Final = struct.Struct("<I")
MAX_FRAME: Final = 1 << 30
MIN_RATE: Final = 1 << 18
"""Bytes per second that a frame under way must keep on average."""
ABORT: Final = 0xFFFF_FFFF
END: Final = 0xFFFF_FFFE
BEAT: Final = 0xFFFF_FFFD
ABORT_LIMIT: Final = 1 << 10
_TLS_RECORDS: Final = (b"\x15\x03", b"\x16\x03")
"""How a TLS alert and a TLS handshake begin."""
BUFFER: Final = 1 << 16
"""Bytes read ahead; a larger rest of a known array is received in place."""


class PeerClosed(PeerError):
    """The peer has ended the session in an orderly way, between two frames."""


class PeerLost(PeerError):
    """The connection closed and the peer had not said that it ends the session."""


class Deadline:
    """``timeout`` seconds of silence, or ``timeout`` plus the time of ``size`` at MIN_RATE."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._started = time.monotonic()
        self._silent_since = self._started
        self._size = 0

    def expect(self, size: int) -> None:
        self._size += size

    def progress(self) -> None:
        self._silent_since = time.monotonic()

    def silence(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._silent_since

    def left(self) -> float:
        """Seconds left, possibly negative."""
        frame = self._started + self._size / MIN_RATE
        return min(self._silent_since, frame) + self._timeout - time.monotonic()


class Incoming:
    """A frame being received: its header, then its payload.

    Into a given buffer of exactly the right size, or else into one that grows with what has
    arrived, so that a false length costs no memory.
    """

    def __init__(self, *, limit: int = MAX_FRAME, into: memoryview | None = None) -> None:
        self.size = -1
        self.complete = False
        self.begun = False
        self._into = into
        self._limit = limit if into is None else len(into)
        self._filled = 0
        self._header = bytearray()
        self._aborting = False
        self.data = bytearray()

    def take(self, view: memoryview, peer: str, deadline: Deadline) -> int:
        """Consume bytes from the front of ``view``; returns how many."""
        self.begun = True
        if self.size < 0:
            count = min(HEADER.size - len(self._header), len(view))
            self._header += view[:count]
            if len(self._header) == HEADER.size:
                self._open(peer)
                deadline.expect(max(0, self.size))
            return count
        count = min(self.size - self._filled, len(view))
        if self._into is None:
            self.data += view[:count]
        else:
            self._into[self._filled : self._filled + count] = view[:count]
        self.advance(count)
        if self.complete and self._aborting:
            self._raise_abort(peer)
        return count

    @property
    def arrived(self) -> int:
        """Bytes of the frame so far; those of beats before it do not count."""
        return len(self._header) + self._filled

    def room(self) -> memoryview | None:
        """Where to receive directly, for a large rest of a known buffer."""
        if self._into is None or self.size < 0 or self.size - self._filled < BUFFER:
            return None
        return self._into[self._filled : self.size]

    @property
    def payload(self) -> memoryview:
        """What has arrived of the payload."""
        return memoryview(self.data) if self._into is None else self._into[: self._filled]

    def advance(self, count: int) -> None:
        self._filled += count
        self.complete = self._filled == self.size

    def _open(self, peer: str) -> None:
        (size,) = HEADER.unpack(self._header)
        if self._aborting:
            if size > ABORT_LIMIT:
                raise ProtocolError(f"the {peer} sent a malformed message")
        elif size == ABORT:
            self._aborting, self._into, self._header = True, None, bytearray()
            return
        elif size == BEAT:
            self._header, self.begun = bytearray(), False
            return
        elif size == END:
            raise PeerClosed(f"the {peer} ended the session")
        elif self._into is not None and size != len(self._into):
            raise ProtocolError(
                f"the {peer} sent a message of {size} bytes where {len(self._into)} were expected"
            )
        elif size > self._limit:
            if bytes(self._header[:2]) in _TLS_RECORDS:
                raise RefusedError(
                    f"the {peer} speaks TLS and this side does not: --insecure here, --certs there"
                )
            raise ProtocolError(
                f"the {peer} sent a message of {size} bytes, over the limit of {self._limit}"
            )
        self.size = size
        self.complete = size == 0
        if self.complete and self._aborting:
            self._raise_abort(peer)

    def _raise_abort(self, peer: str) -> None:
        kind, _, text = self.data.decode(errors="replace").partition(" ")
        text = "".join(c for c in text if c.isprintable()) or "no reason given"
        if kind == "refused":
            raise RefusedError(f"the {peer} refused: {text}")
        if kind == "busy":
            raise BusyError(f"the {peer} is busy: {text}")
        raise PeerError(f"the {peer} gave up: {text}")


def abort_message(error: Exception) -> bytes:
    """The bytes that tell a peer why this side gives up."""
    kinds = {RefusedError: b"refused", BusyError: b"busy"}
    kind = next((word for cls, word in kinds.items() if isinstance(error, cls)), b"failed")
    text = " ".join(str(error).split()).encode(errors="replace")[: ABORT_LIMIT - 16]
    payload = kind + b" " + text
    return HEADER.pack(ABORT) + HEADER.pack(len(payload)) + payload


def little_endian(array: Array) -> Array:
    """``array`` in C order and little-endian, itself where it is so already."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def bytes_of(buffer: Data | Array) -> memoryview:
    """The bytes of a contiguous buffer, uncopied."""
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise UsageError("an array on the wire must be C-contiguous")
        return buffer.reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")
