"""Many clients at once, and one after another, against a server and a dealer in processes.

python benchmarks/load.py --clients 1 --sessions 1000 --inferences 1
python benchmarks/load.py --clients 8 --inferences 50 --disconnect 0.1 --store
python benchmarks/load.py --table 1 2 4 8 --inferences 20

Every session is a TCP connection of its own to each, over TLS. With ``--disconnect P`` a client
breaks both connections at a random moment of a fraction P of its inferences and comes again.
Every answer must be plaintext's within the plan's error or a named error, no masked image, seed or
inference id may be sent twice, and the memory of server and dealer must not grow by more than a
tenth after a fifth of the run (from the second fifth, by medians and by maxima). Exit code 1
where any of this does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PARTY = [sys.executable, "-m", "pi_system.cli.party"]
FIFTHS = 5
BINS = 50
GROWTH = 0.1
LONG = 200
"""Inferences of a run whose memory is judged: a shorter one is all warm-up."""
PAUSE = 0.3
TRIES = 200
"""Failures in a row after which a client gives up."""


@dataclass(frozen=True)
class Work:
    """What one client process does.

    Attributes:
        number: of the client; also the seed of its accidents.
        images: (N, C, H, W) normalised, taken in turns.
        sessions: one after another, of ``inferences`` each, not counting those after accidents.
        store: folder of its material between sessions.
    """

    number: int
    server: tuple[str, int]
    dealer: tuple[str, int]
    certs: Path
    images: Any
    sessions: int
    inferences: int
    disconnect: float
    store: Path | None


@dataclass
class Told:
    """What it reports.

    Attributes:
        answers: image, online seconds, and the logits.
        errors: by class, with the number of accidents of our own making among them.
        sent: digests of masked images and seeds, and ids where a store is used.
    """

    answers: list[tuple[int, float, list[float]]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    accidents: int = 0
    sessions: int = 0
    sent: list[str] = field(default_factory=list)
    bound: float = 0.0
    offline: float = 0.0
    online: float = 0.0


def client(work: Work, tell: Any, together: Any = None) -> None:
    """The body of a client's process."""
    told = Told()
    try:
        if together is None:
            _sessions(work, told)
        else:
            _in_step(work, told, together)
    except BaseException as error:
        tell.put((work.number, told, f"{type(error).__name__}: {error}"))
        raise
    tell.put((work.number, told, ""))


def _settings(work: Work) -> Any:
    from pi_system.backends import base
    from pi_system.net.tls import Identity
    from pi_system.parties.address import Address
    from pi_system.parties.client import ClientSettings

    backend = base.get("fss")
    if work.store is not None:
        base.open_store(backend, work.store, "client")
    return ClientSettings(
        Address(*work.server), (Address(*work.dealer),), backend, "fss",
        identity=Identity.of(work.certs, "client"),
    )  # fmt: skip


def _sessions(work: Work, told: Told) -> None:
    from pi_system.errors import BusyError, PiError
    from pi_system.parties.client import Client

    settings, chance = _settings(work), random.Random(work.number)
    for _ in range(work.sessions):
        left, tries = work.inferences, TRIES
        while left:
            try:
                with Client(settings) as here:
                    told.sessions += 1
                    _watch(here, work, told)
                    here.setup()
                    told.bound = here.facts()["error"]
                    if work.store is not None and here.stock < 1:
                        here.prepare(min(left, 5))
                    while left:
                        with _accident(here, work, chance, told):
                            here.offline(1)
                            image = (work.number + left) % len(work.images)
                            started = time.perf_counter()
                            logits = here.online(work.images[image : image + 1])
                            seconds = time.perf_counter() - started
                        told.answers.append((image, seconds, logits[0].tolist()))
                        left -= 1
                        tries = TRIES
            except BusyError:
                told.errors["BusyError"] += 1
                time.sleep(PAUSE * chance.random())
            except PiError as error:
                told.errors[type(error).__name__] += 1
            tries -= 1
            if not tries:
                raise RuntimeError(f"no answer in {TRIES} tries: {dict(told.errors)}")


