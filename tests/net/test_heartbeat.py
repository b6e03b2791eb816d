"""Signs of life: what they are worth to a wait, and that they disturb nothing else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.errors import BusyError, PeerTimeout
from pi_system.net import certificates
from pi_system.net.channel import Channel, PeerClosed, PeerLost, channel_pair
from pi_system.net.framing import BEAT, END, HEADER
from pi_system.net.heartbeat import Heartbeat
from pi_system.net.link import Link
from pi_system.net.listen import Listener, connect
from pi_system.net.tls import Identity

SIGN = HEADER.pack(BEAT)
Pair = tuple[Channel, Channel]


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    certificates.make(directory)
    return directory


@contextlib.contextmanager
def connected(certs: Path | None = None, link: Link | None = None) -> Iterator[Pair]:
    """A server's and a client's end of a TCP connection."""
    ours = theirs = None
    if certs is not None:
        ours, theirs = (Identity.of(certs, role) for role in ("server", "client"))
    with Listener("127.0.0.1", 0) as listener, ThreadPoolExecutor() as pool:
        late = pool.submit(
            connect, "127.0.0.1", listener.port, peer="server", identity=theirs, link=link
        )
        server = listener.accept(wait=5, peer="client", identity=ours, link=link)
    with server, late.result() as client:
        yield server, client


@contextlib.contextmanager
def hammered(*channels: Channel) -> Iterator[None]:
    """Beats as fast as they go."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            for channel in channels:
                channel.beat(0.0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@given(
    st.lists(st.none() | st.binary(max_size=40), max_size=20),
    st.lists(st.integers(1, 9)),
    st.data(),
)
@settings(max_examples=50, deadline=None)
def test_beats_between_frames_are_as_if_they_were_not_there(
    items: list[bytes | None], cuts: list[int], data: st.DataObject
) -> None:
    stream = b"".join(SIGN if i is None else HEADER.pack(len(i)) + i for i in items)
    near, far = socket.socketpair()
    with Channel(near, peer="server", timeout=5) as channel, far:
        seen: list[bytes] = []
        channel.tap = lambda direction, payload: seen.append(bytes(payload))
        frames = [item for item in items if item is not None]

        def write() -> None:
            start = 0
            for cut in cuts:
                far.sendall(stream[start : start + cut])
                start += cut
                time.sleep(0)
            far.sendall(stream[start:] + SIGN + HEADER.pack(END))

        with ThreadPoolExecutor() as pool:
            pool.submit(write)
            assert [channel.recv() for _ in frames] == frames == seen
            with pytest.raises(PeerClosed):
                channel.recv()
        assert channel.meter.total("setup", "server", "received") == sum(4 + len(f) for f in frames)


def test_a_peer_that_gives_no_sign_of_life_is_not_waited_for_as_long_as_one_that_does() -> None:
    first, second = channel_pair(timeout=1.5)
    with first, second:
        first.life = 0.4
        started = time.monotonic()
        with pytest.raises(PeerTimeout, match=r"the client gave no sign of life for 0\.4 s"):
            first.recv()
        assert 0.35 < time.monotonic() - started < 1.2
    first, second = channel_pair(timeout=1.5)
    with first, second, Heartbeat(every=0.1) as heartbeat:
        heartbeat.keep(second)
        first.life = 0.4
        started = time.monotonic()
        # Beats do not prolong the wait for a message.
        with pytest.raises(PeerTimeout, match=r"the client sent nothing within 1\.5 s"):
            first.recv()
        assert 1.4 < time.monotonic() - started < 3


def test_a_peer_that_computes_is_waited_for_and_one_that_died_meanwhile_is_not() -> None:
    first, second = channel_pair(timeout=20)
    with first, second, ThreadPoolExecutor() as pool:
        with Heartbeat(every=0.05, life=0.5) as heartbeat:
            heartbeat.keep(first)
            heartbeat.keep(second)

            def compute() -> None:
                array = np.random.default_rng(1).standard_normal((700, 700))
                until = time.monotonic() + 1.5
                while time.monotonic() < until:
                    array @ array
                second.send(b"done")

            work = pool.submit(compute)
            assert first.recv() == b"done"
            work.result()
        # What came while nobody listened is a sign of life when it is heard.
        started = time.monotonic()
        with pytest.raises(PeerTimeout, match="no sign of life"):
            first.recv()
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("half_open", [False, True])
def test_who_takes_nothing_is_waited_for_only_while_it_gives_signs_of_life(half_open: bool) -> None:
    first, second = channel_pair(timeout=1.5)
    second.timeout = 20
    first.life = 0.4
    with first, second, ThreadPoolExecutor() as pool:
        with Heartbeat(every=0.1) as heartbeat:
            heartbeat.keep(second)
            work = pool.submit(first.send, bytes(8 << 20))
            time.sleep(1.2)
            assert not work.done()
            assert second.recv() == bytes(8 << 20)
            work.result()
        if half_open:
            second._raw.shutdown(socket.SHUT_WR)
        started = time.monotonic()
        with pytest.raises(PeerTimeout, match="no sign of life"):
            first.send(bytes(8 << 20))
        assert time.monotonic() - started < 1.3


def links(certs: Path) -> list[Callable[[], contextlib.AbstractContextManager[Pair]]]:
    slow = Link("x", 1.0, 1000.0)
    return [connected, lambda: connected(certs), lambda: connected(certs, slow)]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["plain", "TLS", "shaped"])
