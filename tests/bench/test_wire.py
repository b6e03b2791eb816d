"""The kernel's line of the benchmarks counts the packets of the wire."""

from __future__ import annotations

import importlib
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
IP, TCP = 20, 32
"""Bytes of headers, TCP's with timestamps."""


@pytest.fixture(scope="module")
def wire() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("wire")


def _handed_over(payload: int, segment: int) -> bytes:
    """As the kernel hands it over: uncut where ``segment``, with its checksum to be made."""
    tcp = bytes(12) + bytes([TCP // 4 << 4]) + bytes(TCP - 13)
    kind, headers = (1, IP + TCP) if segment else (0, 0)
    front = struct.pack("<BBHHHH", 1, kind, headers, segment, IP, 16)
    return front + bytes(IP) + tcp + bytes(payload)


@given(payload=st.integers(1, 65_000), segment=st.integers(500, 1448))
def test_a_burst_counts_as_the_packets_it_is_cut_into(
    wire: Any, payload: int, segment: int
) -> None:
    packets = [IP + TCP + min(segment, payload - begun) for begun in range(0, payload, segment)]
    assert wire.on_wire(_handed_over(payload, segment)) == sum(packets)


def test_a_packet_counts_as_itself(wire: Any) -> None:
    assert wire.on_wire(_handed_over(0, 0)) == IP + TCP
    assert wire.on_wire(_handed_over(1448, 0)) == 1500