@contextlib.contextmanager
def _accident(here: Any, work: Work, chance: random.Random, told: Told) -> Iterator[None]:
    """Perhaps break the connections within the block, at any moment of it."""
    if chance.random() >= work.disconnect:
        yield
        return
    usual = 0.001 + np.median([seconds for _, seconds, _ in told.answers] or [0.05])
    told.accidents += 1
    timer = threading.Timer(chance.uniform(0, 4 * usual), _break, [here])
    timer.start()
    try:
        yield
    finally:
        timer.join()


def _break(here: Any) -> None:
    for channel in here._channels.values():
        channel.cut()


def _watch(here: Any, work: Work, told: Told) -> None:
    """Note what must never be sent twice."""
    opened: set[int] = set()

    def note(channel: Any, direction: str, payload: memoryview) -> None:
        labels = channel.meter.labels
        if direction != "sent" or len(payload) < 24:
            return
        if channel.peer == "dealer" and len(payload) == 24:
            told.sent.append("seed " + hashlib.sha256(payload[8:]).hexdigest())
        elif labels.phase == "online" and labels.inference not in opened:
            opened.add(labels.inference)
            told.sent.append("image " + hashlib.sha256(payload[8:]).hexdigest())
            if work.store is not None:
                number = int.from_bytes(payload[:8], "little")
                told.sent.append(f"id {work.number} {number}")

    for channel in here._channels.values():
        channel.tap = lambda *args, channel=channel: note(channel, *args)


