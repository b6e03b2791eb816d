"""Server and dealer as processes that serve many, and clients of them in this process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pi_system.backends.base import Backend
from pi_system.parties.address import Address
from pi_system.parties.client import ClientSettings
from pi_system.parties.timeouts import Timeouts

PARTY = [sys.executable, "-m", "pi_system.cli.party"]


class Party:
    """A listening party."""

    def __init__(
        self, *arguments: str, inside: tuple[str, ...] = (), stderr: Any = subprocess.PIPE
    ) -> None:
        self.process = subprocess.Popen(
            [*inside, *PARTY, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.communicate()[1])
        ready = json.loads(line)
        self.at = Address(ready["host"], ready["port"])
        self.metrics: str = ready.get("metrics", "")

    def end(self, timeout: float = 10) -> tuple[int, list[dict[str, Any]]]:
        """Its exit code and what it wrote."""
        _, log = self.process.communicate(timeout=timeout)
        assert "Traceback" not in log
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]

    def stop(self) -> tuple[int, list[dict[str, Any]]]:
        self.process.terminate()
        return self.end()


class Deployed:
    """A dealer and a server with the toy model, or another."""

    def __init__(self, dealer: Party, server: Party, backend: Backend, name: str) -> None:
        self.dealer, self.server = dealer, server
        self._backend, self._name = backend, name

    def client(self, **changes: Any) -> ClientSettings:
        values: dict[str, Any] = {
            "server": self.server.at,
            "dealers": (self.dealer.at,),
            "backend": self._backend,
            "backend_name": self._name,
            "timeouts": Timeouts(step=8.0, prepare=20.0),
        }
        return ClientSettings(**{**values, **changes})


Deploy = Callable[..., Deployed]


@pytest.fixture
def launch(parties: Callable[[], dict[str, int]]) -> Iterator[Callable[..., Party]]:
    """Start a listening party; whatever still runs at the end is killed."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **how: Any) -> Party:
            party = Party(*arguments, **how)
            stack.callback(party.process.communicate)
            stack.callback(party.process.kill)
            return party

        yield start


@pytest.fixture
def deploy(launch: Callable[..., Party], toy_model: Path, toys: ModuleType) -> Deploy:
    """Start a dealer and a server."""
    from pi_system.backends import base

    def begin(
        *options: str, dealer: tuple[str, ...] = (), backend: str = "toy_backends:Plain",
        model: str | None = None, certs: Path | None = None, **how: Any,
    ) -> Deployed:  # fmt: skip
        links = ("--insecure",) if certs is None else ("--certs", str(certs))
        common = ("--listen", "127.0.0.1:0", "--backend", backend, *links)
        dealers = launch("dealer", *common, *dealer, **how)
        server = launch(
            "server", "--model", model or str(toy_model), "--dealer", str(dealers.at),
            *common, *options, **how,
        )  # fmt: skip
        toy = backend.startswith("toy_backends:")
        made = getattr(toys, backend.partition(":")[2])() if toy else base.get(backend)
        return Deployed(dealers, server, made, backend)

    return begin
