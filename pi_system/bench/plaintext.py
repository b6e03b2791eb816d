"""Plaintext latency: torch float32 on the same images, at its best."""

from __future__ import annotations

import statistics
import time

import numpy as np
import numpy.typing as npt

from ..graph.execute import compile_plaintext
from ..graph.ir import Graph
from .schema import Latency, Plaintext

_WARMUP = 2


class PlaintextTimer:
    """Times both memory formats, each by itself as a caller would run it; :meth:`result` is the
    faster one's.

    Call :meth:`run` before and after a private measurement, so that both saw the same machine.
    """

    def __init__(self, graph: Graph, images: npt.NDArray[np.float32], threads: int) -> None:
        self._images = images
        self._threads = threads
        self._forward = {
            name: compile_plaintext(graph, channels_last=last, threads=threads)
            for name, last in (("contiguous", False), ("channels_last", True))
        }
        self._seconds: dict[str, list[list[float]]] = {name: [] for name in self._forward}

    def run(self, repeat: int) -> None:
        """Add ``repeat`` timed passes of each format."""
        for name, forward in self._forward.items():
            for _ in range(_WARMUP):
                forward(self._images)
            block = []
            for _ in range(repeat):
                started = time.perf_counter()
                forward(self._images)
                block.append(time.perf_counter() - started)
            self._seconds[name].append(block)

    def result(self) -> Plaintext:
        values = [value for block in self.blocks() for value in block]
        return Plaintext(Latency.of(values), self._best(), self._threads)

    def blocks(self) -> list[list[float]]:
        """Seconds of each :meth:`run` in the faster format."""
        return self._seconds[self._best()]

    def drift(self) -> float:
        """Relative difference between the medians of the first and the last :meth:`run`."""
        blocks = self.blocks()
        first, last = statistics.median(blocks[0]), statistics.median(blocks[-1])
        return abs(last - first) / min(first, last)

    def _best(self) -> str:
        return min(
            self._seconds,
            key=lambda name: statistics.median(v for b in self._seconds[name] for v in b),
        )
