"""Other systems as their authors distribute them, to compare with: one module each.

A peer brings its own processes and transport. So its phases and bytes cannot be told apart as a
backend's are, nor can it be put behind an emulated network: what is measured is the whole
inference, from holding the image to holding the logits, and what the loopback interface carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Place:
    """Where a party of a peer runs.

    Attributes:
        command: what its own command line goes behind, such as ``ip netns exec NAME``.
        address: its end's IPv4 address.
        interface: whose bytes are counted there.
    """

    command: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"


@dataclass(frozen=True)
class PeerRun:
    """What to run.

    Attributes:
        model: folder of an exported model.
        images: (N, C, H, W), normalised float32.
        repeat: inferences; each takes the next ``batch`` images, from the start again at the end.
        warmup: inferences before these that do not count.
        threads: of each party.
        python: of the environment of SecretFlow SPU, if there is one.
        places: of SecretFlow SPU's parties, by role; this machine's loopback for any left out.
    """

    model: Path
    images: npt.NDArray[np.float32]
    batch: int
    repeat: int
    warmup: int
    threads: int
    python: str | None = None
    places: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class PeerReport:
    """What was seen.

    Attributes:
        setup_seconds: from starting the processes to the first inference.
        seconds: of each inference.
        interface_bytes: what the interface carried per inference, headers and other programs'
            traffic included; None where the system does not tell.
        inferences: their ``images`` (indices) and ``logits``, as a client reports them.
        peak_memory: bytes, by role.
        settings: its version and how it was set, as it says itself.
    """

    setup_seconds: float
    seconds: list[float]
    interface_bytes: float | None
    inferences: list[dict[str, Any]]
    peak_memory: dict[str, int]
    settings: dict[str, str | int]

    @classmethod
    def of(cls, reports: Mapping[str, Mapping[str, Any]], client: str) -> Self:
        """What the processes reported, by role; all but the memory is the client's word."""
        said = {one.name: reports[client][one.name] for one in fields(cls)}
        return cls(**said | {"peak_memory": {k: v["peak_memory"] for k, v in reports.items()}})


class Peer(Protocol):
    """A system to compare with."""

    def run(self, run: PeerRun) -> PeerReport:
        """Run one session. No process outlives the call.

        Raises:
            PiError: it is not installed, cannot run this model, or failed.
        """
        ...


NAMES: Final = ("crypten-stock", "spu-semi2k", "spu-cheetah")


def get(name: str) -> Peer:
    """The peer of that name, one of :data:`NAMES`."""
    from .crypten_stock import CrypTenStock
    from .secretflow import SecretFlow

    peers: dict[str, Peer] = {
        "crypten-stock": CrypTenStock(),
        "spu-semi2k": SecretFlow("SEMI2K"),
        "spu-cheetah": SecretFlow("CHEETAH"),
    }
    return peers[name]
