"""The fixed-point plan: how many bits everything has, chosen by calibration on sample images.

Public and equal on all sides. See docs/protocol.md for the rules; in short:

* ``f_x`` fractional bits for every activation; ``f_w`` for a layer's weights, so that its
  largest weight takes ``weight_bits`` bits;
* k: the bits of an opened value, from the largest seen and ``margin`` bits on top;
* n: where a layer's truncated output is only opened, its ring needs k + f_w bits. Elsewhere a
  wrap of the shares would be an error: there the rings are so large that the zone check, which
  finds every wrap while |y| <= bound, asks for a retry at most once in 2^retry_bits inferences,
  and shrink with depth as far as that allows.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...errors import IntegrityError, ProtocolError, UsageError
from ...graph.ir import Graph
from . import linear, program, weights
from .program import Add, Concat, Conv, Gather, Input, Op, Program, Relu, Reshape, Sub, SumPool
from .relu import MAX_K, Width
from .ring import WORD, Floats

_log = logging.getLogger(__name__)

PLAN_KEY: Final = "fss_plan"
"""Where a graph's metadata hold its plans: a mapping with one plan per name of PRECISIONS."""
_MAX_WEIGHT_BITS: Final = 15
"""So that a weight fits a signed 16-bit word."""
_MAX_F_W: Final = 18
_FAST_RING: Final = 62
"""Above it the kernels have no fast convolution."""
_FEWER: Final = 2
_SPARE: Final = 4
"""Bits by which the search for rings starts above the least equal ones."""
_SLACK: Final = 2.0
_CHUNK: Final = 16
_POINTS: Final = {
    (1, 1): [[1, 0, 0], [1, 1, 1], [1, -1, 1], [1, 2, 4], [4, 2, 1], [0, 0, 1]],
    (2, 2): [[1, 0, 0], [1, 0, 1], [1, 0, -1], [1, 0, 2], [0, 0, 1], [0, 1, 0]],
}
"""By stride, what the kernels' fast 3x3 convolutions turn weights into (native/ringconv.c)."""
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Precision:
    """What the user may choose.

    ``f_x`` is the number of fractional bits of activations, ``weight_bits`` the bits of each
    layer's largest weight, up to two fewer where that keeps rings within what the fast
    convolutions can do. ``fast`` lowers them layer by layer as far as the fastest convolution
    needs to hold the weights in 16-bit words. ``margin`` bits are kept free above the largest
    value seen, ``retry_bits`` is -log2 of the highest retry rate per image.
    """

    f_x: int = 9
    weight_bits: int = 12
    fast: bool = True
    margin: int = 1
    retry_bits: int = 10


DEFAULT: Final = Precision()
HIGH: Final = Precision(f_x=12, weight_bits=15, fast=False)
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
    logit. ``error`` is measured: twice the largest absolute error of a logit that the
    fixed-point network makes on the calibration images. ``retry_rate`` bounds the share of
    images that need a retry.
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
    seen, logits = _ranges(graph, lowered, images)
    top = 2.0**precision.margin
    k = {op.out: _opened(seen[f"{op.out}?"] * top, precision.f_x) for op in lowered.relus}
    output_k = _opened(seen[lowered.output] * top, precision.f_x)
    for fewer in range(_FEWER + 1):
        bits = precision.weight_bits - fewer
        f_w = {op.out: _fraction(graph, op, bits, precision.fast) for op in lowered.convs}
        bound = {
            op.out: math.ceil(seen[op.out] * top * 2.0 ** (precision.f_x + f_w[op.out]))
            + (1 << f_w[op.out])
            for op in lowered.convs
        }
        rings, checked, rate = _Rings(lowered, k, output_k, f_w, bound).choose(precision.retry_bits)
        if max(rings.values()) <= _FAST_RING:
            break
    for name, n in rings.items():
        if n > WORD:
            raise UsageError(
                f"{name} would need a ring of {n} bits, and {WORD} is the most; "
                "use fewer bits (f_x, weight_bits) or a smaller margin"
            )
    private = _fixed_point(graph, lowered, images, precision.f_x, f_w)
    plan = Plan(
        f_x=precision.f_x,
        input_n=rings[lowered.input.out],
        input_limit=seen[lowered.input.out] * top,
        output_k=output_k,
        convs={
            op.out: ConvPlan(
                rings[f"{op.out}?"], f_w[op.out], bound[op.out] if op.out in checked else 0
            )
            for op in lowered.convs
        },
        gates={op.out: Width(k[op.out], rings[op.out]) for op in lowered.relus},
        error=_SLACK * float(np.abs(private - logits).max(initial=0.0)),
        retry_rate=rate,
    )
    try:
        plan.check(lowered)
    except ValueError as error:
        raise UsageError(f"no fixed-point plan for this network: {error}") from error
    return plan


