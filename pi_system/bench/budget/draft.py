"""A budget that a model keeps, to begin with."""

from __future__ import annotations

import math
from dataclasses import replace

from ...backends.fss import footprint
from ...graph.ir import Graph
from .check import Found, costs
from .limits import Accuracy, Budget

AUDITED = 32
SLACK = 0.05
"""By which accuracies may be worse than measured, as a fraction of the images."""
_COMMENT = """Limits for {model}: pi-bench budget check FILE --model {model} [--measure]
Bytes are exact, framing included, for one inference; material is what each side keeps on disk.
Latencies (median, milliseconds), accuracies and audits are checked with --measure alone.
Leave out what is not to be limited."""


def draft(graph: Graph, plan: str, batch: int, images: int) -> Budget:
    """What follows from the model, and limits on what its plan states."""
    public = footprint.public(graph, plan, batch)
    computed = costs(graph, plan, batch)
    return replace(
        computed,
        accuracy=Accuracy(images=images, logit_error=_up(public.plan.error)),
        reveals=replace(computed.reveals, audited=AUDITED),
    )


def with_measured(budget: Budget, found: Found, headroom: float) -> Budget:
    """The same with limits on what was measured.

    Args:
        headroom: fraction by which latencies may be higher than measured.
    """
    seen, limits = found.first.accuracy, budget.accuracy
    agreement = max(0.0, round(seen.argmax_agreement - SLACK, 4))
    limits = replace(limits, agreement=agreement)
    if seen.correct is not None and seen.plaintext_correct is not None:
        right, plain = seen.correct / seen.images, seen.plaintext_correct / seen.images
        loss = max(0.0, plain - right)
        limits = replace(
            limits, private=max(0.0, round(right - SLACK, 4)), loss=round(loss + SLACK, 4)
        )
    latencies = {
        network: _up((1 + headroom) * result.online.latency_ms.median)
        for network, result in found.results.items()
    }
    return replace(budget, latency_ms=latencies, accuracy=limits)


def comment(model: str) -> str:
    """The first lines of the file."""
    return _COMMENT.format(model=model)


def _up(value: float) -> float:
    """To two digits, upwards."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.6g}")
