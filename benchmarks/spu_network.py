"""SecretFlow SPU over the kernel's TCP and a carried line (``wire.py``), as its own link cannot be
put behind ``--network``. Each row is written when it is measured, and not measured again. Needs
root and the Python that has SPU.

python benchmarks/spu_network.py --spu-python spu-venv/bin/python \\
    --output benchmarks/results/spu-network.json
python benchmarks/tables.py spu benchmarks/results/spu-network.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pingpong import ends, write
from wire import DEVICE

from pi_system import models
from pi_system.bench import environment, peers
from pi_system.bench.observation import describe_model
from pi_system.bench.parity import accuracy
from pi_system.bench.peers.secretflow import VARIABLE
from pi_system.bench.peers.secretflow_party import CLIENT, SERVER
from pi_system.bench.schema import Latency
from pi_system.graph import serialize
from pi_system.graph.execute import run as run_plaintext
from pi_system.net.link import parse

NETWORKS = ("40:100", "80:20")
MODELS = ("demo", "random:resnet18@49600", "random:resnet18@all")
PEER = "spu-semi2k"


def main() -> None:
    """Measure what the output lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--spu-python", default=os.environ.get(VARIABLE))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--congestion-control", default="reno")
    given = parser.parse_args()
    rows = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    done = {(row["model"]["name"], row["network"]) for row in rows}
    described = environment.describe()
    for name in MODELS:
        for network in NETWORKS:
            if (name, network) not in done:
                print(f"{PEER}: {name} over {network}", file=sys.stderr, flush=True)
                rows.append(_row(name, network, given))
                write(given.output, described, rows)


def _row(name: str, network: str, given: argparse.Namespace) -> dict[str, Any]:
    graph = models.resolve(name)
    images, labels = models.images(graph, given.repeat)
    link = parse(network)
    assert link is not None
    with (
        tempfile.TemporaryDirectory(prefix="pi-spu-") as folder,
        ends(link, kernel=True, congestion_control=given.congestion_control) as (near, far),
    ):
        serialize.save(Path(folder) / "model", graph)
        run = peers.PeerRun(
            Path(folder) / "model",
            images,
            batch=1,
            repeat=given.repeat,
            warmup=given.warmup,
            threads=1,
            python=given.spu_python,
            places={
                CLIENT: peers.Place(tuple(near[0]), near[1], DEVICE),
                SERVER: peers.Place(tuple(far[0]), far[1], DEVICE),
            },
        )
        report = peers.get(PEER).run(run)
    return {
        "peer": PEER,
        "model": vars(describe_model(graph)),
        "network": network,
        "congestion_control": given.congestion_control,
        "latency_ms": vars(Latency.of(report.seconds)),
        "interface_bytes": report.interface_bytes,
        "accuracy": vars(accuracy(report.inferences, run_plaintext(graph, images), labels)),
        "settings": report.settings,
    }


if __name__ == "__main__":
    main()
