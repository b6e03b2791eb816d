"""What a server's sessions of one model, plan and batch share: kernels with prepared weights.

Made once and read by all; nothing in it belongs to a session, and no one-time material does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from ...graph.ir import Graph
from ..base import Options
from . import device, program
from .linear import RingConv
from .plan import Plan
from .program import Conv, Index
from .public import Public
from .ring import Words

KEPT: Final = 4
"""Combinations of model, plan, batch, threads and device kept at most; a client chooses a batch."""


class Prepared:
    """One combination.

    Attributes:
        public: what everyone knows of it.
        positions: of kept positions, per ReLU.
    """

    def __init__(self, graph: Graph, plan: Plan, options: Options) -> None:
        lowered = program.build(graph)
        self.public = Public(graph.public(), lowered, plan, graph.sha256(), options.batch)
        self.positions: dict[str, Index | None] = {
            op.out: program.positions(op, options.batch) for op in lowered.relus
        }
        self._options = options
        self._convs: dict[str, RingConv] = {}
        self._lock = threading.Lock()

    def conv(self, op: Conv, weight: Words) -> RingConv:
        """The kernel of a linear operation, whose ``weight`` is the same at every call."""
        with self._lock:
            if op.out not in self._convs:
                bits = int(np.abs(weight.view(np.int64)).max(initial=0)).bit_length() + 1
                source, options = self.public.lowered.shapes[op.source], self._options
                self._convs[op.out] = device.narrow(
                    options.device, op, source, weight, self.public.plan.convs[op.out].n, bits,
                    batch=options.batch, threads=options.threads,
                )  # fmt: skip
            return self._convs[op.out]


class Workshop:
    """The combinations in use, the latest :data:`KEPT` of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: list[tuple[Graph, tuple[object, ...], Prepared]] = []

    def get(self, graph: Graph, options: Options, plan: Callable[[], Plan]) -> Prepared:
        """The combination of ``graph`` (this very object) and ``options``.

        Args:
            plan: makes the plan, where it is the first time.
        """
        key = (options.batch, options.threads, options.device, options.plan)
        with self._lock:
            for index, (known, made_for, prepared) in enumerate(self._made):
                if known is graph and made_for == key:
                    self._made.append(self._made.pop(index))
                    return prepared
            prepared = Prepared(graph, plan(), options)
            self._made.append((graph, key, prepared))
            del self._made[:-KEPT]
            return prepared
