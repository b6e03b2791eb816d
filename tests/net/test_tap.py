"""A tape holds every frame of its channels, payload and labels, and nothing of a failed one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pi_system.errors import ProtocolError
from pi_system.net.channel import channel_pair
from pi_system.net.tap import Frame, Tape


def test_every_way_to_send_and_receive_is_recorded() -> None:
    first, second = channel_pair(names=("server", "client"))
    tape = Tape()
    large = np.arange(200_000, dtype="<u8")
    with first, second, ThreadPoolExecutor() as pool:
        tape.attach(first)
        first.send(b"one")
        second.recv()
        with first.meter.in_phase("online", 3), first.meter.in_layer("relu1"):
            sent = pool.submit(second.send_array, large)
            first.recv_array(np.uint64, large.shape)
            sent.result()
        theirs = pool.submit(second.exchange, b"theirs")
        first.exchange(b"ours")
        theirs.result()
        second.send_json([1])
        first.recv_json()
    assert tape.frames == [
        Frame("setup", -1, "", "client", "sent", b"one"),
        Frame("online", 3, "relu1", "client", "received", large.tobytes()),
        Frame("setup", -1, "", "client", "sent", b"ours"),
        Frame("setup", -1, "", "client", "received", b"theirs"),
        Frame("setup", -1, "", "client", "received", b"[1]"),
    ]
    assert tape.received("client") == [large.tobytes(), b"theirs", b"[1]"]


def test_a_refused_frame_is_not_recorded() -> None:
    first, second = channel_pair()
    tape = Tape()
    with first, second:
        tape.attach(first)
        second.send(b"too long")
        with pytest.raises(ProtocolError):
            first.recv(limit=4)
    assert tape.frames == []


def test_what_was_read_ahead_is_recorded_when_it_is_received() -> None:
    first, second = channel_pair()
    tape = Tape()
    with first, second, ThreadPoolExecutor() as pool:
        tape.attach(first)
        second.send(b"early")
        sent = pool.submit(lambda: [second.recv() for _ in range(8)])
        with first.reading_ahead(100), first.spinning(0.001):
            for _ in range(8):
                first.send(bytes(1 << 18))
        assert all(frame.direction == "sent" for frame in tape.frames)
        assert first.recv() == b"early"
        assert len(sent.result()) == 8
    assert tape.received("client") == [b"early"]
