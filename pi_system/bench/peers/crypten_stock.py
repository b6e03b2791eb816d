"""CrypTen 0.4.1 as distributed: gloo, its trusted third party, its own random numbers and bytes.

Only its import is mended, without which it does not start, and its model is built from its own
operations on a masked network's kept positions (as everywhere in this project). Triples are made
while the inference waits for them, as its users get it. It is a yardstick, not a way to serve: see
:mod:`pi_system.backends.crypten.compat` for what is wrong with its randomness.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...errors import PeerError, PeerTimeout
from ...parties.process import peak_memory, thread_environment
from . import PeerReport, PeerRun

SERVER, CLIENT, DEALER = ROLES = ("server", "client", "dealer")
_START: Final = 120.0
_EACH: Final = 60.0
"""Seconds allowed for the start and for each inference."""
_GRACE: Final = 5.0
"""Seconds for the other party to fail too, and to say why."""


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
            reports = _run(json.dumps(arguments), run.threads, _START + _EACH * run.repeat)
        client = reports[CLIENT]
        return PeerReport(
            setup_seconds=client["setup_seconds"],
            seconds=client["seconds"],
            interface_bytes=client["interface_bytes"],
            inferences=client["inferences"],
            peak_memory={role: reports[role]["peak_memory"] for role in ROLES},
        )


def _run(arguments: str, threads: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Run the processes to their end; their reports.

    Raises:
        PeerError: one of them failed.
        PeerTimeout: they took too long.
    """
    children: dict[str, subprocess.Popen[str]] = {}
    environment = {**os.environ, **thread_environment(threads), "GLOO_SOCKET_IFNAME": "lo"}
    deadline = time.monotonic() + seconds
    reports: dict[str, dict[str, Any]] = {}
    failures = []
    try:
        for role in ROLES:
            children[role] = subprocess.Popen(
                [sys.executable, "-m", __name__, role, arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
        for role in (CLIENT, SERVER, DEALER):
            try:
                out, err = children[role].communicate(timeout=deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                raise PeerTimeout(f"stock CrypTen was not done within {seconds:g} s") from None
            if children[role].returncode == 0:
                reports[role] = json.loads(out.splitlines()[-1])
            else:
                last = (err.strip().splitlines() or ["ended without a word"])[-1]
                failures.append(f"its {role}: {last}")
                deadline = min(deadline, time.monotonic() + _GRACE)
    finally:
        for child in children.values():
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.communicate()
    if failures:
        raise PeerError(f"stock CrypTen failed; {'; '.join(failures)}")
    return reports


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
            before = loopback_bytes()
        started = time.perf_counter()
        with crypten.no_grad():
            shares = crypten.cryptensor(held if role == CLIENT else torch.zeros_like(held), src=1)
            logits = model(shares).get_plain_text(dst=1)
        taken = time.perf_counter() - started
        if number >= 0 and role == CLIENT:
            seconds.append(taken)
            inferences.append({"images": chosen, "logits": logits.tolist()})
    crypten.comm.get().barrier()
    after = loopback_bytes()
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
    }


def loopback_bytes() -> int | None:
    """What the loopback interface has carried since the system started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "lo":
                return int(counters.split()[0])
    return None


if __name__ == "__main__":
    print(json.dumps(_party(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # gloo's threads may abort an orderly end when a peer has gone before
