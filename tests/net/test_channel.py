"""Channels over real sockets: framing, limits, time-outs, lost peers, simultaneous frames."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pi_system.errors import PeerError, PeerTimeout, ProtocolError, RefusedError, UsageError
from pi_system.net.channel import Channel, PeerClosed, PeerLost, channel_pair
from pi_system.net.framing import Deadline
from pi_system.net.listen import Listener, connect


@pytest.fixture
def raw() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the bare socket at its other end."""
    near, far = socket.socketpair()
    with Channel(near, peer="server", timeout=0.3) as channel, far:
        yield channel, far


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    first, second = channel_pair(timeout=5)
    with first, second:
        yield first, second


@given(st.lists(st.binary(max_size=300), max_size=20))
@settings(max_examples=30, deadline=None)
def test_frames_arrive_whole_in_order_and_counted(frames: list[bytes]) -> None:
    first, second = channel_pair()
    with first, second:
        for frame in frames:
            first.send(frame)
        assert [second.recv() for _ in frames] == frames
        expected = sum(len(frame) + 4 for frame in frames)
        assert first.meter.total("setup", "client", "sent") == expected
        assert second.meter.total("setup", "server", "received") == expected


def test_a_large_array_passes_and_a_transposed_one_keeps_its_values(
    pair: tuple[Channel, Channel],
) -> None:
    array = np.random.default_rng(1).integers(-(2**63), 2**63, (500, 700))
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(pair[0].send_array, array.T)
        assert_array_equal(pair[1].recv_array(np.int64, (700, 500)), array.T)
        sent.result()


def test_both_sides_may_send_a_large_frame_at_once(pair: tuple[Channel, Channel]) -> None:
    size = 32 << 20  # more than any socket buffer holds
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(pair[1].exchange, b"b" * size)
        assert pair[0].exchange(b"a" * size) == b"b" * size
        assert theirs.result() == b"a" * size
        arrays = np.arange(3_000_000), np.arange(3_000_000) + 1
        theirs_array = pool.submit(pair[1].exchange_array, arrays[1])
        assert_array_equal(pair[0].exchange_array(arrays[0]), arrays[1])
        assert_array_equal(theirs_array.result(), arrays[0])


@pytest.mark.parametrize("received", [b"12345678", b""])
def test_an_array_of_another_size_is_a_protocol_error(
    pair: tuple[Channel, Channel], received: bytes
) -> None:
    pair[0].send(received)
    with pytest.raises(ProtocolError, match=f"{len(received)} bytes where 12 were expected"):
        pair[1].recv_array(np.int32, (3,))


@pytest.mark.parametrize("length", [11, 2**30 + 1, 2**32 - 4])
def test_a_length_over_the_limit_is_refused_before_its_bytes_come(
    raw: tuple[Channel, socket.socket], length: int
) -> None:
    raw[1].sendall(struct.pack("<I", length))
    with pytest.raises(ProtocolError, match="over the limit of 10"):
        raw[0].recv(limit=10)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b""])
def test_bad_json_is_a_protocol_error(pair: tuple[Channel, Channel], data: bytes) -> None:
    pair[0].send(data)
    with pytest.raises(ProtocolError, match="no valid JSON"):
        pair[1].recv_json()


def test_a_frame_in_single_bytes_is_put_together(raw: tuple[Channel, socket.socket]) -> None:
    def trickle() -> None:
        for byte in struct.pack("<I", 5) + b"hello":
            raw[1].sendall(bytes([byte]))
            time.sleep(0.01)

    with ThreadPoolExecutor() as pool:
        pool.submit(trickle)
        assert raw[0].recv() == b"hello"


def test_a_silent_peer_times_out_and_a_trickling_one_too(
    raw: tuple[Channel, socket.socket],
) -> None:
    started = time.monotonic()
    with pytest.raises(PeerTimeout, match=r"the server sent nothing within 0\.3 s"):
        raw[0].recv()
    assert 0.25 < time.monotonic() - started < 2

    near, far = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        far.sendall(struct.pack("<I", 1000))
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                far.sendall(b"x")

    with Channel(near, timeout=0.3) as channel, far, ThreadPoolExecutor() as pool:
        pool.submit(trickle)
        started = time.monotonic()
        with pytest.raises(PeerTimeout):
            channel.recv()
        assert time.monotonic() - started < 2
        stop.set()


