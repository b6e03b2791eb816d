"""Emulated links against the arithmetic of the network they stand for."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi_system.errors import PeerError, PeerTimeout, UsageError
from pi_system.net.channel import Channel, PeerClosed, channel_pair
from pi_system.net.link import FIRST_WINDOW, HEADERS, SEGMENT, Link, Schedule, parse


def test_names() -> None:
    assert parse("loopback") is None
    assert parse("lan") == Link("lan", 0.3, 1000)
    assert parse("80:20") == Link("80:20", 80, 20)
    assert parse("40:100:0.01") == Link("40:100:0.01", 40, 100, 0.01)


@pytest.mark.parametrize(
    "text", ["", "lte", "40", "40:", "40:0", "-1:10", "40:100:1", "40:1.2.3", "nan:5", "1e9:5"]
)
def test_no_networks(text: str) -> None:
    with pytest.raises(UsageError, match="give loopback, lan, wan or RTT:MBPS"):
        parse(text)


def test_a_small_message_takes_half_a_round_trip_and_its_packet() -> None:
    schedule = Schedule(Link("x", 40, 100))
    arrival = schedule.arrival(100, 5.0)
    assert arrival == pytest.approx(5.0 + 0.020 + (100 + HEADERS) * 8 / 100e6)
    assert schedule.arrival(100, 5.0) > arrival


@given(st.integers(20, 400), st.integers(1, 100))
def test_a_long_transfer_approaches_the_rate(packets: int, mbps: int) -> None:
    schedule = Schedule(Link("x", 0, mbps))
    wire = packets * (SEGMENT + HEADERS) * 8 / (mbps * 1e6)
    assert schedule.arrival(packets * SEGMENT, 0.0) == pytest.approx(wire)


def test_the_window_doubles_every_round_trip() -> None:
    """On a link of endless rate the n-th round trip carries 10 * 2^n packets."""
    for rounds in range(1, 5):
        schedule = Schedule(Link("x", 100, 1e6))
        packets = FIRST_WINDOW * (2**rounds - 1)
        within = schedule.arrival(packets * SEGMENT, 0.0)
        assert within == pytest.approx(0.1 * (rounds - 1) + 0.05, abs=0.005)
        schedule = Schedule(Link("x", 100, 1e6))
        beyond = schedule.arrival((packets + 1) * SEGMENT, 0.0)
        assert beyond == pytest.approx(0.1 * rounds + 0.05, abs=0.005)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=20), st.integers(0, 2**32))
def test_bytes_arrive_in_order_whatever_is_lost(sizes: list[int], seed: int) -> None:
    schedule = Schedule(Link("x", 20, 50, 0.1), random.Random(seed))
    times = [schedule.arrival(size, 0.0) for size in sizes]
    assert times == sorted(times)
    lossless = Schedule(Link("x", 20, 50, 1e-300))
    assert times[-1] >= [lossless.arrival(size, 0.0) for size in sizes][-1] - 1e-9


@contextmanager
def _pair(link: Link, timeout: float = 8.0) -> Iterator[tuple[Channel, Channel]]:
    first, second = channel_pair(link=link, timeout=timeout)
    with first, second:
        yield first, second


def _echo(channel: Channel, count: int) -> None:
    for _ in range(count):
        channel.send(channel.recv())


def _in_thread(target: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args)
    thread.start()
    return thread


def _round_trips(link: Link, count: int) -> list[float]:
    """Seconds of small messages and their echoes."""
    with _pair(link) as (first, second):
        thread = _in_thread(_echo, second, count)
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            first.send(b"ping")
            first.recv()
            seconds.append(time.perf_counter() - started)
        thread.join()
    return seconds


@pytest.mark.parametrize("rtt", [2.0, 30.0])
def test_round_trips_take_what_they_should(rtt: float) -> None:
    seconds = _round_trips(Link("x", rtt, 1000), 8)
    assert 0.00098 * rtt <= statistics.median(seconds) < 0.001 * rtt + 0.002


def test_a_local_network_is_as_quick_as_asked_for() -> None:
    """The least of many, as others may have the processors: no sooner, and hardly later."""
    seconds = _round_trips(Link("x", 0.3, 1000), 200)
    assert 0.00027 < min(seconds) < 0.0004


def test_large_messages_take_what_they_should_both_ways_at_once() -> None:
    data = bytes(range(256)) * 8000
    received: list[bytes] = []
    with _pair(Link("x", 1, 200)) as (first, second):
        started = time.perf_counter()
        thread = _in_thread(lambda: received.append(second.exchange(data[::-1])))
        assert first.exchange(data) == data[::-1]
        thread.join()
        spent = time.perf_counter() - started
    assert received == [data]
    wire = len(data) * 8 * (SEGMENT + HEADERS) / SEGMENT / 200e6
    assert wire < spent < 1.5 * wire


def test_the_end_and_the_reason_come_after_the_data() -> None:
    link = Link("x", 20, 100)
    with _pair(link) as (first, second):
        first.send(b"last")
        first.end()
        assert second.recv() == b"last"
        with pytest.raises(PeerClosed):
            second.recv()
    with _pair(link) as (first, second):
        first.send(b"last")
        first.abort(PeerError("no more"))
        assert second.recv() == b"last"
        with pytest.raises(PeerError, match="no more"):
            second.recv()


def test_silence_is_noticed_on_a_link_too() -> None:
    silent = pytest.raises(PeerError, match=r"within 0\.2 s")
    with _pair(Link("x", 10, 100), timeout=0.2) as (first, _), silent:
        first.recv()


def test_spinning_and_reading_ahead_change_no_time_on_a_link() -> None:
    """Bytes come when the link lets them, however impatiently they are asked for."""
    rtt, frames, size = 20, 8, 1 << 17
    first, second = channel_pair(timeout=5, link=Link("x", rtt, 1000))

    def peer() -> None:
        with second.spinning(0.003):
            second.send(second.recv()[::-1])
            for _ in range(frames):
                second.send(bytes(size))
            assert [second.recv() for _ in range(frames)] == [bytes(size)] * frames

    with first, second, ThreadPoolExecutor() as pool, first.spinning(0.003):
        answer = pool.submit(peer)
        started = time.monotonic()
        first.send(b"ping")
        assert first.recv() == b"gnip"
        assert 1000 * (time.monotonic() - started) >= 0.98 * rtt
        with first.reading_ahead(frames * (size + 4)):
            for _ in range(frames):
                first.send(bytes(size))
        assert [first.recv() for _ in range(frames)] == [bytes(size)] * frames
        answer.result()
        assert 1000 * (time.monotonic() - started) > 1.5 * rtt
    first, second = channel_pair(timeout=0.2, link=Link("x", rtt, 1000))
    with first, second, first.spinning(60), pytest.raises(PeerTimeout, match=r"within 0\.2 s"):
        first.recv()
