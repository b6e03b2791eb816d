"""Latency and traffic of models that were not run, over networks that are not here.

Bytes and round trips are exact (:mod:`.forecast`). Compute is fitted to measurements on loopback:
the latency of each phase is taken to be linear, with no negative term, in what
:class:`.forecast.Size` counts. How far off that is, measurements left out of the fit tell: each in
turn, and whole architectures in turn.

All of it is about the least latency of a measurement, which is what an undisturbed machine takes:
medians of the same model differ by a factor of two between runs on a busy machine, minima do not.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .. import models
from ..backends.fss.public import Public
from ..errors import PiError, UsageError
from ..net.link import parse
from . import forecast
from .forecast import Compute, Size
from .report.sources import Run

BACKEND: Final = "fss"
LOOPBACK: Final = "loopback"
PHASES: Final = ("online", "offline")
_TERMS: Final = tuple(field.name for field in dataclasses.fields(Compute))
_LEAST: Final = 3
_RIDGE: Final = 1e-4
"""Weight of a preference for small, even terms: decides where the measurements do not."""
_SWEEPS: Final = 4000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Error:
    """Relative errors of predictions for measurements outside the fit: median, and the largest."""

    median: float
    largest: float
    predictions: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Error:
        """From predicted and measured latencies."""
        errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
        return cls(round(statistics.median(errors), 4), round(max(errors), 4), len(errors))


@dataclass(frozen=True)
class Fit:
    """Compute of both phases, from ``rows`` measurements of ``architectures``.

    Attributes:
        left_out: by phase, every measurement predicted by a fit of the others.
        unseen: by phase, every architecture predicted by a fit of the others; empty where there
            are none.
    """

    threads: int
    rows: int
    architectures: list[str]
    compute: dict[str, Compute]
    left_out: dict[str, Error]
    unseen: dict[str, Error]


@dataclass(frozen=True)
class Prediction:
    """Least latencies in ms, bytes by direction, all of one inference of ``batch`` images."""

    model: str
    network: str
    batch: int
    relus: int
    online_ms: float
    offline_ms: float
    online_bytes: dict[str, int]
    offline_bytes: dict[str, int]
    round_trips: int


@dataclass(frozen=True)
class Check:
    """A prediction beside a measurement that was not in the fit.

    Attributes:
        measured_ms, median_ms: the least and the median latency, by phase.
        error: predicted / measured - 1, by phase.
        exact: the predicted bytes and round trips are the measured ones, but for the digits of an
            inference's number.
    """

    prediction: Prediction
    file: str
    measured_ms: dict[str, float]
    median_ms: dict[str, float]
    error: dict[str, float]
    exact: bool


def fit(
    runs: Sequence[Run],
    *,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Fit:
    """Fit compute to measurements.

    Args:
        runs: of backend fss on loopback, all with one number of threads. Their models must be at
            hand.

    Raises:
        UsageError: they do not allow a fit.
    """
    threads = {run.threads for run in runs}
    if len(threads) > 1:
        raise UsageError(f"fit results of one number of threads; these are of {sorted(threads)}")
    sizes = []
    for number, run in enumerate(runs):
        progress(f"size of {run.model}", number, len(runs))
        sizes.append(_size(run))
    if len({(run.architecture, run.relus, run.batch) for run in runs}) < _LEAST:
        raise UsageError(
            f"a fit needs {_LEAST} different measurements or more of backend {BACKEND} on "
            f"{LOOPBACK} with ReLUs, such as a sweep over ReLUs; there are too few"
        )
    architectures = list(dict.fromkeys(run.architecture for run in runs))
    indices = range(len(runs))
    by_architecture = [
        [i for i in indices if runs[i].architecture == name] for name in architectures
    ]
    compute, left_out, unseen = {}, {}, {}
    for phase in PHASES:
        values = [least(run)[phase] for run in runs]
        compute[phase] = _least(sizes, values)
        left_out[phase] = Error.of(_without(sizes, values, [[i] for i in indices]))
        if len(architectures) > 1:
            unseen[phase] = Error.of(_without(sizes, values, by_architecture))
    return Fit(threads.pop(), len(runs), architectures, compute, left_out, unseen)


def least(run: Run) -> dict[str, float]:
    """The least latency measured, by phase."""
    return {"online": run.online_min, "offline": run.offline_min}


def usable(run: Run) -> bool:
    """Whether a measurement can be part of a fit.

    Without a ReLU nobody waits between layers, which makes linear layers faster than anywhere else.
    """
    return run.backend == BACKEND and run.network == LOOPBACK and run.round_trips > 1


def predict(
    fitted: Fit, model: str, network: str, *, batch: int = 1, plan: str = "default"
) -> Prediction:
    """Predict one model over one network.

    Raises:
        UsageError: no such model, network or plan.
        UnsupportedLayer: the model has a layer the backend cannot do.
    """
    known = _public(model, plan)
    known = dataclasses.replace(known, batch=batch)
    traffic = forecast.traffic(known)
    online, offline = forecast.latency_ms(
        known, fitted.compute["online"], fitted.compute["offline"], parse(network)
    )
    return Prediction(
        model=model,
        network=network,
        batch=batch,
        relus=known.graph.relu_kept,
        online_ms=round(online, 2),
        offline_ms=round(offline, 2),
        online_bytes=traffic.online,
        offline_bytes=traffic.offline,
        round_trips=traffic.round_trips,
    )


def check(
    fitted: Fit,
    runs: Sequence[Run],
    *,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> list[Check]:
    """Predict what was measured.

    Raises:
        UsageError: a measurement of another backend or number of threads, or of a model that is
            not at hand.
    """
    checks = []
    for number, run in enumerate(runs):
        if run.backend != BACKEND or run.threads != fitted.threads:
            raise UsageError(
                f"{run.file}: {run.backend} with {run.threads} threads cannot be checked against "
                f"a fit of {BACKEND} with {fitted.threads}"
            )
        progress(f"{run.model} over {run.network}", number, len(runs))
        found = predict(fitted, run.model, run.network, batch=run.batch)
        predicted = {"online": found.online_ms, "offline": found.offline_ms}
        measured = least(run)
        # Numbers of inferences have one to six digits in the session's commands.
        near = all(
            abs(sum(ours.values()) - theirs) <= _DIGITS
            for ours, theirs in (
                (found.online_bytes, run.online_bytes),
                (found.offline_bytes, run.offline_bytes),
            )
        )
        checks.append(
            Check(
                prediction=found,
                file=run.file,
                measured_ms=measured,
                median_ms={"online": run.online, "offline": run.offline},
                error={phase: round(predicted[phase] / measured[phase] - 1, 4) for phase in PHASES},
                exact=near and found.round_trips == run.round_trips,
            )
        )
    return checks


_DIGITS: Final = 8


def _size(run: Run) -> Size:
    try:
        known = _public(run.model, "default")
    except PiError as error:
        raise UsageError(f"{run.file}: {run.model} is not at hand: {error}") from error
    if (known.graph.relu_kept, known.graph.relu_total) != (run.relus, run.relus_total):
        raise UsageError(f"{run.file}: {run.model} is another network here")
    return forecast.size(dataclasses.replace(known, batch=run.batch))


@cache
def _public(model: str, plan: str) -> Public:
    return forecast.public(models.resolve(model), plan=plan)


def _columns(sizes: Sequence[Size]) -> Floats:
    return np.array([[1.0, *dataclasses.astuple(size)] for size in sizes])


def _least(sizes: Sequence[Size], values: Sequence[float]) -> Compute:
    """Least squares of relative errors, no term negative."""
    relative = _columns(sizes) / np.array(values)[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    columns = relative / scale
    gram = columns.T @ columns + _RIDGE * len(values) * np.eye(len(_TERMS))
    aim = columns.sum(axis=0)
    terms = np.zeros(len(_TERMS))
    for _ in range(_SWEEPS):
        before = terms.copy()
        for i in range(len(terms)):
            terms[i] = max(0.0, terms[i] + (aim[i] - gram[i] @ terms) / gram[i, i])
        if np.abs(terms - before).max() < 1e-12:
            break
    return Compute(*(float(term) for term in terms / scale))


def _without(
    sizes: Sequence[Size], values: Sequence[float], groups: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """Predicted and measured values of each group, from a fit of the others."""
    pairs = []
    for group in groups:
        others = [i for i in range(len(sizes)) if i not in group]
        if not others:
            continue
        compute = _least([sizes[i] for i in others], [values[i] for i in others])
        pairs += [(compute.of(sizes[i]), values[i]) for i in group]
    return pairs


def to_json(
    fitted: Fit, predictions: Sequence[Prediction], checks: Sequence[Check]
) -> dict[str, Any]:
    """Everything, with the errors of the checks summed up."""
    document: dict[str, Any] = {
        "schema_version": 1,
        "fit": dataclasses.asdict(fitted),
        "predictions": [dataclasses.asdict(one) for one in predictions],
        "checks": [dataclasses.asdict(one) for one in checks],
    }
    if checks:
        document["held_out"] = {
            phase: dataclasses.asdict(errors(checks, phase)) for phase in PHASES
        }
    return document


def errors(checks: Sequence[Check], phase: str) -> Error:
    """Of one phase, over all checks."""
    return Error.of((1 + one.error[phase], 1.0) for one in checks)
