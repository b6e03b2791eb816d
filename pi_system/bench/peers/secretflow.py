"""SecretFlow SPU, two parties, as distributed: SEMI2K and CHEETAH over its own link.

Its packages do not go with ours, so it runs under the Python of an environment of its own, where
:mod:`.secretflow_party` turns the graph into a JAX function. Only kept ReLUs are compared. The
server owns the weights and the client the image; neither reads the other's files.

SEMI2K has its triples from its first party, here the server (``TrustedFirstParty``, its default):
that party could unmask the image, so its figures are those of a protocol with a trusted dealer
whose work is done meanwhile, and no more. CHEETAH needs to trust nobody; its oblivious transfers
are set up by the first inference.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...errors import UsageError
from ...graph import serialize
from ...graph.ir import Graph
from ...parties.process import thread_environment
from . import PeerReport, PeerRun, Place, processes
from .secretflow_party import CLIENT, ROLES, SERVER

VARIABLE: Final = "PI_SPU_PYTHON"
FRACTION_BITS: Final = 18
"""SPU's own choice in a 64-bit ring."""
_START: Final = 180.0
_EACH: Final = 600.0
"""Seconds allowed for the start and for each inference."""


@dataclass(frozen=True)
class SecretFlow:
    """Two processes, one per party.

    Attributes:
        protocol: SPU's name of it.
    """

    protocol: str

    def run(self, run: PeerRun) -> PeerReport:
        if run.python is None:
            raise UsageError(
                "SecretFlow SPU needs an environment of its own: give its Python by --spu-python "
                f"or {VARIABLE} (benchmarks/README.md, Peers)"
            )
        graph = serialize.load(run.model)
        places = {role: run.places.get(role, Place()) for role in ROLES}
        with tempfile.TemporaryDirectory(prefix="pi-bench-peer-") as folder:
            base = Path(folder)
            np.save(base / "images.npy", run.images, allow_pickle=False)
            for role in ROLES:
                write_model(base / role, graph, secret=role == SERVER)
            task = json.dumps(
                {
                    "protocol": self.protocol,
                    "fraction_bits": FRACTION_BITS,
                    "model": {role: str(base / role) for role in ROLES},
                    "images": str(base / "images.npy"),
                    "addresses": [
                        f"{places[role].address}:{port}"
                        for role, port in zip(ROLES, _free_ports(), strict=True)
                    ],
                    "interface": places[CLIENT].interface,
                    "batch": run.batch,
                    "repeat": run.repeat,
                    "warmup": run.warmup,
                    "threads": run.threads,
                    "timeout": round(_EACH),
                    "started": time.time(),
                }
            )
            script = str(Path(__file__).with_name("secretflow_party.py"))
            reports = processes.run(
                f"SecretFlow SPU ({self.protocol})",
                {
                    role: [*places[role].command, run.python, "-I", script, role, task]
                    for role in ROLES
                },
                environment(run.threads),
                _START + _EACH * (run.warmup + run.repeat),
            )
        return PeerReport.of(reports, CLIENT)


def environment(threads: int) -> dict[str, str]:
    """Of its processes. SPU asks OpenMP for four threads whatever it is told, which on fewer
    cores takes it several times longer."""
    limit = {"OMP_THREAD_LIMIT": str(threads), "JAX_PLATFORMS": "cpu"}
    return {**os.environ, **thread_environment(threads), **limit}


def write_model(folder: Path, graph: Graph, *, secret: bool) -> None:
    """What a party is told of the model: ``graph.json``, nodes and the shapes of weights, and
    ``tensors.npz``, the masks and, if ``secret``, the weights."""
    held = graph if secret else graph.public()
    shapes = {k: v.shape for k, v in graph.tensors.items() if not k.endswith(".mask")}
    header: dict[str, Any] = {"nodes": graph.header()["nodes"], "weights": shapes}
    folder.mkdir()
    (folder / "graph.json").write_text(json.dumps(header))
    with open(folder / "tensors.npz", "wb") as file:
        np.savez(file, **held.tensors)  # type: ignore[arg-type]


def _free_ports() -> list[int]:
    """Two that were free a moment ago; SPU takes only fixed ones."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in (first, second)]
