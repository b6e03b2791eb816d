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
STUDENT_STAGES = ("masks", "finetune")
BUNDLED = Path(__file__).parent / "recipes"


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is one of {', '.join(known)}; got {value!r}")


def _fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must be between 0 and 1, got {value}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive, got {value}")


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
class Allocate:
    """How a budget becomes layer budgets.

    ``rule``: ``senet`` (water-filling by sensitivity), ``uniform`` (the same part of every
    layer), ``whole-layers`` (layers are kept whole or dropped, after DeepReDuce), ``given``
    (``relus``, one number per layer, such as ``pi-train allocate --target-latency`` finds), or
    ``search``: the mask search compares positions of all layers with each other.

    A site whose share is under ``min_relus`` keeps none, under ``senet``, ``uniform`` and
    ``search``.
    """

    rule: str = "senet"
    min_relus: int = 0
    relus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _one_of("rule", self.rule, ("senet", "uniform", "whole-layers", "given", "search"))
        if (self.rule == "given") != bool(self.relus) or any(count < 0 for count in self.relus):
            raise UsageError("relus, none of them negative, goes with the rule given and no other")
        if self.min_relus < 0:
            raise UsageError(f"min_relus must not be negative, got {self.min_relus}")


@dataclass(frozen=True)
class Snl:
    """Relaxed masks under an L1 penalty (SNL, ICML 2022).

    Args:
        l1: the penalty's first weight per gate; it is steered ``updates`` times an epoch so that
            the gates' sum falls to the budget by the end of the search.
        rate: learning rate of the gates as a multiple of that of the weights.
    """

    l1: float = 1e-4
    rate: float = 1.0
    updates: int = 25

    def __post_init__(self) -> None:
        _positive(l1=self.l1, rate=self.rate, updates=self.updates)


@dataclass(frozen=True)
class Taylor:
    """Masks by the squared gradient of the loss with respect to each position's gate.

    Args:
        updates: times an epoch the masks are chosen anew.
        progressive: the budget falls from all ReLUs to the recipe's, cubically, until the last
            ``settle`` of the search; else it is the recipe's from the start.
        memory: part of the old score that stays at each update.
    """

    updates: int = 25
    progressive: bool = True
    settle: float = 0.25
    memory: float = 0.8

    def __post_init__(self) -> None:
        _fractions(settle=self.settle, memory=self.memory)
        _positive(updates=self.updates)


@dataclass(frozen=True)
class Polish:
    """The search keeps ``extra`` ReLUs more, a part of the budget, which then go block by block.

    Args:
        block: ReLUs dropped together.
        tolerance: a block goes if the training accuracy, a fraction of 1, falls by less.
        trials: blocks tried before the best of them goes.
        images: training images that measure the accuracy.
    """

    extra: float = 0.1
    block: int = 100
    tolerance: float = 0.0005
    trials: int = 8
    images: int = 5000

    def __post_init__(self) -> None:
        _positive(extra=self.extra, block=self.block, trials=self.trials, images=self.images)
        _fractions(tolerance=self.tolerance)


