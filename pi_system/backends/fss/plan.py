"""The fixed-point plan: how many bits everything has, chosen by calibration on sample images.

Public and equal on all sides. See docs/protocol.md for the rules; in short:

* ``f_x`` fractional bits for every activation; ``f_w`` for a layer's weights, so that its
  largest weight takes ``weight_bits`` bits;
* k: the bits of an opened value, from the largest seen and ``margin`` bits on top;
* n: where a layer's truncated output is only opened, its ring needs k + f_w bits. Elsewhere a
  wrap of the shares would be an error: there the ring is so large that the zone check, which
  finds every wrap while |y| <= bound, asks for a retry at most once in 2^retry_bits inferences.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...errors import ProtocolError, UsageError
from ...graph.ir import Graph
from . import linear, program, weights
from .program import Add, Concat, Conv, Gather, Input, Op, Program, Relu, Reshape, Sub, SumPool
from .relu import MAX_K, Width
from .ring import WORD, Floats, encode

_MAX_WEIGHT_BITS: Final = 15
"""So that a weight fits a signed 16-bit word."""
_MAX_F_W: Final = 18
_CHUNK: Final = 16
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Precision:
    """What the user may choose.

    ``f_x`` is the number of fractional bits of activations, ``weight_bits`` the bits of each
    layer's largest weight (one less where that lets the fastest convolution hold them).
    ``margin`` bits are kept free above the largest value seen, ``retry_bits`` is -log2 of the
    highest retry rate per image.
    """

    f_x: int = 8
    weight_bits: int = 11
    margin: int = 1
    retry_bits: int = 10


DEFAULT: Final = Precision()
HIGH: Final = Precision(f_x=12, weight_bits=14)
PRECISIONS: Final = {"default": DEFAULT, "high": HIGH}


@dataclass(frozen=True)
class ConvPlan:
    """Ring width, fractional bits of the weights and, where wraps matter, the bound on |y|.

    ``bound`` is in units of the untruncated output, 0 where the layer needs no zone check.
    """

    n: int
    f_w: int
    bound: int


@dataclass(frozen=True)
class Plan:
    """The public numbers of one exported model; names are those of the program's operations.

    ``input_limit`` is the largest absolute value an image may hold, ``output_k`` the bits of a
    logit, ``error`` a worst-case bound on a logit's absolute error while no value exceeds its
    calibrated range, ``retry_rate`` a bound on the share of images that need a retry.
    """

    f_x: int
    input_n: int
    input_limit: float
    output_k: int
    convs: Mapping[str, ConvPlan]
    gates: Mapping[str, Width]
    error: float
    retry_rate: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, program: Program) -> Plan:
        """The plan a peer sent for ``program``.

        Raises:
            ProtocolError: it is no plan, or not one for this program.
        """
        try:
            plan = cls(
                **{
                    **data,
                    "convs": {k: ConvPlan(**v) for k, v in data["convs"].items()},
                    "gates": {k: Width(**v) for k, v in data["gates"].items()},
                }
            )
            plan.check(program)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ProtocolError(f"not a plan for this network: {error}") from error
        return plan

    def check(self, program: Program) -> None:
        """Whether every operation has its numbers, and all are within what the code can do.

        Raises:
            ValueError: one is not.
        """

        def inside(value: Any, low: int, high: int, what: str) -> None:
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{what} is {value!r}, not {low} to {high}")

        if set(self.convs) != {op.out for op in program.convs}:
            raise ValueError("its linear layers are others")
        if set(self.gates) != {op.out for op in program.relus}:
            raise ValueError("its ReLU layers are others")
        inside(self.f_x, 1, 30, "f_x")
        inside(self.input_n, 2, WORD, "input_n")
        inside(self.output_k, 2, MAX_K, "output_k")
        for name, conv in self.convs.items():
            inside(conv.n, 2, WORD, f"n of {name}")
            inside(conv.f_w, 1, conv.n - 1, f"f_w of {name}")
            inside(conv.bound, 0, (1 << conv.n - 1) - 1, f"bound of {name}")
        for name, gate in self.gates.items():
            inside(gate.k, 2, MAX_K, f"k of {name}")
            inside(gate.n, 1, WORD, f"n of {name}")
        for value, top in (
            (self.input_limit, 2.0 ** (WORD - 2 - self.f_x)),
            (self.error, sys.float_info.max),
            (self.retry_rate, sys.float_info.max),
        ):
            if type(value) not in (int, float) or not 0 <= value <= top:
                raise ValueError(f"{value!r} is not a size")


def calibrate(
    graph: Graph, images: npt.NDArray[np.float32], precision: Precision = DEFAULT
) -> Plan:
    """Choose the plan of a graph.

    Args:
        images: normalised samples (N, C, H, W) that are like those to come.

    Raises:
        UsageError: the values seen do not fit the ring at this precision.
    """
    lowered = program.build(graph)
    seen = _ranges(graph, lowered, images)
    top = 2.0**precision.margin
    f_w = {op.out: _fraction(graph, op, precision.weight_bits) for op in lowered.convs}
    k = {op.out: _opened(seen[f"{op.out}?"] * top, precision.f_x) for op in lowered.relus}
    output_k = _opened(seen[lowered.output] * top, precision.f_x)
    bound = {
        op.out: math.ceil(seen[op.out] * top * 2.0 ** (precision.f_x + f_w[op.out]))
        + (1 << f_w[op.out])
        for op in lowered.convs
    }
    exposed = _exposed(lowered)
    checked = [op for op in lowered.convs if exposed[op.out].any()]
    danger = sum(op.size * (2 * bound[op.out] + 1) for op in checked)
    large = max(
        [
            math.ceil(math.log2(danger)) + precision.retry_bits if checked else 0,
            *(bound[op.out].bit_length() + 2 for op in checked),
            *(max([output_k, *k.values()]) + f_w[op.out] for op in checked),
        ],
        default=0,
    )
    rings = _rings(lowered, exposed, k, output_k, f_w, large)
    for name, n in rings.items():
        if n > WORD:
            raise UsageError(
                f"{name} would need a ring of {n} bits, and {WORD} is the most; "
                "use fewer bits (f_x, weight_bits) or a smaller margin"
            )
    plan = Plan(
        f_x=precision.f_x,
        input_n=rings[lowered.input.out],
        input_limit=seen[lowered.input.out] * top,
        output_k=output_k,
        convs={
            op.out: ConvPlan(
                rings[f"{op.out}?"], f_w[op.out], bound[op.out] if op in checked else 0
            )
            for op in lowered.convs
        },
        gates={op.out: Width(k[op.out], rings[op.out]) for op in lowered.relus},
        error=_error(graph, lowered, seen, precision, f_w),
        retry_rate=danger * 2.0**-large if checked else 0.0,
    )
    try:
        plan.check(lowered)
    except ValueError as error:
        raise UsageError(f"no fixed-point plan for this network: {error}") from error
    return plan


def _opened(largest: float, f_x: int) -> int:
    """Bits, sign included, of a value of at most ``largest``."""
    return max(math.ceil(largest * 2.0**f_x).bit_length() + 1, 2)


def _fraction(graph: Graph, op: Conv, weight_bits: int) -> int:
    """Fractional bits of an operation's weights."""
    weight, _ = weights.reals(graph, op)
    largest = float(np.abs(weight).max(initial=0.0))
    if largest == 0.0:
        return 1
    top = (1 << min(weight_bits, _MAX_WEIGHT_BITS)) - 1
    limit = _MAX_F_W + math.ceil(math.log2(op.area))
    chosen = min(math.floor(math.log2(top / largest)), limit)
    if chosen < 1:
        raise UsageError(f"{op.node}: a weight of {largest:g} is too large for fixed point")
    if chosen > 1 and not _holds(weight, chosen) and _holds(weight, chosen - 1):
        chosen -= 1
    return chosen


