"""The result of a measurement, schema version 1, as typed records.

``result.schema.json`` beside this module describes the same as a JSON Schema. Bytes are counted
on the socket, framing included; offline and online figures are per inference.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Final, Self

SCHEMA_VERSION: Final = 1


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a result."""
    file = resources.files(__package__) / "result.schema.json"
    schema: dict[str, Any] = json.loads(file.read_text())
    return schema


@dataclass(frozen=True)
class Latency:
    """Milliseconds: the raw values and what people ask of them first."""

    median: float
    min: float
    max: float
    values: list[float]

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Self:
        values = [round(1000 * value, 4) for value in seconds]
        return cls(round(statistics.median(values), 4), min(values), max(values), values)

    @property
    def spread(self) -> float:
        """(max - min) / median."""
        return (self.max - self.min) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Traffic:
    """Bytes by direction, dealer included."""

    client_to_server: int = 0
    server_to_client: int = 0
    dealer_to_server: int = 0
    dealer_to_client: int = 0
    server_to_dealer: int = 0
    client_to_dealer: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class OnlineTraffic:
    """Bytes by direction; the dealer has no part in the online phase."""

    client_to_server: int
    server_to_client: int

    @property
    def total(self) -> int:
        return self.client_to_server + self.server_to_client


@dataclass(frozen=True)
class Model:
    """``relu_layers`` counts the layers that keep at least one ReLU."""

    name: str
    dataset: str | None
    relu_total: int
    relu_kept: int
    relu_layers: int
    sha256: str


@dataclass(frozen=True)
class Network:
    """``rtt_ms`` and ``mbps`` are the settings of an emulated link; ``measured`` is what was."""

    name: str
    rtt_ms: float | None
    mbps: float | None
    measured: dict[str, float]


@dataclass(frozen=True)
class Plaintext:
    """Torch float32 on the same images, in the faster of its memory formats."""

    latency_ms: Latency
    memory_format: str
    threads: int


@dataclass(frozen=True)
class Setup:
    seconds: float
    bytes: Traffic


@dataclass(frozen=True)
class Offline:
    """``relu_bytes`` and ``linear_bytes`` are the parts of ``bytes`` that are material of ReLUs
    and shares of linear layers, ``bytes_per_relu`` the former per kept ReLU from dealer to client
    and to server; null where the backend does not mark them.
    """

    latency_ms: Latency
    bytes: Traffic
    relu_bytes: Traffic | None = None
    linear_bytes: Traffic | None = None
    bytes_per_relu: dict[str, float] | None = None


@dataclass(frozen=True)
class Layer:
    """One layer online. ``op`` is "session" for what belongs to no layer.

    ``milliseconds`` are each party's own clock, waiting included, where the backend marks the
    layer; else null.
    """

    name: str
    op: str
    relus_kept: int
    relus_total: int
    bytes: OnlineTraffic
    milliseconds: dict[str, float | None]


@dataclass(frozen=True)
class Online:
    """``relu_bytes`` is the sum over ReLU layers, both directions."""

    latency_ms: Latency
    bytes: OnlineTraffic
    relu_bytes: int
    round_trips: float
    layers: list[Layer]


@dataclass(frozen=True)
class Accuracy:
    """Agreement with plaintext over all answers (an image asked twice counts twice).

    Attributes:
        images: distinct images.
        answers: compared.
        argmax_agreement: fraction of the answers.
        max_abs_error: of a logit.
        correct, plaintext_correct: images whose label was hit, ``None`` without labels.
    """

    images: int
    answers: int
    argmax_agreement: float
    max_abs_error: float
    correct: int | None
    plaintext_correct: int | None


@dataclass(frozen=True)
class Stability:
    stable: bool
    warnings: list[str]


@dataclass(frozen=True)
class Prediction:
    """The first answer for one image."""

    image: int
    label: str | None
    private: str
    plaintext: str
    equal: bool
    max_abs_error: float


@dataclass(frozen=True)
class Result:
    environment: dict[str, Any]
    model: Model
    backend: str
    network: Network
    threads_per_party: int
    batch_size: int
    plaintext: Plaintext
    setup: Setup
    offline: Offline
    online: Online
    accuracy: Accuracy
    peak_memory_mb: dict[str, float]
    stability: Stability
    predictions: list[Prediction]
    schema_version: int = SCHEMA_VERSION

    @property
    def slowdown(self) -> float:
        """Online latency over plaintext latency, medians."""
        return self.online.latency_ms.median / self.plaintext.latency_ms.median

    def to_json(self) -> dict[str, Any]:
        """JSON-able data, the version first."""
        data = asdict(self)
        return {"schema_version": data.pop("schema_version"), **data}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The scalars of a JSON document as one flat record, keys joined by dots; no lists."""
    if not isinstance(value, dict):
        return {} if isinstance(value, list) else {prefix: value}
    record: dict[str, Any] = {}
    for key, item in value.items():
        record |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return record
