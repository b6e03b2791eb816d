"""What tests of several folders share: a toy model on disk, toy backends, orphan control."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi_system.backends.base import Database
from pi_system.graph import serialize

TESTS = Path(__file__).resolve().parent
MARK = f"PI_SYSTEM_TEST={os.getpid()}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-frames", type=int, default=20_000, help="mutated frames in test_fuzz")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """The module ``toy_backends``, which child processes import by that name."""
    return _load("toy_backends")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL cluster for this run: a ``Cluster`` of tests/postgres.py."""
    pytest.importorskip("psycopg", reason="psycopg is not installed", exc_type=ImportError)
    module = _load("postgres")
    programs = module.programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    cluster = module.Cluster(programs)
    yield cluster
    cluster.close()


@pytest.fixture
def database(postgres: Any) -> Database:
    """An empty database of that cluster."""
    return Database(postgres.empty())


@pytest.fixture
def toy_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find ``toy_backends`` and this checkout, and are known as ours."""
    monkeypatch.setenv(*MARK.split("="))
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """A small exported model, (3, 8, 8) -> 10."""
    path = tmp_path_factory.mktemp("models") / "toy"
    serialize.save(path, toys.toy_graph())
    return path


@pytest.fixture
def toy_images() -> npt.NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal((3, 3, 8, 8), dtype=np.float32)


@pytest.fixture
def parties(toy_path: None) -> Iterator[Callable[[], dict[str, int]]]:
    """Role and process number of the parties running for this test; none may outlive it."""
    yield _parties
    deadline = time.monotonic() + 1
    while (left := _parties()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left.values():  # so that the next test is judged by itself
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


def _parties() -> dict[str, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                marks = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if "pi_system.cli.party" in words and MARK in marks:
                    role = words[words.index("pi_system.cli.party") + 1]
                    found[role] = int(entry.name)
    return found
