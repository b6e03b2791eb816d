"""Convolutions in Z/2^n by the C kernels of ``native/ringconv.c``.

The kernels split 64-bit words into signed 16-bit digits and multiply those with the processor's
16-bit multiply-add; where the shape and ``n`` allow it, fast convolutions save most products:

=============  ==============================  =================================================
algorithm      for                             needs
=============  ==============================  =================================================
direct         anything                        n <= 64
winograd-f2    3x3, stride 1, 2x2 outputs      n <= 62
winograd-f4f2  3x3, stride 1, 4x2 outputs      n <= 62
winograd-f4    3x3, stride 1, 4x4 outputs      n <= 62
winograd-s2    3x3, stride 2, 2x2 outputs      n <= 64
winograd-s4s2  3x3, stride 2, 4x2 outputs      n <= 63
winograd-s4    3x3, stride 2, 4x4 outputs      n <= 62
plain          shapes that fill no vector      n <= 64
=============  ==============================  =================================================

Weights of any size work; products are fastest while those at the points of the chosen algorithm
fit 16 bits. Wider ones are multiplied as words. No branch and no address depends on the words
convolved, only on the weights.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Pair = tuple[int, int]

ALGORITHMS = (
    "direct", "winograd-f2", "winograd-f4f2", "winograd-f4",
    "winograd-s2", "winograd-s4s2", "winograd-s4", "plain",
)  # fmt: skip
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512-vnni")

_BEST, _NO_WINOGRAD = -1, -2
_LARGEST = 2**31 - 1


def load(path: Path) -> ctypes.CDLL:
    """The kernels in the shared library ``path``.

    Raises:
        OSError: not a library, or one without the kernels.
    """
    library = ctypes.CDLL(str(path.resolve()))
    try:
        prepare, run = library.pi_ringconv_prepare, library.pi_ringconv_run
        algorithm, features = library.pi_ringconv_algorithm, library.pi_ringconv_features
        free, held = library.pi_ringconv_free, library.pi_ringconv_bytes
    except AttributeError as error:
        raise OSError(f"{path}: no ring convolution in this library") from error
    address, number = ctypes.c_void_p, ctypes.c_int
    prepare.restype, prepare.argtypes = (
        address, [address, address, number, number, ctypes.c_char_p, number],
    )  # fmt: skip
    run.restype, run.argtypes = (
        number, [address, address, address, address, number, number, number, ctypes.c_uint64],
    )  # fmt: skip
    held.restype, held.argtypes = ctypes.c_uint64, [address]
    algorithm.restype, algorithm.argtypes = ctypes.c_char_p, [address]
    features.restype, features.argtypes = ctypes.c_char_p, []
    free.restype, free.argtypes = None, [address]
    return library


@functools.cache
def installed() -> ctypes.CDLL | None:
    """The kernels of the installed extension; None where it was not built."""
    package = __spec__.name.rpartition(".")[0]
    spec = PathFinder.find_spec(f"{package}._native", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return None
    try:
        return load(Path(spec.origin))
    except OSError:
        return None


def features() -> str:
    """The instruction set in use, for ``pi-bench env``: one of INSTRUCTION_SETS, or "numpy"."""
    found = installed()
    return "numpy" if found is None else str(found.pi_ringconv_features().decode())


class RingConvKernel:
    """One prepared convolution; from :func:`prepare`. Calls from several threads are fine.

    Attributes:
        algorithm: which of ALGORITHMS was chosen.
        output_shape: (O, h, w).
        nbytes: of the prepared weights.
    """

    def __init__(
        self, library: ctypes.CDLL, handle: int, input_shape: tuple[int, int, int],
        output_shape: tuple[int, int, int], n: int,
    ) -> None:  # fmt: skip
        self._run = library.pi_ringconv_run
        self._handle = handle
        self._input_shape = input_shape
        self._n = n
        self.output_shape = output_shape
        self.algorithm = str(library.pi_ringconv_algorithm(handle).decode())
        self.nbytes = int(library.pi_ringconv_bytes(handle))
        weakref.finalize(self, library.pi_ringconv_free, handle)

    def __call__(
        self, x: Words, add: Words | None = None, out: Words | None = None, *, threads: int = 1
    ) -> Words:
        """The convolution, plus ``add``, exact in the low ``n`` bits; the others are unspecified.

        Args:
            x: C-contiguous (N, I, H, W), of which only the low ``n`` bits count.
            add: C-contiguous (N, O, h, w).
            out: where to write the result, C-contiguous (N, O, h, w); may be ``add``, not ``x``.
            threads: how many may work on it; the result does not depend on it.

        Raises:
            ValueError: a wrong type, shape or layout.
        """
        return self._call(x, add, out, threads, -1, 0)[0]

    def truncated(
        self, x: Words, add: Words | None = None, out: Words | None = None, *, f: int, bound: int,
        threads: int = 1,
    ) -> tuple[Words, bool]:  # fmt: skip
        """The same without its ``f`` lowest bits, as signed words, and the zone check's finding.

        Args:
            f: 0 <= f < n.
            bound: below 2^(n-1); whether any word before the shift lies within it of +-2^(n-1)
                is the finding (see :func:`~pi_system.backends.fss.ring.near_edge`).

        Raises:
            ValueError: a wrong type, shape or layout, or ``f`` or ``bound`` out of range.
        """
        if not 0 <= f < self._n or not 0 <= 2 * bound < 1 << self._n:
            raise ValueError(f"no shift by {f} and bound {bound} in a ring of {self._n} bits")
        return self._call(x, add, out, threads, f, bound)

    def _call(
        self, x: Words, add: Words | None, out: Words | None, threads: int, f: int, bound: int
    ) -> tuple[Words, bool]:
        shape = (len(x), *self.output_shape)
        _check("x", x, (len(x), *self._input_shape))
        if add is not None:
            _check("add", add, shape)
        if out is None:
            out = np.empty(shape, np.uint64)
        else:
            _check("out", out, shape)
            if not out.flags.writeable:
                raise ValueError("out is read-only")
        found = self._run(
            self._handle, x.ctypes.data, None if add is None else add.ctypes.data,
            out.ctypes.data, len(x), threads, f, bound,
        )  # fmt: skip
        if found < 0:
            raise MemoryError("no memory for a convolution")
        return out, bool(found)


def prepare(
    *,
    weight: npt.NDArray[np.uint64] | npt.NDArray[np.int64],
    input_shape: tuple[int, int, int],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    n: int,
    winograd: bool = True,
    batch: int = 1,
    force: tuple[str | None, str | None] = (None, None),
    kernels: ctypes.CDLL | None = None,
) -> RingConvKernel | None:
    """Pack weights for a convolution of images (I, H, W) in Z/2^n.

    Args:
        weight: (O, I/groups, kh, kw), of which the low ``n`` bits count, taken as signed.
        winograd: whether a fast convolution may be chosen; without one, the prepared weights
            take what they take in digits or words (2 or 8 bytes each), and no more.
        batch: the usual number of images, for the choice.
        force: for tests, the algorithm and the instruction set.
        kernels: for tests, another library than the installed extension.

    Returns:
        The convolution, or None where the kernels are not built, or cannot do what is forced.

    Raises:
        ValueError: shapes that do not fit together, or an output without pixels.
    """
    kernels = kernels or installed()
    if kernels is None:
        return None
    out, group_in, kh, kw = weight.shape
    channels, height, width = input_shape
    if not 1 <= n <= 64:
        raise ValueError(f"a ring of {n} bits: 1 to 64 are possible")
    if weight.dtype not in (np.uint64, np.int64):
        raise ValueError(f"weights are {weight.dtype}, not 64-bit words")
    sizes = (*weight.shape, *input_shape, *stride, *dilation, groups)
    if min(sizes) < 1 or min(padding) < 0 or max(*sizes, *padding) > _LARGEST:
        raise ValueError(f"impossible convolution: weight {weight.shape} of {input_shape}")
    if group_in * groups != channels or out % groups:
        raise ValueError(f"{groups} groups do not fit weight {weight.shape} of {input_shape}")
    h = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    w = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    if h < 1 or w < 1:
        raise ValueError(f"weight {weight.shape} is larger than its input {input_shape}")
    algorithm, instructions = force
    scheme = _BEST if winograd else _NO_WINOGRAD
    if algorithm is not None:
        scheme = ALGORITHMS.index(algorithm)
    geometry = np.array(
        [channels, height, width, out, kh, kw, *stride, *padding, *dilation, groups], np.int32
    )
    packed = np.ascontiguousarray(weight)
    handle = kernels.pi_ringconv_prepare(
        packed.ctypes.data, geometry.ctypes.data, n, scheme,
        None if instructions is None else instructions.encode(), batch,
    )  # fmt: skip
    if not handle:
        return None
    return RingConvKernel(kernels, handle, input_shape, (out, h, w), n)


def _check(name: str, array: Words, shape: tuple[int, ...]) -> None:
    if array.dtype != np.uint64 or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous uint64 {shape}, not {array.dtype} "
                         f"{array.shape}")  # fmt: skip