def test_a_peer_that_takes_nothing_times_out(raw: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(PeerTimeout, match="took nothing"):
        raw[0].send(bytes(64 << 20))


def test_the_end_between_frames_differs_from_the_end_within(
    raw: tuple[Channel, socket.socket],
) -> None:
    raw[1].sendall(struct.pack("<I", 2) + b"ok" + b"\x09\x00")
    assert raw[0].recv() == b"ok"
    raw[1].close()
    with pytest.raises(PeerError, match="middle of a message") as caught:
        raw[0].recv()
    assert not isinstance(caught.value, PeerClosed)
    with pytest.raises(PeerError, match="is closed"):
        raw[0].send(b"")

    first, second = channel_pair()
    second.close()
    with first, pytest.raises(PeerLost, match="lost the client: it closed the connection"):
        first.recv()


@pytest.mark.parametrize("sending", [False, True])
def test_an_end_is_said_and_heard_once(pair: tuple[Channel, Channel], sending: bool) -> None:
    first, second = pair
    second.send(b"last")
    second.end()
    assert first.recv() == b"last"
    with pytest.raises(PeerClosed, match="the client ended the session"):
        if sending:
            first.send(bytes(8 << 20))
        first.recv()
    if not sending:
        first.await_end()  # at once, again and again
        first.await_end()
    assert first.meter.total("setup", "client", "received") == 4 + len(b"last")


def test_an_end_that_does_not_come_or_is_none(pair: tuple[Channel, Channel]) -> None:
    first, second = pair
    second.send(b"x")
    with pytest.raises(ProtocolError, match="sent a message of 1 bytes"):
        first.await_end()
    first, second = channel_pair()
    with first:
        second.close()
        with pytest.raises(PeerLost, match="lost the client"):
            first.await_end()


def test_a_channel_that_is_left_by_an_error_says_no_end() -> None:
    first, second = channel_pair()
    with first:
        with contextlib.suppress(KeyError), second:
            raise KeyError
        with pytest.raises(PeerLost):
            first.recv()


def test_sending_to_a_lost_peer_is_a_peer_error(raw: tuple[Channel, socket.socket]) -> None:
    raw[1].close()
    with pytest.raises(PeerError, match="lost the server"):
        raw[0].send(b"x")


@pytest.mark.parametrize(
    ("error", "seen", "text"),
    [
        (UsageError("the shape\nis wrong"), PeerError, "the client gave up: the shape is wrong"),
        (RefusedError("version 1"), RefusedError, "the client refused: version 1"),
        (PeerError("x" * 5000), PeerError, "the client gave up: x"),
        (PeerError(""), PeerError, "the client gave up: no reason given"),
    ],
)
@pytest.mark.parametrize("sending", [False, True])
def test_an_abort_carries_its_reason(
    pair: tuple[Channel, Channel],
    error: Exception,
    seen: type[PeerError],
    text: str,
    sending: bool,
) -> None:
    pair[1].send(b"before")
    pair[1].abort(error)
    with pytest.raises(seen, match=text):
        if sending:
            pair[0].send(bytes(8 << 20))
        pair[0].recv_array(np.uint8, (6,))
        pair[0].recv_array(np.int64, (100,))


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_garbage_ends_in_a_frame_or_a_clear_error(data: bytes) -> None:
    near, far = socket.socketpair()
    with Channel(near, timeout=0.2) as channel, far:
        far.sendall(data)
        far.close()
        with contextlib.suppress(PeerError, RefusedError):
            while True:
                channel.recv(limit=64)


def test_after_a_failed_receive_the_reason_can_still_be_told(
    pair: tuple[Channel, Channel],
) -> None:
    pair[1].send(b"too long")
    with pytest.raises(ProtocolError) as caught:
        pair[0].recv(limit=4)
    with pytest.raises(PeerError, match="is closed"):
        pair[0].send(b"x")
    pair[0].abort(caught.value)
    with pytest.raises(PeerError, match="the server gave up: the client sent a message of 8"):
        pair[1].recv()


def test_connect_waits_for_a_late_listener_and_gives_up_on_none() -> None:
    with Listener("127.0.0.1", 0) as listener:
        port = listener.port
        with (
            connect("127.0.0.1", port, timeout=1, retry_for=1) as out,
            listener.accept(wait=1) as back,
        ):
            back.send(b"hi")
            assert out.recv() == b"hi"
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}: .* in use"):
            Listener("127.0.0.1", port)
        with pytest.raises(PeerTimeout, match="the client did not connect within"):
            listener.accept(wait=0.05, peer="client")
    started = time.monotonic()
    with pytest.raises(PeerTimeout, match=f"cannot reach the dealer at 127.0.0.1:{port}"):
        connect("127.0.0.1", port, retry_for=0.3, peer="dealer")
    assert time.monotonic() - started < 2
    with ThreadPoolExecutor() as pool:
        late = pool.submit(connect, "127.0.0.1", port, retry_for=5)
        time.sleep(0.1)
        with Listener("127.0.0.1", port) as listener, listener.accept(wait=5), late.result():
            pass


