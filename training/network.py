"""Budgets that know the network: which layers keep ReLUs at all, and how many, for a latency.

Each layer with ReLUs costs a round trip whatever it keeps. SENet's water-filling shares a budget
out so that ``sum eta_l log r_l`` is largest (its r_l are proportional to eta_l); the same value
decides here which layers to empty, since each round trip saved buys ReLUs for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pi_system.bench.cost import Cost
from pi_system.errors import UsageError
from pi_system.net.link import Link, parse
from pi_system.nn import count_relus

from . import sensitivity as sensitivity_module
from . import teacher
from .allocate import fill
from .loop import Run

OUTPUT = "network.json"


def value(relus: Sequence[int], sensitivity: Sequence[float]) -> float:
    """What an allocation is worth; it grows with every ReLU."""
    return sum(eta * math.log1p(r) for r, eta in zip(relus, sensitivity, strict=True))


def budgets(
    caps: Sequence[int],
    sensitivity: Sequence[float],
    cost: Cost,
    link: Link,
    target_ms: float,
) -> list[int]:
    """ReLUs per layer that meet ``target_ms`` at the greatest value.

    Layers are emptied one after another, each time the one that leaves the most value; at every
    number of layers, full and empty ones change places as long as that gains. The best of these
    allocations is taken.

    Raises:
        UsageError: not even a network without ReLUs meets the target.
    """

    def worth(chosen: Sequence[int]) -> tuple[bool, float]:
        relus = _share(chosen, caps, sensitivity, cost, link, target_ms)
        if relus is None:
            # Nothing fits yet: the layers of the least sensitivity go first.
            return False, sum(sensitivity[i] for i in chosen)
        return True, value(relus, sensitivity)

    kept = list(range(len(caps)))
    found = [kept]
    while kept:
        kept = max(([i for i in kept if i != out] for out in kept), key=worth)
        while True:
            empty = [i for i in range(len(caps)) if i not in kept]
            swaps = [[i for i in kept if i != out] + [new] for out in kept for new in empty]
            other = max(swaps, key=worth, default=kept)
            if worth(other) <= worth(kept):
                break
            kept = other
        found.append(kept)
    best = _share(max(found, key=worth), caps, sensitivity, cost, link, target_ms)
    if best is None:
        lowest = cost.latency_ms([0] * len(caps), link)
        raise UsageError(
            f"no allocation meets {target_ms:g} ms over {link.name}: "
            f"without any ReLU it takes {lowest:.1f} ms"
        )
    return best


def _share(
    kept: Sequence[int],
    caps: Sequence[int],
    sensitivity: Sequence[float],
    cost: Cost,
    link: Link,
    target_ms: float,
) -> list[int] | None:
    budget = cost.affordable(len(kept), target_ms, link)
    if budget < len(kept):
        return None
    inside = [cap if i in kept else 0 for i, cap in enumerate(caps)]
    return fill(min(budget, sum(inside)), inside, sensitivity)


def run_stage(run: Run, cost: Cost, network: str, target_ms: float) -> dict[str, Any]:
    """Write the budgets for ``target_ms`` over ``network`` in ``network.json``; returns them.

    Raises:
        UsageError: no such network, or the target cannot be met.
    """
    link = parse(network)
    if link is None:
        raise UsageError("loopback has no round trips to save; give lan, wan or RTT:MBPS")
    profile = sensitivity_module.run_stage(run)
    layers = count_relus(teacher.masked(run, teacher.fresh(run, "teacher"))).layers
    eta = [profile[layer.name] for layer in layers]
    relus = budgets([layer.total for layer in layers], eta, cost, link, target_ms)
    document = {
        "network": {"name": link.name, "rtt_ms": link.rtt_ms, "mbps": link.mbps},
        "target_ms": target_ms,
        "predicted_ms": round(cost.latency_ms(relus, link), 3),
        "relu_budget": sum(relus),
        "relus": relus,
        "layers": [
            {"site": layer.name, "total": layer.total, "eta_alpha": e, "relus": kept}
            for layer, e, kept in zip(layers, eta, relus, strict=True)
        ],
    }
    run.write_json(OUTPUT, "masks", document)
    return document