def _holds(weight: Floats, f_w: int) -> bool:
    """Whether the kernels' F(4x4, 3x3) form of the weights fits signed 16-bit words."""
    if weight.shape[2:] != (3, 3):
        return True
    rows = [[1, 0, 0], [1, 1, 1], [1, -1, 1], [1, 2, 4], [1, -2, 4], [0, 0, 1]]
    form = np.array(rows, np.float64)
    whole = np.rint(weight * 2.0**f_w)
    moved = np.matmul(np.matmul(form, whole), form.T)
    return bool(np.abs(moved).max() <= 32767)


def _ranges(graph: Graph, lowered: Program, images: npt.NDArray[np.float32]) -> dict[str, float]:
    """The largest absolute value of every tensor; ``name?`` at the gates of relu ``name``."""
    if not len(images) or images.shape[1:] != graph.input.shape:
        raise UsageError(
            f"calibration images must be (N, {', '.join(map(str, graph.input.shape))}), "
            f"got {images.shape}"
        )
    if not np.isfinite(images).all():
        raise UsageError("a calibration image holds a value that is not finite")
    seen: dict[str, float] = {}
    last = lowered.last_reader()
    for start in range(0, len(images), _CHUNK):
        values: dict[str, Floats] = {}
        for op in lowered.ops:
            if isinstance(op, Input):
                value = images[start : start + _CHUNK].astype(np.float64)
            elif isinstance(op, Conv):
                value = _conv(graph, op, values[op.source])
            elif isinstance(op, Relu):
                opened = program.take(op, values[op.source])
                key = f"{op.out}?"
                seen[key] = max(seen.get(key, 0.0), float(np.abs(opened).max(initial=0)))
                value = program.put(op, values[op.source], np.maximum(opened, 0))
            else:
                value = program.apply_local(op, [values[name] for name in op.inputs])
            values[op.out] = value
            seen[op.out] = max(seen.get(op.out, 0.0), float(np.abs(value).max(initial=0)))
            for name in {name for name in op.inputs if last[name] == op.out}:
                del values[name]
    return seen