def test_beats_from_another_thread_break_no_frame(certs: Path, kind: int) -> None:
    """Small and large frames, both ways at once, with as many beats between as will go."""
    sizes = [0, 1, 100, 70_000, 3, 300_000] * 2

    def talk(channel: Channel, mark: int) -> int:
        total = 0
        for size in sizes:
            reply = channel.exchange(bytes([mark]) * size)
            assert reply == bytes([3 - mark]) * size
            channel.send(b"one more")
            assert channel.recv() == b"one more"
            total += size
        return total

    with links(certs)[kind]() as (server, client):
        for channel in (server, client):  # so that a large frame takes many a send
            channel._raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with hammered(server, client), ThreadPoolExecutor() as pool:
            other = pool.submit(talk, client, 2)
            assert talk(server, 1) == other.result() == sum(sizes)
        client.end()
        with pytest.raises(PeerClosed):
            server.recv()


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["plain", "TLS", "shaped"])
def test_beats_that_found_no_room_go_first_when_there_is_some(certs: Path, kind: int) -> None:
    with links(certs)[kind]() as (server, client):
        server._raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client._raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while not server._unsent:  # the client does not read
            server.beat(0.0)
        with ThreadPoolExecutor() as pool:
            work = pool.submit(server.send, b"after them")
            assert client.recv() == b"after them"
            work.result()
        assert not server._unsent
        server.beat(0.0)
        server.end()
        with pytest.raises(PeerClosed):
            client.recv()


def test_closing_with_beats_unread_loses_nothing_that_is_under_way(certs: Path) -> None:
    for words in ("end", "abort"):
        with connected(certs) as (server, client):
            for sock in (server._raw, client._raw):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            server.send(b"x")
            client.recv()
            for _ in range(100):
                client.beat(0.0)
            time.sleep(0.05)
            data = bytes(600_000)  # more than the client's system takes in unread
            server._raw.setblocking(True)
            server.send(data)
            server._raw.setblocking(False)
            if words == "end":
                server.end()
            else:
                server.abort(BusyError("later"))
            time.sleep(0.05)
            assert client.recv() == data
            with pytest.raises(PeerClosed if words == "end" else BusyError):
                client.recv()


def test_no_thread_is_left_and_none_begun_for_nothing() -> None:
    before = threading.active_count()
    first, second = channel_pair(timeout=5)
    with first, second:
        with Heartbeat(every=0.1) as heartbeat:
            assert threading.active_count() == before
            heartbeat.keep(first)
            heartbeat.keep(second)
            assert threading.active_count() == before + 1
        assert threading.active_count() == before


def test_a_closed_and_a_broken_channel_are_left_alone() -> None:
    first, second = channel_pair(timeout=5)
    first.close()
    first.beat(0.0)
    second.beat(0.0)
    second.beat(0.0)
    with pytest.raises(PeerLost):
        second.recv()
    second.close()


def test_no_thread_to_be_had_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    first, second = channel_pair()
    with first, second, Heartbeat() as heartbeat:
        monkeypatch.setattr(threading.Thread, "start", none)
        with pytest.raises(BusyError, match="no thread for a session"):
            heartbeat.keep(first)
        monkeypatch.undo()


def test_a_peer_silent_for_long_before_it_is_waited_for_is_given_half_the_time() -> None:
    first, second = channel_pair(timeout=20)
    with first, second:
        first.life = 0.8
        time.sleep(1.0)
        started = time.monotonic()
        with pytest.raises(PeerTimeout, match="no sign of life"):
            first.recv()
        assert 0.35 < time.monotonic() - started < 0.75