@dataclass(frozen=True)
class Masks:
    """Mask search; ``loss = ce * CE + kl * KL``.

    ``method``: ``senet`` (activation mismatch), ``taylor``, ``snl``, or ``random`` positions,
    which take no epochs. The next three settings are those of ``senet``.

    ``start`` of the search: ``random`` masks (the paper), or ``teacher``: the positions that lose
    most when the teacher itself is linearized there, over ``start_images`` training images.

    ``score`` of a position: ``mismatch``, |a_AR - a_PR| (the paper), or ``linearized``, the same
    with a_PR taken as if the position had lost its ReLU. Under ``mismatch`` a kept position
    mismatches less *because* it is kept, so that successive masks exchange the same positions.
    """

    epochs: int
    optimizer: Optimizer
    method: str = "senet"
    granularity: str = "pixel"
    start: str = "random"
    start_images: int = 5120
    score: str = "mismatch"
    ce: float = 0.5
    kl: float = 0.5
    temperature: float = 4.0
    snl: Snl = Snl()
    taylor: Taylor = Taylor()
    polish: Polish | None = None

    def __post_init__(self) -> None:
        if self.polish and (self.granularity == "channel" or self.method == "random"):
            raise UsageError("polish goes with a search for pixels, not channels or random ones")
        _one_of("method", self.method, ("senet", "taylor", "snl", "random"))
        _one_of("granularity", self.granularity, ("pixel", "channel"))
        _one_of("start", self.start, ("random", "teacher"))
        _one_of("score", self.score, ("mismatch", "linearized"))
        if self.granularity == "channel" and self.method not in ("senet", "random"):
            raise UsageError(f"method {self.method} chooses pixels, not channels")
        if self.method == "random":
            if self.epochs:
                raise UsageError(f"random positions take no epochs, got {self.epochs}")
        else:
            _positive(epochs=self.epochs)
        _positive(temperature=self.temperature, start_images=self.start_images)


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
class Widths:
    """SENet++: fine-tuning trains the network at several widths at once.

    ``fractions`` of the channels, ascending, the last 1; each becomes a student of its own.
    """

    fractions: tuple[float, ...]

    def __post_init__(self) -> None:
        given = self.fractions
        if not given or given[-1] != 1 or list(given) != sorted(set(given)) or not given[0] > 0:
            raise UsageError(
                f"fractions must rise from above 0 to 1, such as [0.5, 1.0]; got {list(given)}"
            )


