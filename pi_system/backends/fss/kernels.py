"""The C kernels of ``native/``, where they were built; else NumPy and a library's AES do the work.

The extension module ``_native`` is opened by ctypes, never imported: it holds no Python code.
Which instructions it uses is found out at run time. ``PI_SYSTEM_KERNELS`` may take some away:
``numpy`` (no C at all), ``portable`` (plain C), ``avx2`` (without wide AES) or ``vaes`` (with AES
of 256 bits, without AVX-512).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...errors import UsageError

if TYPE_CHECKING:
    from .packing import Bytes
    from .program import Index
    from .relu import Share
    from .ring import Words

VARIABLE: Final = "PI_SYSTEM_KERNELS"
AVX2, AES, VAES, AVX512 = 1, 2, 4, 8
_LEVELS: Final = {
    "portable": 0,
    "avx2": AVX2 | AES,
    "vaes": AVX2 | AES | VAES,
    "auto": 0xFF,
}
_INSTRUCTIONS: Final = {"portable": "portable", "avx2": "avx2", "vaes": "avx2", "auto": None}

_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_INT = ctypes.c_int
_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "fss_select": (ctypes.c_uint, [ctypes.c_uint]),
    "fss_pack": (None, [_POINTER, _SIZE, _INT, _POINTER]),
    "fss_unpack": (None, [_POINTER, _SIZE, _SIZE, _INT, _POINTER]),
    "fss_relu_combine": (None, [_POINTER] * 3 + [_SIZE, _INT, _INT, _INT, _POINTER]),
}
_AES_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "fss_dpf_evaluate": (None, [_POINTER] * 3 + [_SIZE, _INT] + [_POINTER] * 3),
    "fss_dpf_generate": (None, [_POINTER, _SIZE, _INT] + [_POINTER] * 5),
    "fss_gate_open": (None, [_POINTER, _SIZE, _SIZE] + [_POINTER] * 4),
    "fss_gate_sign": (None, [_POINTER, _SIZE, _SIZE] + [_POINTER] * 2),
    "fss_gate_answer": (None, [_POINTER, _SIZE, _SIZE] + [_POINTER] * 5),
    "fss_gate_close": (None, [_POINTER, _SIZE, _SIZE] + [_POINTER] * 6),
}

_lock = threading.Lock()
_loaded: list[Native | None] = []
_forced: list[Native | None] = []


def native() -> Native | None:
    """The C kernels in use, or ``None``."""
    if _forced:
        return _forced[-1]
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_load(os.environ.get(VARIABLE, "auto")))
    return _loaded[0]


def describe() -> str:
    """What is in use, for ``pi-bench env``."""
    found = native()
    if found is None:
        return "numpy"
    known = (("avx2", AVX2), ("aes", AES), ("vaes", VAES), ("avx512", AVX512))
    names = [name for name, bit in known if found.features & bit]
    return "native: " + ("+".join(names) or "portable")


@contextmanager
def using(level: str) -> Iterator[Native | None]:
    """Use a level of :data:`VARIABLE` in this process for a while (tests)."""
    _forced.append(_load(level))
    try:
        yield _forced[-1]
    finally:
        _forced.pop()
        if (current := native()) is not None:
            current.select()


def _load(level: str) -> Native | None:
    if level == "numpy":
        return None
    if level not in _LEVELS:
        raise UsageError(f"{VARIABLE} is numpy, {', '.join(_LEVELS)}; not {level!r}")
    spec = importlib.util.find_spec(f"{__package__}._native")
    if spec is None or spec.origin is None:
        return None
    try:
        return Native(ctypes.CDLL(spec.origin), level)
    except (OSError, AttributeError):
        return None


def _at(array: Any) -> int:
    """The address of a contiguous array; the quick way there is, where it may be written to."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError):
        assert array.flags.c_contiguous
        return int(array.__array_interface__["data"][0])


class _Material(ctypes.Structure):
    """``share`` of gate.c."""

    _fields_ = (
        ("root", _POINTER), ("corrections", _POINTER), ("sign", _POINTER), ("values", _POINTER),
        ("tree_key", ctypes.c_char_p), ("leaf_key", ctypes.c_char_p),
        ("count", ctypes.c_uint64), ("k", ctypes.c_int32), ("n", ctypes.c_int32),
    )  # fmt: skip


def _material(share: Share) -> Any:
    """Pointers into ``share``, which must outlive them."""
    held = share.__dict__.get("_material")
    if held is None:
        from .dpf import LEAF_KEY, TREE_KEY

        width, count = share.width, share.count
        assert share.root.shape == (count, 2) and share.values.shape == (5, count)
        assert share.corrections.shape == (width.blocks, count, 2)
        held = _Material(
            _at(share.root), _at(share.corrections), _at(share.sign), _at(share.values),
            TREE_KEY, LEAF_KEY, count, width.k, width.n,
        )  # fmt: skip
        share.__dict__["_material"] = held
    return ctypes.byref(held)


