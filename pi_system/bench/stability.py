"""Reasons not to trust a figure, said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .schema import Latency, Stability

MAX_SPREAD: Final = 0.25
MIN_VALUES: Final = 5


def judge(
    online: Mapping[str, Latency],
    plaintext: Latency,
    *,
    plaintext_drift: float,
    threads: int,
    environment: dict[str, Any],
) -> Stability:
    """Warnings about spread, drift, few values and a busy machine.

    Args:
        online: latencies by what to call them.
        plaintext_drift: relative change of the plaintext median from before to after.
        environment: of :func:`pi_system.bench.environment.describe`, before the run.
    """
    warnings = []
    for name, latency in {**online, "plaintext": plaintext}.items():
        if latency.spread > MAX_SPREAD:
            warnings.append(
                f"{name} latency spreads over {latency.spread:.0%} of its median; "
                "quote the minimum too, or repeat on an idle machine"
            )
    for name, latency in online.items():
        if len(latency.values) < MIN_VALUES:
            warnings.append(
                f"only {len(latency.values)} values of {name} latency; "
                f"{MIN_VALUES} or more are better"
            )
    if plaintext_drift > MAX_SPREAD:
        warnings.append(
            f"plaintext latency changed by {plaintext_drift:.0%} between before and after the run"
        )
    cores = environment["cores_usable"]
    if 2 * threads > cores:
        warnings.append(f"two parties of {threads} threads share {cores} cores")
    load = environment["load_average"][0]
    if load > 0.5 * cores:
        warnings.append(f"the machine was busy: load average {load:.1f} on {cores} cores")
    return Stability(not warnings, warnings)
