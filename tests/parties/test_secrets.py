"""What each process holds: the memory of all three, searched after an inference.

A search that finds nothing anywhere proves nothing; so weights must be found at the server and
the image at the client, and the toy backend, which sends the image in the clear, must be caught.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose

from pi_system.graph.ir import Graph

HOLD = Path(__file__).with_name("hold.py")
FRACTIONAL_BITS = (16, 7, 9, 10, 12)


class Findings(NamedTuple):
    weights: bool
    image: bool


def test_the_search_catches_a_backend_that_sends_the_image_in_the_clear(
    parties: Callable[[], dict[str, int]],
    toy_model: Path,
    toys: ModuleType,
    tmp_path: Path,
    toy_images: npt.NDArray[np.float32],
) -> None:
    with session("toy_backends:Plain", toy_model, tmp_path, toy_images[:1]) as processes:
        found = search(processes, toys.toy_graph(), toy_images[:1])
    assert found["server"] == Findings(weights=True, image=True)
    assert found["client"] == Findings(weights=False, image=True)
    assert found["dealer"] == Findings(weights=False, image=False)


@pytest.mark.skipif(find_spec("crypten") is None, reason="CrypTen is not installed")
def test_crypten_shows_weights_to_the_server_only_and_the_image_to_the_client_only(
    parties: Callable[[], dict[str, int]],
    toy_model: Path,
    toys: ModuleType,
    tmp_path: Path,
    toy_images: npt.NDArray[np.float32],
) -> None:
    with session("crypten", toy_model, tmp_path, toy_images[:1]) as processes:
        logits = json.loads(processes.answer)
        assert_allclose(
            logits, toys.forward(toys.toy_graph(), toy_images[:1]), rtol=0.01, atol=0.01
        )
        found = search(processes, toys.toy_graph(), toy_images[:1])
    assert found["server"] == Findings(weights=True, image=False)
    assert found["client"] == Findings(weights=False, image=True)
    assert found["dealer"] == Findings(weights=False, image=False)


class Processes(NamedTuple):
    numbers: dict[str, int]
    answer: str


@contextmanager
def session(
    backend: str, model: Path, folder: Path, images: npt.NDArray[np.float32]
) -> Iterator[Processes]:
    """Three processes after one inference, before its client leaves."""
    np.save(folder / "images.npy", images)
    with ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        def address(process: subprocess.Popen[str]) -> str:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            return f"{ready['host']}:{ready['port']}"

        party = ("-m", "pi_system.cli.party")
        serving = ("--listen", "127.0.0.1:0", "--backend", backend, "--insecure")
        dealer = start(*party, "dealer", *serving)
        dealer_at = address(dealer)
        server = start(*party, "server", *serving, "--model", str(model), "--dealer", dealer_at)
        server_at = address(server)
        client = start(str(HOLD), backend, server_at, dealer_at, str(folder / "images.npy"))
        assert client.stdout is not None
        answer = client.stdout.readline()
        yield Processes({"server": server.pid, "client": client.pid, "dealer": dealer.pid}, answer)


def search(
    processes: Processes, graph: Graph, images: npt.NDArray[np.float32]
) -> dict[str, Findings]:
    weights = patterns([graph.tensors[name] for name in ("conv2.weight", "fc.weight")])
    pictures = patterns([images])
    found = {}
    for role, number in processes.numbers.items():
        memory = Memory(number)
        found[role] = Findings(memory.holds(weights), memory.holds(pictures))
    return found


def patterns(arrays: list[npt.NDArray[Any]]) -> list[bytes]:
    """Four values in a row as a process might hold them: floats or fixed point, some widths."""
    found = []
    for array in arrays:
        row = array.reshape(-1)[40:44].astype(np.float64)
        found += [row.astype(dtype).tobytes() for dtype in (np.float32, np.float64)]
        for bits in FRACTIONAL_BITS:
            for scaled in (np.rint(row * 2**bits), np.trunc(row * 2**bits)):
                found += [scaled.astype(dtype).tobytes() for dtype in (np.int64, np.float64)]
    return found


class Memory:
    """The writable memory of another process, without its empty pages."""

    def __init__(self, number: int) -> None:
        kept = []
        with open(f"/proc/{number}/maps") as maps, open(f"/proc/{number}/mem", "rb", 0) as memory:
            for line in maps:
                match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if match and "[v" not in line:
                    start, end = (int(text, 16) for text in match.groups())
                    memory.seek(start)
                    pages = np.frombuffer(memory.read(end - start), np.uint8).reshape(-1, 4096)
                    kept.append(pages[pages.any(1)].reshape(-1))
        self._bytes = np.concatenate([*kept, np.zeros(2, np.uint8)]).tobytes()

    def holds(self, patterns: list[bytes]) -> bool:
        """Whether any of the patterns occurs, at any address.

        Two telling bytes of each are looked up everywhere at once; where they occur the whole
        is compared.
        """
        by_key: dict[int, list[tuple[bytes, int]]] = {}
        for pattern in patterns:
            words = np.frombuffer(pattern, "<u2")
            offset = int(np.flatnonzero((words != 0) & (words != 0xFFFF))[0])
            by_key.setdefault(int(words[offset]), []).append((pattern, 2 * offset))
        table = np.zeros(1 << 16, np.bool_)
        table[list(by_key)] = True
        for shift in (0, 1):
            words = np.frombuffer(self._bytes, "<u2", (len(self._bytes) - shift) // 2, shift)
            for hit in np.flatnonzero(table[words]).tolist():
                for pattern, offset in by_key[int(words[hit])]:
                    if self._bytes.startswith(pattern, max(0, 2 * hit + shift - offset)):
                        return True
        return False


def test_the_search_finds_what_is_there_at_any_alignment() -> None:
    memory = Memory.__new__(Memory)
    needle = patterns([np.linspace(-1.5, 1.5, 60)])
    for pattern in needle:
        for shift in range(9):
            memory._bytes = bytes(100 + shift) + pattern + bytes(50)
            assert memory.holds(needle[:1] if pattern == needle[0] else [pattern])
        memory._bytes = bytes(100) + pattern[:-1] + bytes([pattern[-1] ^ 1, *bytes(50)])
        assert not memory.holds([pattern])
