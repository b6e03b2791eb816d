"""Every message of a session x what can happen to it, with real parties: a table of outcomes.

    python benchmarks/faults.py --rows rows.jsonl --output benchmarks/results/faults

A server and a dealer serve; for every cell a client runs one session with a store on both sides,
through proxies that break one message, and after it a second one that must succeed. Rows are
appended to --rows as they come; run again with the same file to go on. "first" and "last" of the
repeated probes stand for all of them. Over TLS a message is a TLS record.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import queue
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fault_proxy import KINDS, Fault, Proxy, Wire

from pi_system.graph import serialize
from pi_system.graph.execute import run as plaintext
from pi_system.net import certificates

HERE = Path(__file__).resolve().parent
LINKS = ("client-server", "client-dealer", "server-dealer")
SHORT = ("--timeout", "2", "--prepare-timeout", "2")
"""Limits that make a stall a matter of 2 s and not of 8."""
PHASES = ("handshake", "setup", "probe", "offline", "online", "close")
LIMIT = 10.0


class Deployment:
    """Server and dealer as processes, three proxies, two stores, one after another client."""

    def __init__(
        self, folder: Path, model: Path, *, tls: bool, store: bool, backend: str, short: bool
    ) -> None:
        self.folder, self._tls, self._store, self._short = folder, tls, store, short
        self._model, self._backend = model, backend
        self.wire = Wire()
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.witness = folder / "witness.jsonl"
        self.witness.touch()
        if tls:
            certificates.make(folder / "certs", roles=("server", "client", "dealer"))
        self._readers: list[threading.Thread] = []
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.events: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        self.proxies = {link: Proxy(link, 0, self.wire, tls=tls) for link in LINKS}
        self.start("dealer")
        self.start("server")

    def start(self, role: str) -> None:
        """A listening role, at a new port behind the same proxies."""
        more = ["--listen", "127.0.0.1:0", "--log", "json"]
        more += ["--idle-timeout", "3"] if self._short else []
        if role == "server":
            more += ["--model", str(self._model)]
            more += ["--dealer", f"127.0.0.1:{self.proxies['server-dealer'].port}"]
            more += self._keeps(role)
        process = self.processes[role] = self._run(role, *more)
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        for link, proxy in self.proxies.items():
            if link.endswith(role):
                proxy.target = port
        reader = threading.Thread(target=self._listen, args=(process,), daemon=True)
        reader.start()
        self._readers.append(reader)
        self.idle = {**getattr(self, "idle", {}), role: _sockets(process.pid)}

    def client(self) -> subprocess.Popen[str]:
        """One that classifies the image."""
        process = self.processes["client"] = self._run(
            "client", "--server", f"127.0.0.1:{self.proxies['client-server'].port}",
            "--dealer", f"127.0.0.1:{self.proxies['client-dealer'].port}",
            "--images", str(self._model.parent / "x.npy"), "--format", "csv",
            *self._keeps("client"),
        )  # fmt: skip
        return process

    def _keeps(self, role: str) -> list[str]:
        return ["--store", str(self.folder / role)] if self._store else []

    def _run(self, role: str, *arguments: str) -> subprocess.Popen[str]:
        more = ["--certs", str(self.folder / "certs")] if self._tls else ["--insecure"]
        more += SHORT if self._short else ()
        command = [str(HERE / "fault_party.py"), role, *arguments, *more]
        return subprocess.Popen(
            [sys.executable, *command, "--backend", self._backend],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **os.environ, "PYTHONPATH": str(HERE.parent), "TMPDIR": str(self.temporary),
                "FAULT_WITNESS": str(self.witness),
            },
        )  # fmt: skip

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "stderr", "role": "?", "error": line.strip()}
            self.events.put((time.monotonic(), event))
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def kill(self, role: str) -> None:
        self.processes[role].kill()

    def ledger(self, role: str) -> tuple[int, int]:
        """The highest ``next`` and ``burnt`` of a store, read from a copy while it is in use."""
        if not self._store:
            return 0, -1
        with tempfile.TemporaryDirectory() as copy:
            for name in ("ledger.sqlite", "ledger.sqlite-wal"):
                if (self.folder / role / name).exists():
                    shutil.copy(self.folder / role / name, copy)
            if not (Path(copy) / "ledger.sqlite").exists():
                return 0, -1
            book = sqlite3.connect(Path(copy) / "ledger.sqlite")
            try:
                row = book.execute("SELECT max(next), max(burnt) FROM pair").fetchone()
            finally:
                book.close()
        return (row[0] or 0, -1 if row[1] is None else row[1])

    def uses(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.witness.read_text().splitlines()]

    def busy(self) -> list[str]:
        """Roles that hold more sockets than before any session."""
        return [
            role
            for role in ("server", "dealer")
            if self.processes[role].poll() is None
            and _sockets(self.processes[role].pid) > self.idle[role]
        ]

    def drain(self) -> list[tuple[float, dict[str, Any]]]:
        found = []
        while not self.events.empty():
            found.append(self.events.get())
        return found

    def close(self) -> list[str]:
        """End it; what was left behind."""
        self.wire.arm(None, lambda role: None)
        for role in ("server", "dealer"):
            self.processes[role].send_signal(signal.SIGTERM)
        for role in ("server", "dealer"):
            try:
                self.processes[role].wait(10)
            except subprocess.TimeoutExpired:
                self.processes[role].kill()
        for reader in self._readers:
            reader.join(10)
        for proxy in self.proxies.values():
            proxy.close()
        return [str(path.name) for path in (*self.temporary.iterdir(), *self.folder.rglob("*.tmp"))]


def _sockets(pid: int) -> int:
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")
        except OSError:
            continue
    return count


def _answer(out: str, truth: np.ndarray[Any, Any]) -> str:
    """ "right", "wrong" or "none"."""
    rows = list(csv.DictReader(io.StringIO(out)))
    if len(rows) != 1:
        return "none"
    best = int(truth.argmax())
    good = int(rows[0]["class"]) == best and abs(float(rows[0]["logit"]) - truth[best]) < 0.1
    return "right" if good else "wrong"


def run_cell(at: Deployment, fault: Fault | None, truth: np.ndarray[Any, Any]) -> dict[str, Any]:
    """One session with a fault, then one without."""
    at.drain()
    before = {role: at.ledger(role) for role in ("client", "server")}
    struck: list[str] = []

    def hit(role: str) -> None:
        struck.append(role)
        at.kill(role)

    at.wire.arm(fault, hit)
    client = at.client()
    started = time.monotonic()
    hung = []
    try:
        out, err = client.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        hung.append("client")
        client.kill()
        out, err = client.communicate()
    ended = time.monotonic()
    fired = at.wire.fired
    since = fired if fired is not None else started
    while (busy := at.busy()) and time.monotonic() - max(since, ended - LIMIT) < LIMIT:
        time.sleep(0.02)
    quiet = time.monotonic()
    hung += busy
    time.sleep(0.02)
    row: dict[str, Any] = {"killed": struck[0] if struck else "", "fired": fired is not None}
    row["seen"] = {"|".join(key): value for key, value in at.wire.seen.items()}
    row["client"] = {"exit": client.returncode, "error": (err.strip().splitlines() or [""])[-1]}
    row["seconds"] = round(max(ended, quiet) - since, 2)
    row["answer"] = _answer(out, truth) if client.returncode == 0 else ""
    for when, event in at.drain():
        told = row.get(event["role"], {"event": "ended"})["event"] != "ended"  # the first counts
        if event["event"] in ("failed", "refused", "ended", "stderr") and not told:
            row[event["role"]] = {
                "event": event["event"],
                "kind": event.get("kind", ""),
                "error": event.get("error", ""),
                "seconds": round(when - since, 2),
            }
    after = {role: at.ledger(role) for role in ("client", "server")}
    burnt = [role for role in after if after[role][1] > before[role][1]]
    row["material"] = "burnt at " + " and ".join(burnt) if burnt else "never claimed"
    row["hung"] = hung
    at.wire.arm(None, hit)  # lets go of what the fault held
    for role in ("dealer", "server"):
        if at.processes[role].poll() is not None:
            if role not in struck:
                row["hung"].append(f"{role} ended with {at.processes[role].returncode}")
            at.start(role)
    retry = at.client()
    try:
        out, err = retry.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        retry.kill()
        out, err = retry.communicate()
    good = retry.returncode == 0 and _answer(out, truth) == "right"
    row["retry"] = "right" if good else (err.strip().splitlines() or ["no answer"])[-1]
    uses = at.uses()
    digests = Counter((use["role"], use["digest"]) for use in uses)
    row["reused"] = sum(count - 1 for count in digests.values())
    if at._store:
        for role in ("client", "server"):
            ids = [use["id"] for use in uses if use["role"] == role]
            row["reused"] += sum(b <= a for a, b in itertools.pairwise(ids))
            row["reused"] += any(i > at.ledger(role)[1] for i in ids)
    deadline = time.monotonic() + 5
    while at.busy() and time.monotonic() < deadline:
        time.sleep(0.02)
    row["orphans"] = at.busy() + [path.name for path in at.temporary.iterdir()]
    row["orphans"] += [path.name for path in at.folder.rglob("*.tmp")]
    return row


def verdict(row: dict[str, Any]) -> str:
    """ "ok", or what was not as it must be."""
    wrong = []
    if row["hung"]:
        wrong.append("hung: " + ", ".join(row["hung"]))
    if row["seconds"] > LIMIT:
        wrong.append(f"{row['seconds']} s")
    code = row["client"]["exit"]
    if row["killed"] != "client" and code not in (0, 5, 6):
        wrong.append(f"client exit {code}")
    if code == 0 and row["answer"] != "right":
        wrong.append(f"{row['answer']} answer")
    for role in ("server", "dealer"):
        if row["killed"] != role and row.get(role, {}).get("error", "").startswith("unexpected"):
            wrong.append(f"{role}: {row[role]['error']}")
    noticed = row["killed"] == "server" or row.get("server", {}).get("event") != "ended"
    if code != 0 and not noticed and row["phase"] != "close":
        wrong.append("the server took it for an orderly end")
    if row["retry"] != "right":
        wrong.append(f"retry: {row['retry']}")
    if row["reused"]:
        wrong.append("reuse")
    if row["orphans"]:
        wrong.append("left: " + ", ".join(row["orphans"]))
    return "; ".join(wrong) or "ok"


def cells(plain: dict[str, Any], seen: dict[str, Any], *, tls: bool) -> list[tuple[Fault, str]]:
    """Every message of a session, with its phase, x every kind of fault."""
    found = []
    for key, messages in seen.items():
        link, sender = key.split("|")
        phases = [phase for phase, _ in plain[key]]
        if tls:  # its own messages come first, and at the end perhaps an alert
            first = 5 if link.startswith(sender) else 7
            phases = ["handshake"] * first + phases
            phases += ["close"] * (len(messages) - len(phases))
        for number, phase in enumerate(phases):
            if [*phases, ""][number - 1 : number + 2] == ["probe"] * 3:
                continue
            found += [(Fault(link, sender, number, kind), phase) for kind in KINDS]
    return found


def model_at(folder: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    """A small network and an image, and its logits."""
    sys.path.insert(0, str(HERE.parent / "tests" / "backends" / "fss"))
    from fss_networks import images, planned, residual

    graph, _ = planned(residual(side=4))
    serialize.save(folder / "model", graph)
    x = images(graph, 1)
    np.save(folder / "x.npy", x)
    return folder / "model", plaintext(graph, x)[0]


def matrix(
    folder: Path, rows: Path | None, *, tls: bool, store: bool, backend: str, workers: int,
    every: int, limit: float, kinds: tuple[str, ...] = KINDS, short: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the cells that ``rows`` does not hold yet."""
    model, truth = model_at(folder)
    seen = {}
    for name, secure in (("plain", False), ("tls", tls)):
        at = Deployment(
            folder / f"reference-{name}", model, tls=secure, store=store, backend=backend,
            short=short,
        )  # fmt: skip
        reference = run_cell(at, None, truth)
        at.close()
        assert verdict({**reference, "phase": ""}) == "ok" and reference["client"]["exit"] == 0, (
            reference
        )
        seen[name] = reference["seen"]
    todo = [
        cell for cell in cells(seen["plain"], seen["tls"], tls=tls) if cell[0].kind in kinds
    ][::every]  # fmt: skip
    name = f"{'tls' if tls else 'plain'}, {'stores' if store else 'no stores'}"
    done = (
        [json.loads(line) for line in rows.read_text().splitlines()]
        if rows and rows.exists()
        else []
    )
    have = {(row["transport"], *row["fault"]) for row in done}
    waiting: queue.Queue[tuple[Fault, str, int]] = queue.Queue()
    for fault, phase in todo:
        if (name, *fault) not in have:
            waiting.put((fault, phase, 1))
    random.Random(1).shuffle(waiting.queue)  # type: ignore[arg-type]
    lock = threading.Lock()
    until = time.monotonic() + limit

    def work(number: int) -> None:
        at = None
        while time.monotonic() < until:
            try:
                fault, phase, attempt = waiting.get_nowait()
            except queue.Empty:
                break
            if at is None:
                place = folder / f"worker-{number}-{time.monotonic_ns()}"
                at = Deployment(place, model, tls=tls, store=store, backend=backend, short=short)
            row = run_cell(at, fault, truth)
            del row["seen"]
            row = {"transport": name, "phase": phase, "fault": fault, "attempt": attempt, **row}
            row["verdict"] = verdict(row)
            if row["verdict"] != "ok":
                at.close()
                at = None
            with lock:
                done.append(row)
                print(
                    len(done), name, phase, *fault, row["verdict"], row["seconds"], file=sys.stderr
                )
                if rows:
                    with open(rows, "a") as file:
                        file.write(json.dumps(row) + "\n")
        if at is not None:
            at.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def table(rows: list[dict[str, Any]]) -> str:
    """Per transport, phase and fault: cells, outcomes, times, material."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["transport"], row["phase"], row["fault"][3]), []).append(row)
    lines = [
        "| links | phase | fault | messages | as required | client: exit code x cells | "
        "longest, s | burnt / never claimed | reused | left behind |",
        "|---|---|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for key, group in sorted(groups.items(), key=lambda item: _place(item[0])):
        codes = Counter(row["client"]["exit"] for row in group)
        burnt = sum(row["material"] != "never claimed" for row in group)
        lines.append(
            f"| {' | '.join(key)} | {len(group)} | {sum(r['verdict'] == 'ok' for r in group)} | "
            f"{', '.join(f'{code} x {n}' for code, n in sorted(codes.items()))} | "
            f"{max(row['seconds'] for row in group):.1f} | {burnt} / {len(group) - burnt} | "
            f"{sum(row['reused'] for row in group)} | "
            f"{sum(bool(row['orphans']) for row in group)} |"
        )
    bad = [row for row in rows if row["verdict"] != "ok"]
    lines += ["", f"{len(rows)} cells, {len(rows) - len(bad)} as required."]
    lines += [
        f"- {r['transport']}, {r['phase']}, {', '.join(map(str, r['fault']))}: {r['verdict']}"
        for r in bad
    ]
    return "\n".join(lines) + "\n"


def _place(key: tuple[str, str, str]) -> tuple[str, int, int]:
    links, phase, kind = key
    return links, PHASES.index(phase), KINDS.index(kind)


def preface(*, short: bool) -> str:
    """What a table is of."""
    limits = "limits on waiting of 2 s" if short else "the default limits on waiting"
    return f"""# Fault matrix