def _length(share: Share, gates: slice) -> int:
    """Of a range of gates that the kernels can take."""
    assert 0 <= gates.start < gates.stop <= share.count and gates.start % 8 == 0
    return int(gates.stop - gates.start)


class Native:
    """The C functions on arrays. Sizes are checked here; C trusts them."""

    def __init__(self, code: ctypes.CDLL, level: str) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(code, name)
            function.restype, function.argtypes = result, arguments
        self.code = code
        self._mask = _LEVELS[level]
        self.instructions = _INSTRUCTIONS[level]
        self.features = self.select()
        self.has_aes = bool(self.features & AES)
        if self.has_aes:
            for name, (result, arguments) in _AES_SIGNATURES.items():
                function = getattr(code, name)
                function.restype, function.argtypes = result, arguments

    def select(self) -> int:
        """Make these kernels the ones in force in the library."""
        return int(self.code.fss_select(self._mask))

    def pack(self, values: Words, width: int) -> bytes:
        out = np.empty((len(values) * width + 7) // 8, np.uint8)
        self.code.fss_pack(_at(values), len(values), width, _at(out))
        return out.tobytes()

    def unpack(self, data: bytes | memoryview, count: int, width: int) -> Words:
        raw = np.frombuffer(data, np.uint8)
        assert len(raw) == (count * width + 7) // 8
        out = np.empty(count, np.uint64)
        self.code.fss_unpack(_at(raw), len(raw), count, width, _at(out))
        return out

    def relu_combine(
        self, opened: Words, signs: Words, values: Words, k: int, lift: bool, server: bool
    ) -> Words:
        count = len(opened)
        assert signs.shape == (count,) and values.shape == (5, count)
        out = np.empty(count, np.uint64)
        self.code.fss_relu_combine(
            _at(opened), _at(signs), _at(values), count, k, lift, server, _at(out)
        )
        return out

    def dpf_evaluate(
        self, root: Words, corrections: Words, x: Words, bits: int, tree: bytes, leaf: bytes
    ) -> Words:
        count = len(x)
        assert root.shape == (count, 2)
        assert corrections.shape == (max(bits - 7, 0) + 1, count, 2) and bits < 64
        out = np.empty((count + 7) // 8, np.uint8)
        self.code.fss_dpf_evaluate(
            _at(root), _at(corrections), _at(x), count, bits, tree, leaf, _at(out)
        )
        return self.unpack(out.data, count, 1)

    def gate_open(
        self, share: Share, gates: slice, delta: Words, source: Words, index: Index | None
    ) -> Bytes:
        count = _length(share, gates)
        assert delta.shape == (share.count,)
        assert (source if index is None else index).size == share.count
        opened = np.empty((count * share.width.k + 7) // 8, np.uint8)
        self.code.fss_gate_open(
            _material(share), gates.start, count, _at(source),
            None if index is None else _at(index), _at(delta), _at(opened),
        )  # fmt: skip
        return opened

    def gate_sign(self, share: Share, gates: slice, opened: Bytes) -> Bytes:
        count = _length(share, gates)
        assert opened.size == (count * share.width.k + 7) // 8
        bits = np.empty((count + 7) // 8, np.uint8)
        self.code.fss_gate_sign(_material(share), gates.start, count, _at(opened), _at(bits))
        return bits

    def gate_answer(
        self, share: Share, gates: slice, opened: Bytes, mine: Bytes, theirs: Bytes, mask: Words
    ) -> Bytes:
        count = _length(share, gates)
        assert opened.size == (count * share.width.k + 7) // 8
        assert mine.size == theirs.size == (count + 7) // 8 and mask.shape == (share.count,)
        masked = np.empty((count * share.width.n + 7) // 8, np.uint8)
        self.code.fss_gate_answer(
            _material(share), gates.start, count,
            _at(opened), _at(mine), _at(theirs), _at(mask), _at(masked),
        )  # fmt: skip
        return masked

    def gate_close(
        self,
        share: Share,
        gates: slice,
        opened: Bytes,
        mine: Bytes,
        theirs: Bytes,
        masked: Bytes,
        target: Words,
        index: Index | None,
    ) -> None:
        count = _length(share, gates)
        assert opened.size == (count * share.width.k + 7) // 8
        assert mine.size == theirs.size == (count + 7) // 8
        assert masked.size == (count * share.width.n + 7) // 8
        assert (target if index is None else index).size == share.count
        self.code.fss_gate_close(
            _material(share), gates.start, count,
            _at(opened), _at(mine), _at(theirs), _at(masked),
            None if index is None else _at(index), _at(target),
        )  # fmt: skip

    def dpf_generate(
        self, alpha: Words, bits: int, root: Words, delta: Words, tree: bytes, leaf: bytes
    ) -> Words:
        count = len(alpha)
        assert root.shape == delta.shape == (count, 2) and bits < 64
        out = np.empty((max(bits - 7, 0) + 1, count, 2), np.uint64)
        self.code.fss_dpf_generate(
            _at(alpha), count, bits, _at(root), _at(delta), tree, leaf, _at(out)
        )
        return out
