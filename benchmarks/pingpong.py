"""Round trips of single messages over the emulated network and over the kernel's TCP, without any
inference: a message of each size, answered by one byte. Needs root.

python benchmarks/pingpong.py --congestion-control reno --output benchmarks/results/pingpong.json
python benchmarks/tables.py pingpong benchmarks/results/pingpong.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wire import wire

from pi_system.bench import environment
from pi_system.files import write_atomic
from pi_system.net.channel import Channel
from pi_system.net.link import HEADERS, SEGMENT, Link, parse

NETWORKS = ("0.3:1000", "40:100", "80:20")
SIZES = (16, 1_000, 10_000, 100_000, 1_000_000)
SHORT_MS = 1.0
"""Round trip below which the line gets a processor of its own, and is calibrated."""
CALIBRATIONS = 2
FILL_SECONDS = 0.5
"""Of messages before those that count, so that TCP knows the line."""

KEEPS_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 26),
}
"""Has the C library keep what a message took, or each of 1 MB waits a millisecond for new pages."""

End = tuple[list[str], str]
"""What a command at one end begins with, and its address."""
Ends = tuple[End, End]


@contextlib.contextmanager
def ends(link: Link, *, kernel: bool, congestion_control: str | None = None) -> Iterator[Ends]:
    """Two ends of the kernel's line, or of loopback for an emulated link.

    A line shorter than a millisecond is carried by a process that has a processor to itself, and
    the parties, over both paths, have the others. What carrying takes is measured with small
    messages and taken off the line's delay, so that their round trip is the one asked for.
    """
    short = link.rtt_ms < SHORT_MS
    *others, last = sorted(os.sched_getaffinity(0))
    if short and not others:
        raise SystemExit("a line below a millisecond needs two processors")
    pinned = ["taskset", "-c", ",".join(map(str, others))] if short else []
    if not kernel:
        yield (pinned, "127.0.0.1"), (pinned, "127.0.0.1")
        return
    delay = link.rtt_ms
    processor = last if short else None

    @contextlib.contextmanager
    def line() -> Iterator[Ends]:
        with wire(
            delay, link.mbps, congestion_control=congestion_control, processor=processor
        ) as namespaces:
            one, other = (
                ([*pinned, "ip", "netns", "exec", name], address) for name, address in namespaces
            )
            yield one, other

    for _ in range(CALIBRATIONS if short else 0):
        with line() as found:
            delay = max(0.0, delay + link.rtt_ms - round_trips(found, "loopback", SIZES[:1])[0])
    with line() as found:
        yield found


def round_trips(
    between: Ends, network: str, sizes: Sequence[int] = SIZES, count: int = 100
) -> list[float]:
    """Median milliseconds for a message of each size and its answer.

    Args:
        network: emulated by the two processes; loopback where the line is real.
    """
    (near, _), (far, address) = between
    kept = {**os.environ, **KEEPS_MEMORY}
    role = [sys.executable, __file__, "--network", network, "--address", address]
    with subprocess.Popen(
        [*far, *role, "--answer"], env=kept, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdout is not None
        port = peer.stdout.readline().strip()
        asked = ["--port", port, "--count", str(count), "--sizes", *map(str, sizes)]
        done = subprocess.run([*near, *role, *asked], env=kept, stdout=subprocess.PIPE, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


def expected(link: Link, size: int) -> float:
    """Milliseconds on the link itself, once its window is open."""
    packets = -(-size // SEGMENT)
    return link.rtt_ms + 8 * (size + packets * HEADERS + 1 + HEADERS) / (link.mbps * 1e3)


def write(output: Path, described: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write what was measured so far."""
    document = {"schema_version": 1, "environment": described, "rows": rows}
    write_atomic(output, (json.dumps(document, indent=1) + "\n").encode())


def _answer(address: str, link: Link | None) -> None:
    with socket.create_server((address, 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    with Channel(connection, link=link) as channel:
        while channel.recv():
            channel.send(b"\0")


def _ask(address: str, port: int, link: Link | None, sizes: Sequence[int], count: int) -> None:
    medians = []
    with Channel(socket.create_connection((address, port)), link=link) as channel:

        def once(message: bytes) -> float:
            started = time.perf_counter()
            channel.send(message)
            channel.recv()
            return 1e3 * (time.perf_counter() - started)

        filled = time.monotonic() + FILL_SECONDS
        while time.monotonic() < filled:
            once(bytes(SIZES[-1]))
        for size in sizes:
            message = bytes(size)
            medians.append(round(statistics.median(once(message) for _ in range(count)), 4))
        channel.send(b"")
    print(json.dumps(medians))


def main() -> None:
    """Measure every network over both paths, or be one of the two processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--network", action="append", help=f"default: {', '.join(NETWORKS)}")
    parser.add_argument("--congestion-control", help="of the kernel's TCP; default: the machine's")
    parser.add_argument("--count", type=int, default=100, help="messages of each size below 1 ms")
    for name, kind in (("--address", str), ("--port", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer:
        _answer(given.address, parse(given.network[0]))
    elif given.address:
        _ask(given.address, given.port, parse(given.network[0]), given.sizes, given.count)
    elif given.output is None:
        parser.error("--output is missing")
    else:
        rows = [row for name in given.network or NETWORKS for row in _rows(name, given)]
        described = environment.describe()
        control = given.congestion_control or described["tcp_congestion_control"]
        document = {
            "schema_version": 1,
            "environment": described,
            "congestion_control": control,
            "rows": rows,
        }
        write_atomic(given.output, (json.dumps(document, indent=1) + "\n").encode())


def _rows(network: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    link = parse(network)
    assert link is not None
    count = given.count if link.rtt_ms < SHORT_MS else 9
    found = {}
    for path in ("kernel", "emulated"):
        with ends(
            link, kernel=path == "kernel", congestion_control=given.congestion_control
        ) as between:
            emulated = "loopback" if path == "kernel" else network
            found[path] = round_trips(between, emulated, count=count)
    return [
        {
            "network": network,
            "bytes": size,
            "expected_ms": round(expected(link, size), 4),
            "kernel_ms": kernel,
            "emulated_ms": emulated,
        }
        for size, kernel, emulated in zip(SIZES, found["kernel"], found["emulated"], strict=True)
    ]


if __name__ == "__main__":
    main()
