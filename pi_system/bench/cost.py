"""What a private inference will take: round trips, bytes and compute, from measured runs.

For backends that spend one round trip on each layer with ReLUs, and one on the image and the
logits (``fss``). Compute and bytes are taken to be linear in the number of ReLUs; on a wide-area
network the round trips outweigh both, so that an empty layer is worth tens of thousands of ReLUs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import IntegrityError, UsageError
from ..net import link as links


@dataclass(frozen=True)
class Cost:
    """Online latency of one network as a function of its ReLUs per layer.

    Attributes:
        fixed_ms, relu_ms: compute of both parties, of a network without ReLUs and of each one.
        fixed_bytes, relu_bytes: the same for payload bytes, both directions together.
    """

    fixed_ms: float
    relu_ms: float
    fixed_bytes: float
    relu_bytes: float

    def latency_ms(self, relus: Sequence[int], link: links.Link) -> float:
        """Predicted online latency over ``link``.

        Args:
            relus: kept per layer, in the order of execution.
        """
        layers, total = sum(count > 0 for count in relus), sum(relus)
        packets = 1 + links.HEADERS / links.SEGMENT
        bits = 8 * packets * (self.fixed_bytes + self.relu_bytes * total)
        return (
            self.fixed_ms
            + self.relu_ms * total
            + link.rtt_ms * (layers + 1)
            + bits / (link.mbps * 1e3)
        )

    def affordable(self, layers: int, target_ms: float, link: links.Link) -> int:
        """The most ReLUs that ``layers`` layers may hold together within ``target_ms``; -1 if
        not even their round trips fit."""
        base = self.latency_ms([0], link) + link.rtt_ms * layers
        slope = self.latency_ms([10**6], link) - self.latency_ms([0], link) - link.rtt_ms
        left = target_ms - base
        if left < 0:
            return -1
        return int(left / (slope / 10**6)) if slope > 0 else 2**62


def calibrate(results: Sequence[Mapping[str, Any]]) -> Cost:
    """Fit the cost of a network to results of ``pi-bench run`` on loopback.

    Args:
        results: of one architecture with at least two different numbers of ReLUs.

    Raises:
        UsageError: the results do not allow it.
    """
    kinds = {(r["backend"], r["model"]["relu_total"], r["threads_per_party"]) for r in results}
    if len(kinds) != 1 or any(r["batch_size"] != 1 for r in results):
        raise UsageError(
            "the cost of a network needs results of one backend, network, batch 1 and number of "
            f"threads; these are of {sorted(kinds)}"
        )
    for result in results:
        if result["network"]["name"] != "loopback":
            raise UsageError("compute is measured on loopback; leave --network out")
        layers = sum(layer["relus_kept"] > 0 for layer in result["online"]["layers"])
        if result["online"]["round_trips"] != layers + 1:
            raise UsageError(
                f"backend {result['backend']} takes {result['online']['round_trips']:g} round "
                f"trips for {layers} layers with ReLUs; this cost model is for {layers + 1}"
            )
    relus = np.array([float(r["model"]["relu_kept"]) for r in results])
    if len(set(relus)) < 2:
        raise UsageError("the cost of a ReLU needs results with two different numbers of them")
    columns = np.stack([np.ones_like(relus), relus], axis=1)
    values = np.array(
        [[r["online"]["latency_ms"]["median"], sum(r["online"]["bytes"].values())] for r in results]
    )
    fixed, per_relu = np.linalg.lstsq(columns, values, rcond=None)[0]
    return Cost(
        max(float(fixed[0]), 0.0),
        max(float(per_relu[0]), 0.0),
        max(float(fixed[1]), 0.0),
        max(float(per_relu[1]), 0.0),
    )


def load(paths: Sequence[Path]) -> Cost:
    """:func:`calibrate` from result files.

    Raises:
        UsageError: they do not allow it.
        IntegrityError: one is no result of ``pi-bench run``.
    """
    results = []
    for path in paths:
        try:
            document = json.loads(path.read_bytes())
            document["online"]["layers"], document["network"]["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is no result of pi-bench run") from error
        results.append(document)
    return calibrate(results)