def test_bad_addresses_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="cannot listen on"):
        Listener("203.0.113.1", 4000)
    with pytest.raises(UsageError, match="70000 is no port number"):
        Listener("127.0.0.1", 70_000)
    with pytest.raises(UsageError, match="-1 is no port number"):
        connect("127.0.0.1", -1)
    with pytest.raises(UsageError, match="unknown host"):
        connect("no such host", 1)


def test_a_spinning_receive_keeps_the_time_limit_and_gives_the_processor_back() -> None:
    near, far = socket.socketpair()
    with Channel(near, timeout=0.4) as channel, far:
        with channel.spinning(60.0), pytest.raises(PeerTimeout, match=r"within 0\.4 s"):
            started = time.monotonic()
            channel.recv()
        assert 0.35 < time.monotonic() - started < 2
    near, far = socket.socketpair()
    with Channel(near, timeout=0.6) as channel, far:
        burnt = time.thread_time()
        with channel.spinning(0.02), pytest.raises(PeerTimeout):
            channel.recv()
        assert time.thread_time() - burnt < 0.2
        assert channel.spin == 0


def test_of_several_threads_of_a_process_nobody_spins() -> None:
    first, second = channel_pair(timeout=0.3)
    with first, second, first.spinning(60.0):
        assert first._may_spin(Deadline(1.0))
        with second.spinning(60.0):
            started = time.thread_time()
            with pytest.raises(PeerTimeout):
                first.recv()
            assert time.thread_time() - started < 0.1
        assert first._may_spin(Deadline(1.0))


def test_a_spinning_receive_sleeps_where_others_want_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As seen from a yield that lasts; else two parties could share one processor for ever."""
    yields: list[None] = []

    def crowded() -> None:
        yields.append(None)
        time.sleep(0.002)

    near, far = socket.socketpair()
    with Channel(near, timeout=0.3) as channel, far, channel.spinning(60.0):
        monkeypatch.setattr(os, "sched_yield", crowded)
        for _ in range(2):
            far.send(struct.pack("<I", 0))
            assert channel.recv() == b""
        with pytest.raises(PeerTimeout):
            channel.recv()
    assert len(yields) == 1


def test_a_spinning_receive_takes_frames_limits_and_aborts_as_any_other(
    pair: tuple[Channel, Channel],
) -> None:
    near, far = pair

    def peer() -> None:
        time.sleep(0.05)
        far.send(b"late")
        far.send(bytes(9))
        far.abort(RefusedError("enough"))

    with ThreadPoolExecutor() as pool, near.spinning(1.0):
        pool.submit(peer)
        assert near.recv() == b"late"
        with pytest.raises(ProtocolError, match="over the limit of 8"):
            near.recv(8)
    first, second = channel_pair(timeout=5)
    with first, second, first.spinning(1.0):
        second.abort(RefusedError("enough"))
        with pytest.raises(RefusedError, match="enough"):
            first.recv()


def test_a_send_that_waits_reads_ahead_no_more_than_allowed() -> None:
    """Two parties that send more than the network holds: one must take in what comes."""
    frames, size = 40, 1 << 18
    first, second = channel_pair(timeout=20)

    def peer() -> list[bytes]:
        for _ in range(frames):
            second.send(bytes(size))
        return [second.recv() for _ in range(frames)]

    with first, second, ThreadPoolExecutor() as pool:
        answer = pool.submit(peer)
        with first.reading_ahead(frames * (size + 4)):
            for i in range(frames):
                first.send(bytes([i]) * size)
        assert all(first.recv() == bytes(size) for _ in range(frames))
        assert answer.result() == [bytes([i]) * size for i in range(frames)]
    first, second = channel_pair(timeout=0.3)
    second.timeout = 20  # it does not give up first, which the other side would notice
    with first, second, ThreadPoolExecutor() as pool:
        blocked = pool.submit(second.send, bytes(32 << 20))
        with first.reading_ahead(1 << 20), pytest.raises(PeerTimeout, match="took nothing"):
            first.send(bytes(32 << 20))
        assert first._end - first._start <= 1 << 20
        with pytest.raises(PeerError):
            blocked.result()


def test_the_end_of_a_peer_is_noticed_while_reading_ahead() -> None:
    first, second = channel_pair(timeout=5)
    with first, second, ThreadPoolExecutor() as pool:

        def end() -> None:
            time.sleep(0.1)
            second.abort(RefusedError("enough"))

        pool.submit(end)
        with first.reading_ahead(1 << 20), pytest.raises(RefusedError, match="enough"):
            first.send(bytes(32 << 20))