@dataclass(frozen=True)
class Recipe:
    """One training run: network, data, ReLU budget and the four stages.

    Args:
        relu_budget: ReLUs the student may keep, the stem counted (SENet's convention).
        seed: draws the validation split, the teacher and the sensitivities.
        student_seed: draws the masks and the students' batches; ``seed`` where it is not given.
        validation: training images held out; no choice is ever made on the test split.
        padding: reflection padding of the random crop, in pixels.
        threads: CPU threads; 0 leaves the choice to torch. Bit-for-bit repeatable results need
            the same number.
        compile: whether the training steps run through ``torch.compile``.
        widths: of the student, if it shall run at several.
        precision: of the students' training, ``fp32`` or ``bf16`` (autocast, weights in fp32).
            Faster on CPUs with AVX512-BF16, slower on those without.
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
    allocate: Allocate = Allocate()
    widths: Widths | None = None
    student_seed: int | None = None
    width: int | None = None
    padding: int = 4
    flip: bool = True
    threads: int = 0
    compile: bool = True
    precision: str = "fp32"

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("fp32", "bf16"))
        chosen = self.masks.method
        if (self.allocate.rule == "search" and chosen not in ("snl", "taylor")) or (
            chosen == "snl" and self.allocate.rule != "search"
        ):
            raise UsageError(
                f"{self.name}: masks.method {chosen} does not go with allocate.rule "
                f"{self.allocate.rule}; snl needs search, senet and random cannot do it"
            )
        if self.arch not in nn.zoo.DEFAULT_WIDTH:
            known = ", ".join(nn.zoo.DEFAULT_WIDTH)
            raise UsageError(f"{self.name}: unknown architecture {self.arch!r}; known: {known}")
        if self.relu_budget < 0:
            raise UsageError(f"{self.name}: relu_budget must not be negative")
        if min(self.validation, self.padding, self.threads) < 0:
            raise UsageError(f"{self.name}: validation, padding and threads must not be negative")
        _positive(batch=self.batch)
        for fraction in self.fractions:
            self.channels_at(fraction)

    @property
    def channels(self) -> int:
        """The published or chosen width of the first stage."""
        return self.width if self.width is not None else nn.zoo.DEFAULT_WIDTH[self.arch]

    @property
    def fractions(self) -> tuple[float, ...]:
        """The student's widths as fractions of :attr:`channels`."""
        return (1.0,) if self.widths is None else self.widths.fractions

    def channels_at(self, fraction: float) -> int:
        """The width of the first stage at a fraction of the channels.

        Raises:
            UsageError: it is no whole number.
        """
        channels = round(fraction * self.channels)
        if abs(channels - fraction * self.channels) > 1e-9 or channels < 1:
            raise UsageError(
                f"{self.name}: {fraction:g} of {self.channels} channels is no whole number"
            )
        return channels

    def searched(self, total: int) -> int:
        """ReLUs at the end of the mask search, of ``total``; polishing drops those over budget."""
        extra = 0.0 if self.masks.polish is None else self.masks.polish.extra
        return max(self.relu_budget, min(total, int(self.relu_budget * (1 + extra))))

    @property
    def method(self) -> str:
        """What the budget and the positions are chosen by."""
        rule, search = self.allocate.rule, self.masks.method
        search += "" if self.masks.polish is None else "/polish"
        return "senet" if rule == search == "senet" else f"{rule}/{search}"

    def seed_of(self, stage: str) -> int:
        """The seed of a stage's randomness."""
        if stage in STUDENT_STAGES and self.student_seed is not None:
            return self.student_seed
        return self.seed

    def layout(self, stage: str) -> torch.memory_format:
        """The memory format of a stage: channels-last where it is fast and safe.

        On CPU, torch 2.13 corrupts memory in the backward pass of channels-last batch norms of
        fewer than 8 channels.
        """
        fractions = self.fractions if stage == "finetune" else (1.0,)
        eights = all(self.channels_at(fraction) % 8 == 0 for fraction in fractions)
        return torch.channels_last if eights else torch.contiguous_format

    def digest(self, stage: str) -> str:
        """A hash of everything the result of ``stage`` depends on, later stages left out."""
        common = ("dataset", "arch", "width", "seed", "validation", "batch", "padding", "flip")
        document: dict[str, Any] = {name: getattr(self, name) for name in common}
        document |= {"threads": self.threads, "compile": self.compile, "stage": stage}
        for name in STAGES[: STAGES.index(stage) + 1]:
            settings = dataclasses.asdict(getattr(self, name))
            # What is not used leaves no trace, so that older results keep their digest.
            document[name] = {k: v for k, v in settings.items() if v is not None}
        if stage in STUDENT_STAGES:
            for name in ("relu_budget", "student_seed", "precision"):
                document[name] = getattr(self, name)
            document["allocate"] = dataclasses.asdict(self.allocate)
        if stage == "finetune" and self.widths is not None:
            document["widths"] = dataclasses.asdict(self.widths)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def load(name_or_path: str) -> Recipe:
    """Read a recipe: a path to a TOML file or the name of a bundled one.

    A recipe may name another as its ``base``, bundled or a path beside it, and say only what
    differs: tables are merged key by key, but a schedule is replaced whole.

    Raises:
        UsageError: no such recipe, or a key or value that does not fit.
    """
    path = _path(name_or_path, Path())
    return config.from_mapping(_document(path, ()), Recipe, where=str(path))


def bundled() -> tuple[str, ...]:
    """The names of the bundled recipes."""
    return tuple(sorted(path.stem for path in BUNDLED.glob("*.toml")))


def _path(name_or_path: str, folder: Path) -> Path:
    if name_or_path.endswith(".toml"):
        return folder / name_or_path
    path = BUNDLED / f"{name_or_path}.toml"
    if not path.is_file():
        raise UsageError(
            f"no recipe {name_or_path!r}; bundled: {', '.join(bundled())}; "
            "or give the path of a .toml file"
        )
    return path


def _document(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in readers:
        raise UsageError(f"{path} is its own base")
    document = config.read_toml(path)
    base = document.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise UsageError(f"{path}: base: expected the name or path of a recipe, got {base!r}")
    below = _document(_path(base, path.parent), (*readers, path.resolve()))
    return _merged(below, document)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        merge = isinstance(old, dict) and isinstance(value, dict) and key != "schedule"
        result[key] = _merged(old, value) if merge and old else value
    return result
