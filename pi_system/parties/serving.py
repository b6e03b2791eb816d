"""What the two listening roles, server and dealer, have in common.

A :class:`Host` accepts connections and gives each a thread, in which everything that can wait for
a peer happens, its TLS and its hello included; the loop that accepts waits for nobody. Of
connections that have not said hello yet there are at most :data:`GREETING`; one more cuts off the
oldest. Sessions beyond the limits wait or are told to come later (:mod:`.admission`).

Stopping: no connection is accepted any more, whoever waits is told, an idle session ends, one in
the middle of a request finishes it, and what is not done after ``drain`` seconds is cut off.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from ..backends.base import Backend
from ..errors import BusyError, PeerError, PiError
from ..net.channel import Channel
from ..net.link import Link
from ..net.listen import Listener
from ..net.meter import Meter
from ..net.tls import Identity
from .admission import STOPPING, Admission, Limits
from .journal import Journal
from .process import release_memory
from .timeouts import Timeouts

GREETING: Final = 64
_LOOK_UP: Final = 0.5
"""Seconds between two looks at who is late."""
_LAST: Final = 2.0
"""Seconds for sessions that were cut off to unwind."""


@dataclass(frozen=True)
class ServingSettings:
    """How a listening role serves.

    Attributes:
        threads: of this party.
        device: torch device of the linear layers.
        link: the emulated network on every connection; None for none.
        identity: whom this party speaks for; ``None`` for plaintext.
        log_frames: keep the log of frames for :class:`Meter`'s readers.
        limits: of sessions at once.
        drain: seconds for running requests to end when the party is stopped.
        quota: the dealer's: inferences an hour that one client may have material for; ``None``
            for any number.
        ahead: the dealer's: inferences of a session whose material it makes before it is asked.
    """

    backend: Backend
    backend_name: str
    threads: int = 1
    device: str = "cpu"
    timeouts: Timeouts = field(default_factory=Timeouts)
    link: Link | None = None
    identity: Identity | None = None
    log_frames: bool = False
    limits: Limits = field(default_factory=Limits)
    drain: float = 30.0
    quota: int | None = None
    ahead: int = 0

    def terms(self, peer: str, *roles: str) -> dict[str, Any]:
        """Arguments of :meth:`Listener.accept` and ``welcome`` for a connection of ``roles``."""
        return {
            "peer": peer,
            "meter": Meter(log=self.log_frames),
            "timeout": self.timeouts.hello,
            "link": self.link,
            "identity": self.identity,
            "roles": roles,
        }


class Host:
    """Serves sessions from a listening socket, each in a thread of its own.

    Args:
        welcome: makes a channel of a connection; may wait for the peer's TLS.
        serve: says hello on a channel and serves its session, or keeps it for a pair; it closes
            the channel, writes down what fails, and calls :meth:`greeted` after the hello.
        tend: called now and then, between connections.
    """

    def __init__(
        self,
        listener: Listener,
        settings: ServingSettings,
        journal: Journal,
        *,
        welcome: Callable[[socket.socket], Channel],
        serve: Callable[[Channel], None],
        tend: Callable[[], None] = lambda: None,
    ) -> None:
        self.admission = Admission(settings.limits)
        self.journal = journal
        self._listener = listener
        self._drain = settings.drain
        self._welcome = welcome
        self._serve = serve
        self._tend = tend
        self._change = threading.Condition()
        self._greeting: dict[int, Callable[[], None]] = {}
        self._channels: dict[int, Channel] = {}
        self._threads: set[threading.Thread] = set()
        self._wake, self._waker = os.pipe()
        self._stopping = False
        self._most = settings.limits.sessions + settings.limits.queue + 2 * GREETING

    def stop(self) -> None:
        """Serve no more sessions than those that run. Safe in a signal handler."""
        if not self._stopping:
            self._stopping = True
            os.write(self._waker, b"x")

    @property
    def stopping(self) -> bool:
        return self._stopping

    def serve_forever(self) -> None:
        """Serve until :meth:`stop`."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._stopping:
            ready = poll.poll(1000 * _LOOK_UP)
            self._tend()
            if any(descriptor == self._listener.fileno() for descriptor, _ in ready):
                with contextlib.suppress(PeerError, OSError):
                    self._begin(self._listener.take(0.0))
        self._end()

    def end_when_idle(self, silent: float) -> None:
        """For :attr:`Channel.while_silent`: ends a wait for the next request when stopping.

        Raises:
            BusyError: the party is stopping.
        """
        if self._stopping:
            raise BusyError(STOPPING)

    @contextlib.contextmanager
    def running(self, *channels: Channel) -> Iterator[None]:
        """Cut these channels off, within the block, when the time for stopping is over."""
        with self._change:
            self._channels.update((id(channel), channel) for channel in channels)
        try:
            yield
        finally:
            with self._change:
                for channel in channels:
                    self._channels.pop(id(channel), None)

    def greeted(self) -> None:
        """The peer of this thread has said hello: it may no longer be cut off for another."""
        with self._change:
            self._greeting.pop(threading.get_ident(), None)

    def _begin(self, sock: socket.socket) -> None:
        with self._change:
            if len(self._greeting) >= GREETING:
                self._greeting.pop(next(iter(self._greeting)))()
            while len(self._threads) >= self._most and not self._stopping:
                self._change.wait(_LOOK_UP)  # meanwhile connections wait in the system's queue
            thread = threading.Thread(target=self._run, args=(sock,), daemon=True, name="session")
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            sock.close()
            with self._change:
                self._threads.discard(thread)
            self.journal.fail("refused", BusyError(f"no thread for a connection: {error}"))

    def _run(self, sock: socket.socket) -> None:
        me = threading.get_ident()
        with self._change:
            self._greeting[me] = partial(_cut, sock)
        try:
            channel = self._welcome(sock)
            with self._change:
                if me in self._greeting:
                    self._greeting[me] = channel.cut
            self._serve(channel)
        except PiError as error:
            self.journal.fail("refused", error)
        except Exception as error:  # one session's bad luck is not the next one's
            self.journal.fail("refused", error)
        finally:
            with self._change:
                self._greeting.pop(me, None)
                self._threads.discard(threading.current_thread())
                self._change.notify_all()
            release_memory()

    def _end(self) -> None:
        self._listener.close()
        self.journal.write(
            "stopping", sessions=self.admission.running, waiting=self.admission.waiting
        )
        self.admission.close()
        with self._change:
            for cut in self._greeting.values():
                cut()
        self._tend()
        if not self._idle(self._drain):
            with self._change:
                for channel in self._channels.values():
                    channel.cut()
            self._idle(_LAST)
        self.journal.write("stopped", sessions=self.admission.running)
        for descriptor in (self._wake, self._waker):
            os.close(descriptor)

    def _idle(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with self._change:
            while self._threads:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._change.wait(left)
        return True


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
