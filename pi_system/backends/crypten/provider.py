"""Where CrypTen gets its one-time tuples: a store, filled offline and only emptied online.

An inference takes its tuples out before its first message, so whatever happens after, none is
used twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor
from torch import Tensor

from ...errors import RefusedError
from .tape import Request, Tape


class Store:
    """Tuples in memory, first in first out, whole inferences at a time.

    Its public functions in camel and snake case are CrypTen's interface of a tuple provider.
    """

    NAME = "dealer"

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._inferences: deque[deque[list[Tensor]]] = deque()
        self._current: deque[list[Tensor]] = deque()
        self._position = 0

    def __len__(self) -> int:
        """Inferences there is material for."""
        return len(self._inferences)

    def add(self, tuples: Sequence[list[Tensor]]) -> None:
        """Lay in the material of one inference."""
        assert len(tuples) == len(self._tape)
        self._inferences.append(deque(tuples))

    def begin(self) -> None:
        """Take out the material of one inference; what an earlier one left over is dropped.

        Raises:
            RefusedError: there is none.
        """
        self._current.clear()
        if not self._inferences:
            raise RefusedError("no one-time material is left: run the offline phase first")
        self._current = self._inferences.popleft()
        self._position = 0

    def end(self) -> None:
        """Check that the inference used what was prepared for it."""
        assert not self._current, "the tape is longer than the inference"

    def generate_additive_triple(
        self,
        size0: Sequence[int],
        size1: Sequence[int],
        op: str,
        device: Any = None,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        a, b, c = self._take(Request.of(op, size0, size1, **options))
        return _arithmetic(a), _arithmetic(b), _arithmetic(c)

    def generate_binary_triple(
        self, size0: Sequence[int], size1: Sequence[int], device: Any = None
    ) -> tuple[Any, Any, Any]:
        a, b, c = self._take(Request.of("and", size0, size1))
        return _binary(a), _binary(b), _binary(c)

    def B2A_rng(self, size: Sequence[int], device: Any = None) -> tuple[Any, Any]:
        bit, value = self._take(Request.of("bit", size))
        return _arithmetic(value), _binary(bit)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RefusedError("the dealer does not make this kind of one-time material")

    square = wrap_rng = _refuse

    def _take(self, request: Request) -> list[Tensor]:
        if not self._current:
            raise RefusedError(f"no one-time material was prepared for {request}")
        if request != self._tape[self._position]:
            raise RefusedError(f"one-time material for {self._tape[self._position]}, not {request}")
        self._position += 1
        return self._current.popleft()


def _arithmetic(share: Tensor) -> Any:
    return ArithmeticSharedTensor.from_shares(share, precision=0)


def _binary(share: Tensor) -> Any:
    return BinarySharedTensor.from_shares(share)
