"""Recipes: every number of a training run, as frozen dataclasses read from TOML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pi_system import config, nn
from pi_system.errors import UsageError

STAGES = ("teacher", "sensitivity", "masks", "finetune")
BUNDLED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a stage, updated at every step.

    ``kind``: ``constant``; ``one-cycle`` (linear from ``peak * start`` to ``peak`` during the
    first ``warmup`` of the stage, then linear to ``peak * final``); ``cosine`` (from ``peak`` to
    ``peak * final``, after the same warm-up); ``steps`` (times ``decay`` at each of
    ``milestones``, fractions of the stage).
    """

    kind: str
    peak: float
    warmup: float = 0.0
    start: float = 0.1
    final: float = 0.0
    milestones: tuple[float, ...] = ()
    decay: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "one-cycle", "cosine", "steps"):
            raise UsageError(
                f"unknown schedule {self.kind!r}; known: constant, one-cycle, cosine, steps"
            )
        if not self.peak > 0:
            raise UsageError(f"the learning rate must be positive, got {self.peak}")
        _fractions(warmup=self.warmup, start=self.start, final=self.final, decay=self.decay)
        _fractions(**{f"milestones[{i}]": m for i, m in enumerate(self.milestones)})

    def at(self, done: float) -> float:
        """The rate when the fraction ``done`` of the stage, 0 to 1, is over."""
        if self.kind == "constant":
            return self.peak
        if self.kind == "steps":
            return self.peak * self.decay ** sum(done >= m for m in self.milestones)
        if done < self.warmup:
            return self.peak * (self.start + (1 - self.start) * done / self.warmup)
        rest = (done - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 1.0
        if self.kind == "cosine":
            rest = (1 - math.cos(math.pi * rest)) / 2
        return self.peak * (1 + (self.final - 1) * rest)


@dataclass(frozen=True)
class Optimizer:
    """Stochastic gradient descent."""

    schedule: Schedule
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True

    def __post_init__(self) -> None:
        _fractions(momentum=self.momentum)
        if self.weight_decay < 0:
            raise UsageError(f"weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True)
class Phase:
    """``epochs`` epochs on random crops of ``resolution`` pixels; 0 is the images' own size."""

    epochs: int
    resolution: int = 0

    def __post_init__(self) -> None:
        _positive(epochs=self.epochs)
        if self.resolution < 0:
            raise UsageError(f"resolution must not be negative, got {self.resolution}")


@dataclass(frozen=True)
class Teacher:
    """The all-ReLU network. ``phases`` raise the resolution as training goes on."""

    phases: tuple[Phase, ...]
    optimizer: Optimizer
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _fractions(label_smoothing=self.label_smoothing)
        _positive(phases=len(self.phases))


@dataclass(frozen=True)
class Sensitivity:
    """Sparse training at parameter ``density``, pruned and regrown ``updates`` times an epoch.

    ``prune_rate`` is the part of the kept weights pruned and regrown at the first update; it
    falls linearly to zero over the stage.
    """

    phases: tuple[Phase, ...]
    optimizer: Optimizer
    density: float = 0.1
    updates: int = 1
    prune_rate: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _fractions(
            density=self.density,
            prune_rate=self.prune_rate,
            label_smoothing=self.label_smoothing,
        )
        _positive(density=self.density, updates=self.updates, phases=len(self.phases))


@dataclass(frozen=True)
class Masks:
    """Mask search by activation mismatch; ``loss = ce * CE + kl * KL``.

    A site whose share of the budget is under ``min_relus`` keeps none (see ``allocate``).

    ``start`` of the search: ``random`` masks (the paper), or ``teacher``: the positions that lose
    most when the teacher itself is linearized there, over ``start_images`` training images.

    ``score`` of a position: ``mismatch``, |a_AR - a_PR| (the paper), or ``linearized``, the same
    with a_PR taken as if the position had lost its ReLU. Under ``mismatch`` a kept position
    mismatches less *because* it is kept, so that successive masks exchange the same positions.
    """

    epochs: int
    optimizer: Optimizer
    granularity: str = "pixel"
    start: str = "random"
    start_images: int = 5120
    score: str = "mismatch"
    min_relus: int = 0
    ce: float = 0.5
    kl: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if self.granularity not in ("pixel", "channel"):
            raise UsageError(f"granularity is pixel or channel, got {self.granularity!r}")
        if self.start not in ("random", "teacher"):
            raise UsageError(f"start is random or teacher, got {self.start!r}")
        if self.score not in ("mismatch", "linearized"):
            raise UsageError(f"score is mismatch or linearized, got {self.score!r}")
        if self.min_relus < 0:
            raise UsageError(f"min_relus must not be negative, got {self.min_relus}")
        _positive(epochs=self.epochs, temperature=self.temperature, start_images=self.start_images)


@dataclass(frozen=True)
class Finetune:
    """Training with frozen masks; ``loss = ce * CE + kl * KL + pram * PRAM``."""

    epochs: int
    optimizer: Optimizer
    ce: float = 0.1
    kl: float = 0.9
    pram: float = 1000.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        _positive(epochs=self.epochs, temperature=self.temperature)


@dataclass(frozen=True)
class Recipe:
    """One training run: network, data, ReLU budget and the four stages.

    Args:
        relu_budget: ReLUs the student may keep, the stem counted (SENet's convention).
        validation: training images held out; no choice is ever made on the test split.
        padding: reflection padding of the random crop, in pixels.
        threads: CPU threads; 0 leaves the choice to torch. Bit-for-bit repeatable results need
            the same number.
        compile: whether the training steps run through ``torch.compile``.
    """

    name: str
    dataset: str
    arch: str
    relu_budget: int
    seed: int
    validation: int
    batch: int
    teacher: Teacher
    sensitivity: Sensitivity
    masks: Masks
    finetune: Finetune
    width: int | None = None
    padding: int = 4
    flip: bool = True
    threads: int = 0
    compile: bool = True

    def __post_init__(self) -> None:
        if self.arch not in nn.zoo.DEFAULT_WIDTH:
            known = ", ".join(nn.zoo.DEFAULT_WIDTH)
            raise UsageError(f"{self.name}: unknown architecture {self.arch!r}; known: {known}")
        if self.relu_budget < 0:
            raise UsageError(f"{self.name}: relu_budget must not be negative")
        if min(self.validation, self.padding, self.threads) < 0:
            raise UsageError(f"{self.name}: validation, padding and threads must not be negative")
        _positive(batch=self.batch)

    @property
    def channels(self) -> int:
        """The published or chosen width of the first stage."""
        return self.width if self.width is not None else nn.zoo.DEFAULT_WIDTH[self.arch]

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels-last where it is fast and safe.

        On CPU, torch 2.13 corrupts memory in the backward pass of channels-last batch norms of
        fewer than 8 channels.
        """
        return torch.channels_last if self.channels % 8 == 0 else torch.contiguous_format

    def digest(self, stage: str) -> str:
        """A hash of everything the result of ``stage`` depends on, later stages left out."""
        common = ("dataset", "arch", "width", "seed", "validation", "batch", "padding", "flip")
        document: dict[str, Any] = {name: getattr(self, name) for name in common}
        document |= {"threads": self.threads, "compile": self.compile, "stage": stage}
        for name in STAGES[: STAGES.index(stage) + 1]:
            document[name] = dataclasses.asdict(getattr(self, name))
        if STAGES.index(stage) >= STAGES.index("masks"):
            document["relu_budget"] = self.relu_budget
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def load(name_or_path: str) -> Recipe:
    """Read a recipe: a path to a TOML file or the name of a bundled one.

    Raises:
        UsageError: no such recipe, or a key or value that does not fit.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = BUNDLED / f"{name_or_path}.toml"
        if not path.is_file():
            raise UsageError(
                f"no recipe {name_or_path!r}; bundled: {', '.join(bundled())}; "
                "or give the path of a .toml file"
            )
    return config.load_toml(path, Recipe)


def bundled() -> tuple[str, ...]:
    """The names of the bundled recipes."""
    return tuple(sorted(path.stem for path in BUNDLED.glob("*.toml")))


def _fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must be between 0 and 1, got {value}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive, got {value}")