def _conv(graph: Graph, op: Conv, x: Floats) -> Floats:
    weight, bias = weights.reals(graph, op)
    columns = linear.im2col(op, x)
    flat = np.matmul(weight.reshape(op.groups, op.weight_shape[0] // op.groups, -1), columns)
    return np.asarray(linear.to_image(op, flat) + bias[:, None, None], np.float64)


def _exposed(lowered: Program) -> dict[str, Bools]:
    """Where a wrap of a tensor's two shares would matter: wherever it is not only opened."""
    exposed = {name: np.zeros(shape, np.bool_) for name, shape in lowered.shapes.items()}
    for op in reversed(list(lowered.ops)):
        for name, value in zip(op.inputs, _exposes(op, exposed[op.out], exposed), strict=True):
            exposed[name] |= value
    return exposed


def _exposes(op: Op, out: Bools, shapes: Mapping[str, Bools]) -> list[Bools]:
    sources = [shapes[name] for name in op.inputs]
    match op:
        case Add() | Sub():
            return [out] * len(sources)
        case Concat():
            cuts = np.cumsum([source.shape[0] for source in sources])[:-1]
            return list(np.split(out, cuts))
        case Reshape():
            return [out.reshape(sources[0].shape)]
        case Relu():
            passed = out.copy().reshape(-1)
            passed[op.kept] = False
            return [passed.reshape(out.shape)]
        case Gather():
            spread = np.zeros(sources[0].size, np.bool_)
            np.logical_or.at(spread, op.index, out.reshape(-1))
            return [spread.reshape(sources[0].shape)]
        case SumPool():
            return [np.full(sources[0].shape, bool(out.any()))]
    return [np.ones(source.shape, np.bool_) for source in sources]


def _rings(
    lowered: Program,
    exposed: Mapping[str, Bools],
    k: Mapping[str, int],
    output_k: int,
    f_w: Mapping[str, int],
    large: int,
) -> dict[str, int]:
    """Ring width of every tensor and, as ``name?``, of every convolution's products."""
    need = dict.fromkeys(lowered.shapes, 1)
    need[lowered.output] = output_k
    rings = dict(need)
    for op in reversed(list(lowered.ops)):
        wanted = need[op.out]
        if isinstance(op, Conv):
            dangerous = bool(exposed[op.out].any())
            wanted = max(large, wanted) if dangerous else wanted + f_w[op.out]
            rings[f"{op.out}?"] = wanted
        elif isinstance(op, Relu):
            rings[op.out] = wanted
            wanted = k[op.out] if op.full else max(k[op.out], wanted)
        for name in op.inputs:
            need[name] = max(need[name], wanted)
    rings[lowered.input.out] = max(need[lowered.input.out], 2)
    return rings


def _error(
    graph: Graph,
    lowered: Program,
    seen: Mapping[str, float],
    precision: Precision,
    f_w: Mapping[str, int],
) -> float:
    """Worst-case absolute error of a logit: every rounding at its worst, all adding up."""
    error: dict[str, float] = {}
    unit = 2.0**-precision.f_x
    for op in lowered.ops:
        inputs = [error[name] for name in op.inputs]
        match op:
            case Input():
                value = unit / 2
            case Conv():
                weight, _ = weights.reals(graph, op)
                scale = 2.0 ** f_w[op.out]
                rounded = encode(weight, f_w[op.out]).view(np.int64) / scale
                gain = float(np.abs(rounded).sum(axis=(1, 2, 3)).max())
                drift = float(np.abs(weight - rounded).sum(axis=(1, 2, 3)).max())
                value = gain * inputs[0] + drift * seen[op.source] * 2.0**precision.margin
                value += unit / scale + unit
            case Concat():
                value = max(inputs)
            case SumPool():
                value = inputs[0] * op.kernel[0] * op.kernel[1]
            case _:
                value = sum(inputs)
        error[op.out] = value
    return error[lowered.output]


def synthetic_images(graph: Graph, count: int = 8) -> npt.NDArray[np.float32]:
    """Flat images, uniform noise and normal noise, for models that come without samples.

    Natural images can reach further than noise; pass real samples to :func:`calibrate` where
    there are any. The fixed seed makes calibration repeatable; it protects nothing.
    """
    shape = graph.input.shape
    rng = np.random.default_rng(0)
    pixels = rng.random((count, *shape), np.float32)
    pixels[0], pixels[1] = 0.0, 1.0
    mean, std = graph.metadata.get("mean"), graph.metadata.get("std")
    if mean is None or std is None:
        mean, std = [0.5], [0.25]
    axes = (-1, *[1] * (len(shape) - 1))
    scaled = (pixels - np.reshape(mean, axes)) / np.reshape(std, axes)
    scaled[count // 2 :] = rng.standard_normal((count - count // 2, *shape))
    return np.asarray(scaled, np.float32)