def _in_step(work: Work, told: Told, together: Any) -> None:
    """All clients at once: lay the material, then ask; both timed from the same start."""
    from pi_system.parties.client import Client

    with Client(_settings(work)) as here:
        told.sessions = 1
        here.setup()
        told.bound = here.facts()["error"]
        here.offline(2)
        for _ in range(2):
            here.online(work.images[:1])
        together.wait()
        told.offline = _timed(lambda: [here.offline(1) for _ in range(work.inferences)])
        together.wait()
        started = time.perf_counter()
        for turn in range(work.inferences):
            image = (work.number + turn) % len(work.images)
            began = time.perf_counter()
            logits = here.online(work.images[image : image + 1])
            told.answers.append((image, time.perf_counter() - began, logits[0].tolist()))
        told.online = time.perf_counter() - started


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Parties:
    """A dealer and a server, their logs and their memory."""

    def __init__(self, model: str, folder: Path, store: bool) -> None:
        from pi_system.net import certificates

        self.certs = folder / "certs"
        certificates.make(self.certs)
        self._folder = folder
        self.memory: dict[str, list[tuple[float, int]]] = {"server": [], "dealer": []}
        self._processes: dict[str, subprocess.Popen[str]] = {}
        many = ("--sessions", "8", "--queue", "16", "--per-client", "24", "--certs")
        common = ("--listen", "127.0.0.1:0", *many, str(self.certs))
        self.dealer = self._start("dealer", *common)
        at = f"{self.dealer[0]}:{self.dealer[1]}"
        more = ("--store", str(folder / "server"), "--store-limit", "4096") if store else ()
        self.server = self._start("server", *common, "--model", model, "--dealer", at, *more)
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _start(self, role: str, *arguments: str) -> tuple[str, int]:
        with open(self._folder / f"{role}.log", "w") as log:
            process = subprocess.Popen(
                [*PARTY, role, *arguments], stdout=subprocess.PIPE, stderr=log, text=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._processes[role] = process
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError((self._folder / f"{role}.log").read_text())
        ready = json.loads(line)
        return ready["host"], ready["port"]

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            for role, process in self._processes.items():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                    size = pages * os.sysconf("SC_PAGE_SIZE")
                    self.memory[role].append((time.monotonic(), size))

    def end(self) -> dict[str, Any]:
        """Stop both; their exit codes and how their sessions went."""
        self._stop.set()
        self._sampler.join()
        facts: dict[str, Any] = {}
        for role, process in self._processes.items():
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
            process.communicate()
            text = (self._folder / f"{role}.log").read_text()
            events = [json.loads(line) for line in text.splitlines()]
            facts[role] = {
                "exit_code": process.returncode,
                "sessions": dict(
                    Counter(e["event"] for e in events if e["event"] in ("ended", "failed"))
                ),
                "errors": dict(
                    Counter(e["kind"] for e in events if e["event"] in ("failed", "refused"))
                ),
                "memory": memory(self.memory[role]),
            }
        return facts


def memory(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Resident MB of a process, by fifths of the run, of which the first is warm-up.

    What it holds goes up and down with the sessions that happen to run at once, so there are two
    kinds of growth, both from the second fifth to the largest later one and both judged: that of
    the medians and that of the maxima. ``slope`` is that of a line through all after the first
    fifth, from its beginning to its end.
    """
    start, end = samples[0][0], samples[-1][0]

    def parts(count: int) -> list[list[int]]:
        """The sizes in each of so many equal parts of the run."""
        found: list[list[int]] = [[] for _ in range(count + 1)]
        for at, size in samples:
            found[int(count * (at - start) / (end - start))].append(size)
        return found[:count]

    fifths = parts(FIFTHS)
    base, *later = (float(np.median(fifth)) for fifth in fifths[1:])
    peak, *peaks = (max(fifth) for fifth in fifths[1:])
    after = [(at, size) for at, size in samples if at >= start + (end - start) / FIFTHS]
    times, sizes = np.array(after).T
    rise = float(np.polyfit(times - times[0], sizes, 1)[0] * (times[-1] - times[0]))
    return {
        "warm": round(base / 1e6, 1),
        "later": [round(size / 1e6, 1) for size in later],
        "peaks": [round(size / 1e6, 1) for size in (peak, *peaks)],
        "most": round(max(size for _, size in samples) / 1e6, 1),
        "growth": round(max(later) / base - 1, 4),
        "peak_growth": round(max(peaks) / peak - 1, 4),
        "slope": round(rise / base, 4),
        # Least, median and largest of every fiftieth of the run.
        "raw": [
            [round(float(size) / 1e6, 1) for size in (min(some), np.median(some), max(some))]
            for some in parts(BINS)
            if some
        ],
    }


def run(
    parties: Parties, images: Any, expected: Any, *, clients: int, sessions: int,
    inferences: int, disconnect: float, stores: Path | None, together: bool,
) -> dict[str, Any]:  # fmt: skip
    """So many clients in processes; what they were told, judged."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    barrier = context.Barrier(clients) if together else None
    processes = []
    started = time.perf_counter()
    for number in range(clients):
        store = None if stores is None else stores / f"client-{number}"
        work = Work(
            number, parties.server, parties.dealer, parties.certs, images, sessions, inferences,
            disconnect, store,
        )  # fmt: skip
        processes.append(context.Process(target=client, args=(work, queue, barrier)))
        processes[-1].start()
    told, failures = [], []
    for _ in processes:
        number, one, reason = queue.get()
        told.append(one)
        if reason:
            failures.append(f"client {number}: {reason}")
            if barrier is not None:
                barrier.abort()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - started
    answers = [answer for one in told for answer in one.answers]
    times = np.array([seconds for _, seconds, _ in answers] or [np.nan]) * 1000
    errors = [float(np.abs(expected[image] - logits).max()) for image, _, logits in answers]
    bound = max([one.bound for one in told], default=0.0)
    sent = Counter(digest for one in told for digest in one.sent)
    asked = clients * sessions * inferences
    result = {
        "clients": clients,
        "sessions": sum(one.sessions for one in told),
        "answers": len(answers),
        "asked": asked,
        "wrong": sum(error > bound for error in errors),
        "largest_error": max(errors, default=0.0),
        "bound": bound,
        "named_errors": dict(sum((one.errors for one in told), Counter())),
        "disconnects": sum(one.accidents for one in told),
        "unnamed": failures,
        "one_time_values": len(sent),
        "reused": sum(count > 1 for count in sent.values()),
        "seconds": round(seconds, 2),
        "online_ms": {
            "median": round(float(np.median(times)), 2),
            "p95": round(float(np.percentile(times, 95)), 2),
            "min": round(float(times.min()), 2),
        },
    }
    if together and not failures:
        result["offline_per_second"] = round(asked / max(one.offline for one in told), 2)
        result["online_per_second"] = round(asked / max(one.online for one in told), 2)
    return result


def bad(result: dict[str, Any]) -> list[str]:
    """What does not hold."""
    found = []
    for row in result["runs"]:
        if row["wrong"] or row["answers"] != row["asked"]:
            found.append(f"{row['answers']} of {row['asked']} answers, {row['wrong']} wrong")
        if row["reused"] or row["unnamed"]:
            found.append(f"{row['reused']} values reused; {row['unnamed']}")
    for role, facts in result["parties"].items():
        if facts["exit_code"] != 0:
            found.append(f"the {role} ended with {facts['exit_code']}")
        grown = max(facts["memory"]["growth"], facts["memory"]["peak_growth"])
        if result["judge_memory"] and grown > GROWTH:
            found.append(f"the {role}'s memory grew: {facts['memory']}")
    return found


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| clients | sessions | answers | wrong | disconnects | named errors | reused | "
        "online ms, median (p95) | offline/s | online/s |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["runs"]:
        errors = ", ".join(f"{n} {name}" for name, n in row["named_errors"].items()) or "none"
        times = row["online_ms"]
        cells = (
            row["clients"], row["sessions"], row["answers"], row["wrong"], row["disconnects"],
            errors, row["reused"], f"{times['median']} ({times['p95']})",
            row.get("offline_per_second", ""), row.get("online_per_second", ""),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| party | MB in the second fifth | third to fifth | most | "
              "growth: medians | maxima | slope |",
              "| --- | ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for role, facts in result["parties"].items():
        size = facts["memory"]
        later = ", ".join(map(str, size["later"]))
        lines.append(
            f"| {role} | {size['warm']} | {later} | {size['most']} | {size['growth']:.1%} | "
            f"{size['peak_growth']:.1%} | {size['slope']:.1%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=8, help="at once, a process each")
    parser.add_argument("--sessions", type=int, default=1, help="of each, one after another")
    parser.add_argument("--inferences", type=int, default=50, help="of each session")
    parser.add_argument("--disconnect", type=float, default=0.0, metavar="P")
    parser.add_argument("--store", action="store_true", help="keep material on both sides")
    parser.add_argument("--table", type=int, nargs="+", metavar="N", help="throughput at N clients")
    parser.add_argument("--output", type=Path, help="write JSON here")
    arguments = parser.parse_args(argv)

    from pi_system.bench import environment
    from pi_system.graph import execute
    from pi_system.models import images as model_images
    from pi_system.models import resolve

    graph = resolve(arguments.model)
    images = np.ascontiguousarray(model_images(graph, 16)[0])
    expected = execute.run(graph, images)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parties = Parties(arguments.model, folder, arguments.store)
        try:
            for clients in arguments.table or [arguments.clients]:
                runs.append(
                    run(
                        parties, images, expected, clients=clients,
                        sessions=1 if arguments.table else arguments.sessions,
                        inferences=arguments.inferences, disconnect=arguments.disconnect,
                        stores=folder if arguments.store else None,
                        together=arguments.table is not None,
                    )
                )  # fmt: skip
        finally:
            facts = parties.end()
    result = {
        "environment": environment.describe(),
        "model": arguments.model,
        "runs": runs,
        "parties": facts,
        "judge_memory": not arguments.table and sum(row["asked"] for row in runs) >= LONG,
    }
    print(table(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    problems = bad(result)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