def calibrated(
    graph: Graph, images: npt.NDArray[np.float32], source: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """A plan for every named precision, as a graph's metadata hold them under PLAN_KEY.

    Args:
        source: what the images are, for people.

    Returns:
        The plans, and why there is none for a precision that does not fit this network.

    Raises:
        UsageError: not even the default one fits.
        UnsupportedLayer: this backend cannot run the network.
    """
    plans: dict[str, Any] = {"calibrated_on": source}
    failures = {}
    for name, precision in PRECISIONS.items():
        try:
            plans[name] = calibrate(graph, images, precision).to_json()
        except UsageError as error:
            if precision is DEFAULT:
                raise
            failures[name] = str(error)
    return plans, failures


def _opened(largest: float, f_x: int) -> int:
    """Bits, sign included, of a value of at most ``largest``."""
    return max(math.ceil(largest * 2.0**f_x).bit_length() + 1, 2)


def _fraction(graph: Graph, op: Conv, bits: int, fast: bool) -> int:
    """Fractional bits of an operation's weights."""
    weight, _ = weights.reals(graph, op)
    largest = float(np.abs(weight).max(initial=0.0))
    if largest == 0.0:
        return 1
    top = (1 << min(bits, _MAX_WEIGHT_BITS)) - 1
    limit = _MAX_F_W + math.ceil(math.log2(op.area))
    chosen = min(math.floor(math.log2(top / largest)), limit)
    if chosen < 1:
        raise UsageError(f"{op.node}: a weight of {largest:g} is too large for fixed point")
    while fast and chosen > 1 and not _holds(op, weight, chosen):
        chosen -= 1
    return chosen


def _holds(op: Conv, weight: Floats, f_w: int) -> bool:
    """Whether the weights as the kernels' fastest convolution needs them fit 16-bit words."""
    if weight.shape[2:] != (3, 3) or op.stride not in _POINTS:
        return True
    form = np.array(_POINTS[op.stride], np.float64)
    moved = np.matmul(np.matmul(form, np.rint(weight * 2.0**f_w)), form.T)
    return bool(np.abs(moved).max() <= 32767)


def _ranges(
    graph: Graph, lowered: Program, images: npt.NDArray[np.float32]
) -> tuple[dict[str, float], Floats]:
    """The largest absolute value of every tensor (``name?`` at the gates of relu ``name``) and
    the logits, in float64."""
    if not len(images) or images.shape[1:] != graph.input.shape:
        raise UsageError(
            f"calibration images must be (N, {', '.join(map(str, graph.input.shape))}), "
            f"got {images.shape}"
        )
    if not np.isfinite(images).all():
        raise UsageError("a calibration image holds a value that is not finite")
    seen: dict[str, float] = {}
    logits = []

    def note(name: str, value: Floats) -> None:
        seen[name] = max(seen.get(name, 0.0), float(np.abs(value).max(initial=0)))

    def conv(op: Conv, x: Floats) -> Floats:
        return _conv(op, x, *weights.reals(graph, op))

    for chunk in _chunks(images):
        for op, value, opened in _walk(lowered, chunk, conv):
            note(op.out, value)
            if opened is not None:
                note(f"{op.out}?", opened)
        logits.append(value)
    return seen, np.concatenate(logits)


def _fixed_point(
    graph: Graph,
    lowered: Program,
    images: npt.NDArray[np.float32],
    f_x: int,
    f_w: Mapping[str, int],
) -> Floats:
    """The logits as the protocol computes them: integers, exact in float64, and truncations
    that round up with the probability of what they drop. The fixed seed protects nothing."""
    rng = np.random.default_rng(0)
    fixed: dict[str, tuple[Floats, Floats]] = {}
    for op in lowered.convs:
        weight, bias = weights.reals(graph, op)
        scale = 2.0 ** f_w[op.out]
        fixed[op.out] = np.rint(weight * scale), np.rint(bias * 2.0**f_x * scale)

    def conv(op: Conv, x: Floats) -> Floats:
        y = _conv(op, x, *fixed[op.out]) * 2.0 ** -f_w[op.out]
        return np.floor(y + rng.random(y.shape))

    logits = []
    for chunk in _chunks(images):
        *_, (_, value, _) = _walk(lowered, np.rint(chunk * 2.0**f_x), conv)
        logits.append(value)
    return np.concatenate(logits) * 2.0**-f_x


def _chunks(images: npt.NDArray[np.float32]) -> Iterator[Floats]:
    for start in range(0, len(images), _CHUNK):
        yield images[start : start + _CHUNK].astype(np.float64)


def _walk(
    lowered: Program, images: Floats, conv: Callable[[Conv, Floats], Floats]
) -> Iterator[tuple[Op, Floats, Floats | None]]:
    """Every operation with its value and, for a Relu, the values at its gates."""
    values: dict[str, Floats] = {}
    last = lowered.last_reader()
    for op in lowered.ops:
        opened = None
        if isinstance(op, Input):
            value = images
        elif isinstance(op, Conv):
            value = conv(op, values[op.source])
        elif isinstance(op, Relu):
            opened = program.take(op, values[op.source])
            value = program.put(op, values[op.source], np.maximum(opened, 0))
        else:
            value = program.apply_local(op, [values[name] for name in op.inputs])
        values[op.out] = value
        yield op, value, opened
        for name in {name for name in op.inputs if last[name] == op.out}:
            del values[name]


def _conv(op: Conv, x: Floats, weight: Floats, bias: Floats) -> Floats:
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


class _Rings:
    """The choice of ring widths.

    A layer is checked where it has exposed positions. With n bits its zone check asks for a
    retry of an image with probability at most size (2 bound + 1) / 2^n. From equal rings, those
    of some layer and all after it are narrowed again and again, each time where the online
    messages shrink most for what it adds to the retry rate.
    """

    def __init__(
        self,
        lowered: Program,
        k: Mapping[str, int],
        output_k: int,
        f_w: Mapping[str, int],
        bound: Mapping[str, int],
    ) -> None:
        self._lowered = lowered
        self._k = k
        self._output_k = output_k
        self._f_w = f_w
        exposed = _exposed(lowered)
        checked = [op for op in lowered.convs if exposed[op.out].any()]
        widest = max([output_k, *k.values()])
        self._danger = {op.out: op.size * (2 * bound[op.out] + 1) for op in checked}
        self._least = {
            op.out: max(bound[op.out].bit_length() + 2, widest + f_w[op.out]) for op in checked
        }

    def choose(self, retry_bits: int) -> tuple[dict[str, int], Sequence[str], float]:
        """Width of every tensor and, as ``name?``, of every convolution's products; the checked
        layers; the retry rate."""
        checked = list(self._danger)
        if not checked:
            return self._widths({}), checked, 0.0
        equal = math.ceil(math.log2(sum(self._danger.values()))) + retry_bits
        start = max(equal, min(equal + _SPARE, _FAST_RING))
        n = {name: max(start, self._least[name]) for name in checked}
        rings = self._widths(n)
        while True:
            best: tuple[float, dict[str, int], dict[str, int]] | None = None
            for at, name in enumerate(checked):
                less = rings[f"{name}?"] - 1
                trial = n | {
                    later: max(min(n[later], less), self._least[later]) for later in checked[at:]
                }
                narrowed = self._widths(trial)
                saved = self._bits(rings) - self._bits(narrowed)
                rate = self._rate(narrowed)
                if saved > 0 and rate <= 2.0**-retry_bits:
                    gain = saved / (rate - self._rate(rings))
                    if best is None or gain > best[0]:
                        best = gain, trial, narrowed
            if best is None:
                return rings, checked, self._rate(rings)
            _, n, rings = best

    def _rate(self, rings: Mapping[str, int]) -> float:
        return sum(danger * 2.0 ** -rings[f"{name}?"] for name, danger in self._danger.items())

    def _bits(self, rings: Mapping[str, int]) -> int:
        """Of the online messages whose size depends on rings."""
        lowered = self._lowered
        gates = sum(len(op.kept) * rings[op.out] for op in lowered.relus)
        return gates + lowered.input.size * rings[lowered.input.out]

    def _widths(self, checked: Mapping[str, int]) -> dict[str, int]:
        lowered = self._lowered
        need = dict.fromkeys(lowered.shapes, 1)
        need[lowered.output] = self._output_k
        rings = dict(need)
        for op in reversed(list(lowered.ops)):
            wanted = need[op.out]
            if isinstance(op, Conv):
                safe = checked.get(op.out)
                wanted = wanted + self._f_w[op.out] if safe is None else max(safe, wanted)
                rings[f"{op.out}?"] = wanted
            elif isinstance(op, Relu):
                rings[op.out] = wanted
                wanted = self._k[op.out] if op.full else max(self._k[op.out], wanted)
            for name in op.inputs:
                need[name] = max(need[name], wanted)
        rings[lowered.input.out] = max(need[lowered.input.out], 2)
        return rings


def of_graph(graph: Graph, lowered: Program, name: str) -> Plan:
    """The plan ``name`` that a model was exported with or, for a model without any, one that is
    calibrated here on synthetic images.

    Raises:
        UsageError: there is no plan of this name.
        IntegrityError: the model's is damaged.
    """
    if name not in PRECISIONS:
        raise UsageError(f"no plan {name!r}: there are {', '.join(PRECISIONS)}")
    stored = graph.metadata.get(PLAN_KEY)
    if stored is None:
        _log.warning(
            "%s has no fixed-point plan: calibrated on synthetic images, which natural ones "
            "may exceed; pi-export --calibrate makes one from samples",
            graph.metadata.get("name", "the model"),
        )
        return calibrate(graph, synthetic_images(graph), PRECISIONS[name])
    if not isinstance(stored, Mapping) or name not in stored:
        raise UsageError(f"the model was exported without a {name} plan; export it again")
    try:
        return Plan.from_json(stored[name], lowered)
    except ProtocolError as error:
        raise IntegrityError(f"the model's {name} plan: {error}") from error


def synthetic_images(graph: Graph, count: int = 8) -> npt.NDArray[np.float32]:
    """Flat images, uniform noise and normal noise, for models that come without samples; normal
    noise alone for random ones, whose images are just that.

    Natural images can reach further than noise; pass real samples to :func:`calibrate` where
    there are any. The fixed seed makes calibration repeatable; it protects nothing.
    """
    shape = graph.input.shape
    rng = np.random.default_rng(0)
    if graph.metadata.get("dataset") == "random":
        return rng.standard_normal((count, *shape), np.float32)
    pixels = rng.random((count, *shape), np.float32)
    pixels[0], pixels[1] = 0.0, 1.0
    mean, std = graph.metadata.get("mean"), graph.metadata.get("std")
    if mean is None or std is None:
        mean, std = [0.5], [0.25]
    axes = (-1, *[1] * (len(shape) - 1))
    scaled = (pixels - np.reshape(mean, axes)) / np.reshape(std, axes)
    scaled[count // 2 :] = rng.standard_normal((count - count // 2, *shape))
    return np.asarray(scaled, np.float32)
