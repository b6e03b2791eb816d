"""All three parties on this machine, as processes that end with this one.

The launcher opens the listening sockets itself and hands them down, so that no port can be
taken in between and all parties start at the same time. Images go to the client and results
come back through pipes: nothing is written to disk. A child ends when its standard input
closes, which the system does even if the launcher is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Final

import numpy.typing as npt

from ..errors import (
    BudgetError,
    ParityError,
    PeerError,
    PeerTimeout,
    PiError,
    RefusedError,
    UsageError,
)
from ..net.listen import Listener
from .images import write_images
from .process import thread_environment
from .timeouts import Timeouts

Role = str

_ERRORS: Final[dict[int, type[PiError]]] = {
    error.exit_code: error
    for error in (PiError, UsageError, BudgetError, ParityError, PeerError, RefusedError)
}
_GRACE: Final = 1.0
"""Seconds for the others to fail by themselves, and so to say more, before they are killed."""
_FAREWELL: Final = 8.0
"""Seconds for server and dealer to report after the client has ended well."""


@dataclass(frozen=True)
class LocalRun:
    """What to run.

    Attributes:
        model: as named on the command line.
        images: (N, C, H, W), normalised float32 or uint8.
        threads: per party.
        network: see :func:`pi_system.net.link.parse`.
        start_timeout: seconds for the parties to load their packages and the model.
        plan: the server's precision.
        progress: told about once a second how many inferences are done, and of how many.
    """

    model: str
    backend: str
    images: npt.NDArray[Any]
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    network: str = "loopback"
    repeat: int = 1
    warmup: int = 0
    timeouts: Timeouts = field(default_factory=Timeouts)
    start_timeout: float = 120.0
    plan: str = "default"
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class LocalResult:
    """The reports of the three parties, as JSON-able data."""

    client: dict[str, Any]
    server: dict[str, Any]
    dealer: dict[str, Any]


def run_local(run: LocalRun) -> LocalResult:
    """Run one client session with all parties as processes on loopback.

    No process outlives the call, however it ends.

    Raises:
        PiError: of the class of the first cause, with its one line.
    """
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(Listener("127.0.0.1", 0)) for _ in range(2)]
        dealer_at, server_at = (f"127.0.0.1:{listener.port}" for listener in listeners)
        common = [
            *("--backend", run.backend, "--threads", str(run.threads)),
            *("--timeout", str(run.timeouts.step), "--network", run.network),
            *(
                "--prepare-timeout",
                str(run.timeouts.prepare),
                "--lost-after",
                str(run.timeouts.life),
            ),
            *("--exit-with-parent", "--insecure"),
        ]
        serving = ["--once", "--device", run.device, "--stats", "-"]
        commands: dict[Role, list[str]] = {
            "dealer": ["dealer", "--listen", f"fd:{listeners[0].fileno()}", *serving],
            "server": [
                *("server", "--listen", f"fd:{listeners[1].fileno()}", *serving),
                *("--model", run.model, "--plan", run.plan, "--dealer", dealer_at),
            ],
            "client": [
                *("client", "--server", server_at, "--dealer", dealer_at, "--images", "-"),
                *("--batch", str(run.batch), "--repeat", str(run.repeat)),
                *("--warmup", str(run.warmup), "--format", "json"),
                *("--ahead", "0"),  # nobody is to compute while another is timed
            ],
        }
        reports: queue.Queue[_Report] = queue.Queue()
        children: dict[Role, _Child] = {}
        # Registered first, so run last: whatever happens, nobody is left behind.
        stack.callback(lambda: _end(children))
        for role, command in commands.items():
            descriptors = {"dealer": (listeners[0].fileno(),), "server": (listeners[1].fileno(),)}
            children[role] = _Child(
                role, [*command, *common], descriptors.get(role, ()), run.threads, reports
            )
        for listener in listeners:
            listener.close()
        return _supervise(run, children, reports)


def _supervise(
    run: LocalRun, children: dict[Role, _Child], reports: queue.Queue[_Report]
) -> LocalResult:
    waiting = {"server", "dealer"}
    deadline: float | None = time.monotonic() + run.start_timeout
    results: dict[Role, dict[str, Any]] = {}
    ended: list[Role] = []
    while len(ended) < len(children):
        try:
            role, line = _next(reports, deadline)
        except queue.Empty:
            late = sorted(set(children) - set(ended))
            what = "end" if "client" in ended else "get ready"
            raise PeerTimeout(f"the {' and the '.join(late)} did not {what} in time") from None
        if line is not None:
            document = _parse(line)
            if document is None:
                continue
            if "done" in document:
                run.progress(document["done"], document["total"])
            elif document.get("ready") is True:
                waiting.discard(role)
                if not waiting:
                    children["client"].give(run.images)
                    deadline = None  # from here on the parties watch each other
            else:
                results[role] = document
            continue
        ended.append(role)
        if children[role].process.wait() != 0:
            raise _first_cause(children, reports, ended)
        if role == "client":
            deadline = time.monotonic() + _FAREWELL
    missing = [role for role in children if role not in results]
    if missing:
        raise PiError(f"the {missing[0]} ended without a report")
    return LocalResult(**results)


def _next(reports: queue.Queue[_Report], deadline: float | None) -> _Report:
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    return reports.get(timeout=left)


def _parse(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        document = json.loads(line)
        if isinstance(document, dict):
            return document
    return None


def _first_cause(
    children: dict[Role, _Child], reports: queue.Queue[_Report], ended: list[Role]
) -> PiError:
    """The failure that made the others fail: not "peer lost" if anybody knows better."""
    deadline = time.monotonic() + _GRACE
    code = children[ended[-1]].process.returncode
    while code == PeerError.exit_code and len(ended) < len(children):
        try:
            role, line = _next(reports, deadline)
        except queue.Empty:
            break
        if line is None:
            ended.append(role)
    failures = [children[role] for role in ended if children[role].process.wait() != 0]
    for child in failures:
        code = child.process.returncode
        if code < 0:
            return PeerError(f"the {child.role} was killed by {signal.Signals(-code).name}")
    for child in failures:
        if child.process.returncode != PeerError.exit_code:
            return child.error()
    return failures[0].error()


_Report = tuple[Role, str | None]
"""A line of a child's stdout, or None at its end."""


