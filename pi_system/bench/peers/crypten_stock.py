"""CrypTen 0.4.1 as distributed: gloo, its trusted third party, its own random numbers and bytes.

Only its import is mended, without which it does not start, and its model is built from its own
operations on a masked network's kept positions (as everywhere in this project). Triples are made
while the inference waits for them, as its users get it. It is a yardstick, not a way to serve: see
:mod:`pi_system.backends.crypten.compat` for what is wrong with its randomness.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...parties.process import peak_memory, thread_environment
from . import PeerReport, PeerRun, processes
from .secretflow_party import interface_bytes

SERVER, CLIENT, DEALER = ROLES = ("server", "client", "dealer")
_START: Final = 120.0
_EACH: Final = 60.0
"""Seconds allowed for the start and for each inference."""


class CrypTenStock:
    """Three processes: both parties and CrypTen's trusted third party."""

    def run(self, run: PeerRun) -> PeerReport:
        from ...backends.crypten import compat

        compat.require()
        with tempfile.TemporaryDirectory(prefix="pi-bench-peer-") as folder:
            images = Path(folder) / "images.npy"
            np.save(images, run.images, allow_pickle=False)
            arguments = {
                "model": str(run.model),
                "images": str(images),
                "meeting": f"file://{folder}/meeting",
                "batch": run.batch,
                "repeat": run.repeat,
                "warmup": run.warmup,
                "threads": run.threads,
                "started": time.time(),
            }
            text = json.dumps(arguments)
            reports = processes.run(
                "stock CrypTen",
                {role: [sys.executable, "-m", __name__, role, text] for role in ROLES},
                {**os.environ, **thread_environment(run.threads), "GLOO_SOCKET_IFNAME": "lo"},
                _START + _EACH * run.repeat,
            )
        return PeerReport.of(reports, CLIENT)


def _party(role: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One process; the client's report has everything."""
    import torch

    from ...backends.crypten import compat
    from ...graph import serialize

    os.environ.update(
        RENDEZVOUS=arguments["meeting"],
        WORLD_SIZE="2",
        RANK=str(ROLES.index(role)),
        DISTRIBUTED_BACKEND="gloo",
    )
    crypten: Any = compat.import_unmended()
    from ...backends.crypten import export  # which needs the import as mended

    crypten.cfg.mpc.provider = "TTP"
    torch.set_num_threads(arguments["threads"])
    if role == DEALER:
        crypten.mpc.provider.TTPServer()  # until the client ends it
        return {"peak_memory": peak_memory()}
    crypten.init()
    torch.set_num_threads(arguments["threads"])
    graph = serialize.load(Path(arguments["model"]))
    images = np.load(arguments["images"], allow_pickle=False)
    model = export.build(graph if role == SERVER else graph.public()).encrypt(src=0)
    seconds, inferences = [], []
    before = carried = None
    setup = time.time() - arguments["started"]
    batch = arguments["batch"]
    for number in range(-arguments["warmup"], arguments["repeat"]):
        chosen = [(max(number, 0) * batch + i) % len(images) for i in range(batch)]
        held = torch.from_numpy(images[chosen])
        crypten.comm.get().barrier()
        if number == 0:
            before = interface_bytes()
        started = time.perf_counter()
        with crypten.no_grad():
            shares = crypten.cryptensor(held if role == CLIENT else torch.zeros_like(held), src=1)
            logits = model(shares).get_plain_text(dst=1)
        taken = time.perf_counter() - started
        if number >= 0 and role == CLIENT:
            seconds.append(taken)
            inferences.append({"images": chosen, "logits": logits.tolist()})
    crypten.comm.get().barrier()
    after = interface_bytes()
    if before is not None and after is not None:
        carried = (after - before) / arguments["repeat"]
    if role == CLIENT:
        crypten.uninit()  # this also ends the third party
    return {
        "setup_seconds": setup,
        "seconds": seconds,
        "interface_bytes": carried,
        "inferences": inferences,
        "peak_memory": peak_memory(),
        "settings": {
            "version": compat.VERSION,
            "triples": crypten.cfg.mpc.provider,
            "fraction_bits": crypten.cfg.encoder.precision_bits,
        },
    }


if __name__ == "__main__":
    print(json.dumps(_party(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # gloo's threads may abort an orderly end when a peer has gone before
