"""The limits of a budget, as a TOML file holds them. What is left out is not limited."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...backends.fss.transcript import LEARNS
from ...config import load_toml
from ...errors import UsageError
from ...net import link


@dataclass(frozen=True)
class Relus:
    """Kept ReLUs of an image: together, and by the name of their layer."""

    total: int | None = None
    per_layer: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Online:
    """Bytes of an inference, framing included, and its round trips."""

    bytes: int | None = None
    client_to_server: int | None = None
    server_to_client: int | None = None
    round_trips: int | None = None


@dataclass(frozen=True)
class Offline:
    """Bytes for one inference, framing included."""

    bytes: int | None = None
    client_to_server: int | None = None
    server_to_client: int | None = None
    dealer_to_server: int | None = None
    dealer_to_client: int | None = None
    client_to_dealer: int | None = None


@dataclass(frozen=True)
class Material:
    """Bytes of one-time material for one inference on each side's disk."""

    server: int | None = None
    client: int | None = None


@dataclass(frozen=True)
class Accuracy:
    """By measuring on ``images`` images.

    Attributes:
        private: least fraction of private answers that are right.
        loss: most by which that may be below plaintext's.
        agreement: least fraction of answers that are plaintext's.
        logit_error: largest distance of a logit from plaintext's.
    """

    images: int = 16
    private: float | None = None
    loss: float | None = None
    agreement: float | None = None
    logit_error: float | None = None


@dataclass(frozen=True)
class Reveals:
    """What each party may learn, by name: ``pi-bench budget init`` lists all names.

    Attributes:
        answer_bits: of the logits, all images of a batch together.
        audited: inferences of an audit that must find nothing.
    """

    server: tuple[str, ...] | None = None
    client: tuple[str, ...] | None = None
    dealer: tuple[str, ...] | None = None
    answer_bits: int | None = None
    audited: int | None = None


@dataclass(frozen=True)
class Budget:
    """All limits.

    Attributes:
        plan: the precision they are for.
        batch: images per inference.
        latency_ms: median online latency by network.
    """

    plan: str = "default"
    batch: int = 1
    relus: Relus = field(default_factory=Relus)
    online: Online = field(default_factory=Online)
    offline: Offline = field(default_factory=Offline)
    material: Material = field(default_factory=Material)
    latency_ms: dict[str, float] = field(default_factory=dict)
    accuracy: Accuracy = field(default_factory=Accuracy)
    reveals: Reveals = field(default_factory=Reveals)


def load(path: Path) -> Budget:
    """A budget from its file.

    Raises:
        UsageError: it cannot be read, or a key or value is none; the message names it.
    """
    budget = load_toml(path, Budget)
    for name in budget.latency_ms:
        link.parse(name)
    for role, facts in LEARNS.items():
        unknown = set(getattr(budget.reveals, role) or ()) - set(facts)
        if unknown:
            raise UsageError(
                f"{path}: reveals.{role}: the {role} does not learn {sorted(unknown)[0]!r}; known: "
                f"{', '.join(facts)}"
            )
    if budget.batch < 1 or budget.accuracy.images < 1:
        raise UsageError(f"{path}: batch and accuracy.images must be at least 1")
    audited = budget.reveals.audited
    if audited is not None and (audited < 8 or audited % 2):
        raise UsageError(f"{path}: reveals.audited must be even and at least 8, got {audited}")
    _check_signs(path, "", budget)
    return budget


def to_toml(budget: Budget, comment: str) -> str:
    """The file of a budget; :func:`load` gives the same one.

    Args:
        comment: its first lines.
    """
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"plan = {_value(budget.plan)}", f"batch = {budget.batch}"]
    for section in fields(budget):
        table = getattr(budget, section.name)
        if section.name in ("plan", "batch"):
            continue
        values = table if isinstance(table, Mapping) else _present(table)
        plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
        if plain:
            lines += ["", f"[{section.name}]"]
            lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
        for name, inner in values.items():
            if isinstance(inner, Mapping) and inner:
                lines += ["", f"[{section.name}.{name}]"]
                lines += [f"{_key(key)} = {_value(value)}" for key, value in inner.items()]
    return "\n".join(lines) + "\n"


def _check_signs(path: Path, where: str, record: Any) -> None:
    values = record if isinstance(record, Mapping) else vars(record)
    for name, value in values.items():
        if isinstance(value, int | float) and not value >= 0:
            raise UsageError(f"{path}: {where}{name}: a limit cannot be {value}")
        if hasattr(value, "__dataclass_fields__") or isinstance(value, Mapping):
            _check_signs(path, f"{where}{name}.", value)


def _present(record: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if value is not None}


def _key(name: str) -> str:
    plain = name.replace("_", "").isalnum() and name.isascii()
    return name if plain else json.dumps(name)


def _value(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
