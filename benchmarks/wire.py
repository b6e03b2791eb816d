"""A wide-area network in one machine: two network namespaces, and packets carried between them.

The kernel's own TCP runs at both ends; between them a process carries IP packets from one TUN
device to the other with a rate, a constant delay and a queue that drops what does not fit. Needs
root. Real-time priority (``chrt -f 50``) keeps the delay exact on a busy machine; a delay below a
millisecond needs a carrier that does not sleep, on a processor of its own.

One packet at a time this process carries little more than 1 Gbit/s, and not on time. On a line of
a high rate the kernel therefore hands it TCP's packets before they are cut (``struct
virtio_net_hdr``, TSO): up to :data:`BURST_SECONDS` of the line as one, which is counted as the
packets that it stands for and arrives with the last of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

MTU: Final = 1500
DEVICE: Final = "wide0"
"""The line's device in each namespace."""
_NEW_NETWORK: Final = 0x40000000
_ATTACH: Final = 0x400454CA
_SET_OFFLOAD: Final = 0x400454D0
_TUN: Final = 0x5001
"""A TUN device, its packets behind a ``virtio_net_hdr`` and no other header."""
_CHECKSUM_AND_TSO: Final = 0x1 | 0x2
_OFFLOAD: Final = struct.Struct("<BBHHHH")
"""Flags, kind of segments, header bytes, segment bytes, where the TCP header is, checksum."""
BURST_SECONDS: Final = 1.28e-4
"""Of the line: 16 kB at 1 Gbit/s."""
_MOST: Final = 65_536
"""Bytes the kernel hands over as one, at most."""
_AT_ONCE: Final = 4
"""Taken from one device before what is due is handed over."""
_SET_TIMER_SLACK: Final = 29


def on_wire(packet: bytes) -> int:
    """Bytes of what the kernel handed over, IP and TCP headers of each packet counted."""
    kind: int
    segment: int
    tcp: int
    _, kind, _, segment, tcp, _ = _OFFLOAD.unpack_from(packet)
    size = len(packet) - _OFFLOAD.size
    if not kind:
        return size
    headers = tcp + (packet[_OFFLOAD.size + tcp + 12] >> 4 << 2)
    return size + (-(-(size - headers) // segment) - 1) * headers


@dataclass
class Direction:
    """Packets, or bursts of them, from ``source`` that wait for their arrival at ``sink``.

    Attributes:
        free: when the line has sent all it was given.
        dropped: those that found the queue full.
    """

    source: int
    sink: int
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    free: float = 0.0
    dropped: int = 0

    def take(self, per_byte: float, delay: float, queue: float) -> None:
        """Put what the source has on the line."""
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(self.source, _OFFLOAD.size + _MOST)
            except BlockingIOError:
                return
            now = time.monotonic()
            start = max(now, self.free)
            if start - now > queue:
                self.dropped += 1
                continue
            self.free = start + on_wire(packet) * per_byte
            self.waiting.append((self.free + delay, packet))

    def give(self, now: float) -> float:
        """Hand over what has arrived; returns when the next packet does."""
        while self.waiting and self.waiting[0][0] <= now:
            with contextlib.suppress(OSError):
                os.write(self.sink, self.waiting.popleft()[1])
        return self.waiting[0][0] if self.waiting else float("inf")


def carry(
    one: int, other: int, mbps: float, one_way_ms: float, queue_ms: float, *, awake: bool
) -> None:
    """Carry packets between two TUN devices until terminated; never sleep if ``awake``."""
    directions = (Direction(one, other), Direction(other, one))
    # So that waiting ends when asked for, not up to 50 us later.
    ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0)
    while True:
        now = time.monotonic()
        due = min(direction.give(now) for direction in directions)
        if awake:
            for direction in directions:
                direction.take(8 / (mbps * 1e6), one_way_ms / 1e3, queue_ms / 1e3)
            continue
        wait = max(0.0, min(due - time.monotonic(), 1.0))
        ready, _, _ = select.select([one, other], [], [], wait)
        for direction in directions:
            if direction.source in ready:
                direction.take(8 / (mbps * 1e6), one_way_ms / 1e3, queue_ms / 1e3)


def _device(namespace: str, address: str, mbps: float) -> int:
    """A TUN device in a namespace, which this process enters."""
    library = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if library.setns(handle, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(handle)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _ATTACH, struct.pack("16sH22x", DEVICE.encode(), _TUN))
    burst = min(_MOST, int(BURST_SECONDS * mbps * 1e6 / 8))
    limit: list[str] = []
    if burst > 2 * MTU:
        fcntl.ioctl(device, _SET_OFFLOAD, _CHECKSUM_AND_TSO)
        limit = ["gso_max_size", str(burst)]
    for command in (
        ["addr", "add", address, "dev", DEVICE],
        ["link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", "2000", *limit, "up"],
        ["link", "set", "lo", "up"],
    ):
        subprocess.run(["ip", *command], check=True)
    return device


@contextlib.contextmanager
def wire(
    rtt_ms: float,
    mbps: float,
    *,
    congestion_control: str | None = None,
    processor: int | None = None,
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two namespaces with a line between them, as (name, address) each.

    Args:
        rtt_ms: round trip of an empty packet.
        mbps: 10^6 bits per second, IP headers counted, in each direction.
        congestion_control: of TCP at both ends, if not the machine's own.
        processor: for the carrier alone; nothing else may run there.
    """
    names = [f"pi-{os.getpid()}-{end}" for end in ("a", "b")]
    addresses = ["10.213.7.1", "10.213.7.2"]
    carrier: subprocess.Popen[str] | None = None
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        arguments = [*names, *addresses, str(mbps), str(rtt_ms / 2), str(max(50.0, 2 * rtt_ms))]
        chosen = ["chrt", "-f", "50"] if processor is None else ["taskset", "-c", str(processor)]
        awake = ["awake"] if processor is not None else []
        carrier = subprocess.Popen(
            [*chosen, sys.executable, __file__, *arguments, *awake],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert carrier.stdout is not None
        if carrier.stdout.readline() != "ready\n":
            raise RuntimeError("the line between the namespaces could not be made")
        if congestion_control:
            for name, address in zip(names, addresses, strict=True):
                route = ["10.213.7.0/24", "dev", DEVICE, "src", address, "scope", "link"]
                route += ["proto", "kernel", "congctl", congestion_control]
                subprocess.run(["ip", "-n", name, "route", "replace", *route], check=True)
        yield (names[0], addresses[0]), (names[1], addresses[1])
    finally:
        if carrier is not None:
            carrier.terminate()
            carrier.wait()
            if carrier.stdout is not None:
                carrier.stdout.close()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def main() -> None:
    """The carrier: NAME NAME ADDRESS ADDRESS MBPS ONE_WAY_MS QUEUE_MS [awake]."""
    names, addresses, line = sys.argv[1:3], sys.argv[3:5], [float(one) for one in sys.argv[5:8]]
    devices = [
        _device(name, f"{at}/24", line[0]) for name, at in zip(names, addresses, strict=True)
    ]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("ready", flush=True)
    carry(devices[0], devices[1], *line, awake=sys.argv[8:] == ["awake"])


if __name__ == "__main__":
    main()