class _Child:
    """A party as a process, its output collected by threads."""

    def __init__(
        self,
        role: Role,
        arguments: list[str],
        descriptors: tuple[int, ...],
        threads: int,
        reports: queue.Queue[_Report],
    ) -> None:
        self.role = role
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pi_system.cli.party", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            env={**os.environ, **thread_environment(threads)},
            # Ctrl-C in a terminal reaches the launcher alone, which then ends its children.
            start_new_session=True,
        )
        self._errors: list[str] = []
        assert self.process.stdout is not None and self.process.stderr is not None
        errors = threading.Thread(target=self._read_errors, args=(self.process.stderr,))
        lines = threading.Thread(
            target=self._read_lines, args=(self.process.stdout, errors, reports)
        )
        self._threads = [errors, lines]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def give(self, images: npt.NDArray[Any]) -> None:
        """Write the images to the child's standard input, which stays open."""
        pipe = self.process.stdin
        assert pipe is not None

        def write() -> None:
            try:
                write_images(pipe, images)
            except BrokenPipeError:
                pass  # the child has ended and says why
            except BaseException:
                self.process.kill()  # or it would wait for ever
                raise

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        self._threads.append(thread)

    def error(self) -> PiError:
        """The exception behind the child's exit code, with its line."""
        lines = [line for line in self._errors if line.strip()]
        text = lines[-1].strip() if lines else f"the {self.role} failed without a word"
        kind = _ERRORS.get(self.process.returncode, PiError)
        return kind(text.removeprefix("error: ").removeprefix("Error: "))

    def end(self) -> None:
        """Kill the process if it still runs, and release everything."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read_errors(self, pipe: IO[bytes]) -> None:
        for line in _lines(pipe):
            self._errors.append(line)
            del self._errors[:-100]

    def _read_lines(
        self, pipe: IO[bytes], errors: threading.Thread, reports: queue.Queue[_Report]
    ) -> None:
        for line in _lines(pipe):
            reports.put((self.role, line))
        errors.join()
        self.process.wait()
        reports.put((self.role, None))


def _lines(pipe: IO[bytes]) -> Iterator[str]:
    for line in pipe:
        yield line.decode(errors="replace").rstrip("\n")


def _end(children: dict[Role, _Child]) -> None:
    for child in children.values():
        child.end()
