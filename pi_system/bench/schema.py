"""Results, schema version 1, as typed records.

``result.schema.json`` and ``compare.schema.json`` beside this module describe the same as JSON
Schemas. Bytes are counted
on the socket, framing included; offline and online figures are per inference.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Final, Literal, Self

SCHEMA_VERSION: Final = 1


def json_schema(kind: Literal["result", "compare"] = "result") -> dict[str, Any]:
    """The JSON Schema of a result of ``pi-bench run`` or ``pi-bench compare``, complete in
    itself."""
    schema = _read_schema(kind)
    if kind == "compare":
        schema["$defs"]["result"] = _read_schema("result")
    return schema


def _read_schema(kind: str) -> dict[str, Any]:
    file = resources.files(__package__) / f"{kind}.schema.json"
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
        return cls.of_milliseconds([round(1000 * value, 4) for value in seconds])

    @classmethod
    def of_milliseconds(cls, values: list[float]) -> Self:
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
    """``relu_bytes`` is the sum over ReLU layers, both directions.

    ``work_ms`` is where the time of an inference goes, by party and kind of work (waiting is
    one); a backend that does not tell leaves it empty.
    """

    latency_ms: Latency
    bytes: OnlineTraffic
    relu_bytes: int
    round_trips: float
    work_ms: dict[str, dict[str, float]]
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
        retries: inferences that had to be repeated with fresh one-time material.
        stated_error: of a logit, by the backend's plan; ``None`` where it states none.
        beyond_stated: answers with a logit further off than that.
    """

    images: int
    answers: int
    argmax_agreement: float
    max_abs_error: float
    correct: int | None
    plaintext_correct: int | None
    retries: int = 0
    stated_error: float | None = None
    beyond_stated: int = 0


@dataclass(frozen=True)
class FixedPoint:
    """The plan of the fss backend in brief.

    Attributes:
        plan: its name.
        f_x: fractional bits of activations.
        opened_bits, ring_bits: least and largest k and n.
        error: stated for a logit.
        retry_rate: bound on the share of images that need a retry.
    """

    plan: str
    f_x: int
    opened_bits: list[int]
    ring_bits: list[int]
    error: float
    retry_rate: float


@dataclass(frozen=True)
class Stability:
    stable: bool
    warnings: list[str]


@dataclass(frozen=True)
class Prediction:
    """The first answer for one image.

    ``plaintext_margin`` is plaintext's largest logit minus its second: an answer can differ only
    where it is at most twice ``max_abs_error``.
    """

    image: int
    label: str | None
    private: str
    plaintext: str
    equal: bool
    max_abs_error: float
    plaintext_margin: float


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
    fixed_point: FixedPoint | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def slowdown(self) -> float:
        """Online latency over plaintext latency, medians."""
        return self.online.latency_ms.median / self.plaintext.latency_ms.median

    def to_json(self) -> dict[str, Any]:
        """JSON-able data, the version first."""
        data = asdict(self)
        return {"schema_version": data.pop("schema_version"), **data}


@dataclass(frozen=True)
class Whole:
    """An inference of a peer (:mod:`.peers`), whose phases cannot be told apart: from holding the
    image to holding the logits, the making of triples included. ``interface_bytes`` is what the
    loopback interface carried meanwhile, headers included; null where the system does not tell.
    ``settings`` are its version and how it was set, as it says itself.
    """

    latency_ms: Latency
    interface_bytes: float | None
    settings: dict[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One backend on one model in a comparison: its figures over all rounds, or why it has none.

    Attributes:
        name: as asked for, ``fss`` or ``crypten-all``.
        backend: or peer.
        model: which it ran; another one than compared for ``-all``.
        not_run: why it has no figures (which are then null).
        whole: a peer's figures, in place of ``setup``, ``offline`` and ``online``.
        fixed_point: the plan of backend fss.
    """

    name: str
    backend: str
    model: Model
    not_run: str | None
    setup: Setup | None = None
    offline: Offline | None = None
    online: Online | None = None
    accuracy: Accuracy | None = None
    peak_memory_mb: dict[str, float] | None = None
    whole: Whole | None = None
    fixed_point: FixedPoint | None = None

    @property
    def latency_ms(self) -> Latency | None:
        """Online, or of a peer's whole inference."""
        held = self.online or self.whole
        return None if held is None else held.latency_ms


@dataclass(frozen=True)
class Round:
    """Raw milliseconds of one round: plaintext, and by contender; ``online_ms`` has the whole
    inferences of peers."""

    plaintext_ms: list[float]
    online_ms: dict[str, list[float]]
    offline_ms: dict[str, list[float]]


@dataclass(frozen=True)
class Spread:
    """A ratio taken in each round, in ``values``."""

    median: float
    min: float
    max: float
    values: list[float]


@dataclass(frozen=True)
class Ratio:
    """One contender over another, or over plaintext.

    Latencies: of the medians of each round; ``online_latency`` takes a peer's whole inference.
    Bytes and round trips, which do not vary: of the medians of all; ``None`` over plaintext, which
    has none, of a peer, which does not tell, or over nothing.
    """

    contender: str
    over: str
    online_latency: Spread
    offline_latency: Spread | None = None
    online_bytes: float | None = None
    offline_bytes: float | None = None
    round_trips: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Contenders and plaintext in turns on one machine.

    ``model`` is the one compared, and plaintext's.
    """

    environment: dict[str, Any]
    model: Model
    network: Network
    threads_per_party: int
    batch_size: int
    plaintext: Plaintext
    contenders: list[Contender]
    ratios: list[Ratio]
    rounds: list[Round]
    stability: Stability
    schema_version: int = SCHEMA_VERSION

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
