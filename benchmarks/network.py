"""The emulated network of ``--network`` beside the kernel's TCP over a carried line (``wire.py``).

The same private inference runs over both in turns, client on one end, server and dealer on the
other, TLS on all links; rows that the output has are not measured again. Below a millisecond all
parties share the processors that the line's carrier leaves (``pingpong.py``). Needs root.

python benchmarks/network.py --congestion-control reno --output benchmarks/results/network.json
python benchmarks/tables.py network benchmarks/results/network.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pingpong import NETWORKS, Ends, ends, write

from pi_system import models
from pi_system.bench import environment
from pi_system.bench.schema import Latency
from pi_system.graph import serialize
from pi_system.net.link import parse
from pi_system.parties.process import thread_environment

CASES = ("fss:demo", "fss:random:resnet18@49600", "crypten:demo")
TIMEOUTS = ("--timeout", "60", "--prepare-timeout", "600")


def main() -> None:
    """Measure what the output lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--network", action="append", help=f"default: {', '.join(NETWORKS)}")
    parser.add_argument(
        "--case", action="append", help=f"BACKEND:MODEL; default: {', '.join(CASES)}"
    )
    parser.add_argument("--rounds", type=int, default=2, help="sessions of each in turns")
    parser.add_argument("--repeat", type=int, default=5, help="inferences timed in a session")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--congestion-control", help="of the kernel's TCP; default: the machine's")
    given = parser.parse_args()
    rows = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    done = {
        (row["backend"], row["model"], row["network"], row["congestion_control"]) for row in rows
    }
    described = environment.describe()
    control = given.congestion_control or described["tcp_congestion_control"]
    for case in given.case or CASES:
        backend, _, model = case.partition(":")
        with tempfile.TemporaryDirectory(prefix="pi-network-") as folder:
            graph = models.resolve(model)
            serialize.save(Path(folder) / "model", graph)
            np.save(Path(folder) / "images.npy", models.images(graph, given.repeat)[0])
            subprocess.run(
                [*_party("certs"), f"{folder}/certs"], check=True, stdout=subprocess.PIPE
            )
            for network in given.network or NETWORKS:
                if (backend, model, network, control) in done:
                    continue
                print(f"{case} over {network}", file=sys.stderr, flush=True)
                measured = _row(Path(folder), backend, network, given)
                rows.append(
                    {
                        "backend": backend,
                        "model": model,
                        "network": network,
                        "congestion_control": control,
                        **measured,
                    }
                )
                write(given.output, described, rows)


def _row(folder: Path, backend: str, network: str, given: argparse.Namespace) -> dict[str, Any]:
    """Both paths in turns."""
    link = parse(network)
    assert link is not None

    def measure(path: str) -> dict[str, Any]:
        kernel = path == "kernel"
        with ends(link, kernel=kernel, congestion_control=given.congestion_control) as between:
            options = ["--network", "loopback" if kernel else network]
            options += ["--backend", backend, "--certs", str(folder / "certs"), *TIMEOUTS]
            counts = ["--repeat", str(given.repeat), "--warmup", str(given.warmup)]
            return _session(folder, between, options, counts)

    seen: dict[str, list[dict[str, Any]]] = {"kernel": [], "emulated": []}
    for number in range(given.rounds):
        for path in sorted(seen, reverse=number % 2 == 1):
            seen[path].append(measure(path))
    result = {path: _figures(sessions) for path, sessions in seen.items()}
    ratio = result["emulated"]["online_ms"]["median"] / result["kernel"]["online_ms"]["median"]
    return {**result, "emulated_over_kernel": round(ratio, 4)}


def _figures(sessions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    latency = Latency.of(
        one["online_seconds"] for session in sessions for one in session["inferences"]
    )
    trips = [trip for session in sessions for trip in session["round_trip_seconds"]]
    return {
        "online_ms": vars(latency),
        "rtt_ms": round(1e3 * statistics.median(trips), 4),
        "mbps": round(statistics.median(session["megabits"] for session in sessions), 1),
    }


def _session(
    folder: Path, between: Ends, options: Sequence[str], counts: Sequence[str]
) -> dict[str, Any]:
    """One session; returns the client's report."""
    (near, _), (far, address) = between
    settings = {"env": {**os.environ, **thread_environment(1)}, "text": True}
    with contextlib.ExitStack() as stack:

        def serve(*arguments: str) -> str:
            command = [*far, *_party(*arguments), "--listen", f"{address}:0", "--once", *options]
            child = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, **settings)  # type: ignore[call-overload]
            )
            stack.callback(child.terminate)
            return f"{address}:{json.loads(child.stdout.readline())['port']}"

        dealer = serve("dealer")
        server = serve("server", "--model", str(folder / "model"), "--dealer", dealer)
        client = _party("client", "--server", server, "--dealer", dealer)
        client += ["--images", str(folder / "images.npy"), "--format", "json", *counts, *options]
        client += ["--ahead", "0"]  # nobody is to compute or send while another is timed
        done = subprocess.run([*near, *client], stdout=subprocess.PIPE, check=True, **settings)  # type: ignore[call-overload]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _party(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pi_system.cli.party", *arguments]


if __name__ == "__main__":
    main()
