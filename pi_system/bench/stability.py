"""Reasons not to trust a figure, said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..net.link import HEADERS, SEGMENT, parse
from .schema import Latency, Network, Stability

MAX_SPREAD: Final = 0.25
MIN_VALUES: Final = 5
MAX_OFF: Final = 0.1
"""Of the round trip and of the rate of an emulated link, as a fraction of what was asked for."""
HANDLING_MS: Final = 0.03
"""What two parties may take to handle an empty message, beyond the link's round trip."""


def judge(
    online: Mapping[str, Latency],
    plaintext: Latency,
    *,
    plaintext_drift: float,
    threads: int,
    environment: dict[str, Any],
    network: Network,
) -> Stability:
    """Warnings about spread, drift, few values, a busy machine and a link not as asked for.

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
    warnings += _link(network)
    return Stability(not warnings, warnings)


def _link(network: Network) -> list[str]:
    """How an emulated link was found to differ from what was asked for."""
    asked = parse(network.name)
    if asked is None or not network.measured:
        return []
    warnings = []
    found = network.measured["rtt_ms"]
    trip = asked.rtt_ms + 2 * 8 * HEADERS / (asked.mbps * 1e3)
    if abs(found - trip) > MAX_OFF * trip + HANDLING_MS:
        warnings.append(f"the emulated round trip was {found:.3g} ms and not {trip:.3g} ms")
    found = network.measured["mbps"]
    rate = asked.mbps * SEGMENT / (SEGMENT + HEADERS)
    if not asked.loss and abs(found - rate) > MAX_OFF * rate:
        warnings.append(
            f"the emulated link carried {found:.3g} Mbit/s of payload and not {rate:.3g}"
        )
    return warnings