One session (setup, offline, one inference) of a network with 4 linear and 3 ReLU layers on
loopback, {limits}, and a second one with fresh material that
must succeed. Written by `benchmarks/faults.py`; every cell is in the JSON file beside it. Exit code
-9 is the killed client itself, 0 a fault that came too late to matter. Over TLS a flipped bit is
refused; without TLS it can go unnoticed, and a wrong answer is what such a cell shows.

"""


@click.command()
@click.option("--backend", default="fss", show_default=True)
@click.option("--rows", type=click.Path(path_type=Path, dir_okay=False), help="Kept; resumed from.")
@click.option("--output", type=click.Path(path_type=Path), help="Writes OUTPUT.json and OUTPUT.md.")
@click.option("--plain", is_flag=True, help="Without TLS, where a flipped bit can go unnoticed.")
@click.option("--no-store", is_flag=True, help="Material in memory only.")
@click.option(
    "--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS,
    help="Only these faults.",
)  # fmt: skip
@click.option("--every", type=click.IntRange(1), default=1, show_default=True, help="Of the cells.")
@click.option(
    "--short", is_flag=True, help="Limits on waiting of 2 s in place of the default ones."
)
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seconds", type=float, default=86_400.0, help="Start no cell after so long.")
def main(
    backend: str, rows: Path | None, output: Path | None, plain: bool, no_store: bool,
    kinds: tuple[str, ...], every: int, short: bool, workers: int, seconds: float,
) -> None:  # fmt: skip
    """Break every message of a session in every way, and print what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        done = matrix(
            Path(folder), rows, tls=not plain, store=not no_store, backend=backend,
            workers=workers, every=every, limit=seconds, kinds=kinds, short=short,
        )  # fmt: skip
    text = table(done)
    print(text)
    if output:
        output.with_suffix(".md").write_text(preface(short=short) + text)
        compact = (
            "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in done) + "\n]\n"
        )
        output.with_suffix(".json").write_text(compact)


if __name__ == "__main__":
    main()
