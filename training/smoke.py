"""A recipe tried on random images: every stage for a few steps, and what the whole would take."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import data, senet
from .loop import Reporter, Row, Run
from .recipe import STAGES, Phase, Recipe


@dataclass(frozen=True)
class Pace:
    """How fast a stage trains.

    ``hours`` is for the recipe's epochs over its whole data set, known for its own batch only.
    """

    stage: str
    steps: int
    images_per_second: float
    epochs: int
    hours: float | None


class Clock(Reporter):
    """The seconds of each stage's steps, the first of each epoch left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self._before: float | None = None

    def step(self, stage: str, fraction: float, loss: float) -> None:
        now = time.perf_counter()
        if self._before is not None:
            self.seconds[stage].append(now - self._before)
        self._before = now

    def epoch(self, row: Row) -> None:
        self._before = None


def shortened(recipe: Recipe, batch: int) -> Recipe:
    """The recipe with one epoch per stage and phase, and batches of ``batch`` images."""

    def once(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        return tuple(dataclasses.replace(phase, epochs=1) for phase in phases)

    replace = dataclasses.replace
    masks = replace(recipe.masks, epochs=min(1, recipe.masks.epochs), start_images=batch)
    return replace(
        recipe,
        batch=batch,
        validation=batch,
        teacher=replace(recipe.teacher, phases=once(recipe.teacher.phases)),
        sensitivity=replace(recipe.sensitivity, phases=once(recipe.sensitivity.phases)),
        masks=masks,
        finetune=replace(recipe.finetune, epochs=1),
    )


def run(recipe: Recipe, directory: Path, *, steps: int, batch: int | None = None) -> list[Pace]:
    """Train all stages in ``directory`` on random images of the data set's shape.

    Args:
        steps: per epoch, at least 2.
        batch: images per step; ``None`` is the recipe's.
    """
    size = batch or recipe.batch
    dataset = data.synthetic(recipe.dataset, size * (steps + 1), size)
    clock = Clock()
    senet.train(Run(directory, shortened(recipe, size), dataset, clock))
    images = data.KNOWN[recipe.dataset].images - recipe.validation
    epochs = {
        "teacher": sum(phase.epochs for phase in recipe.teacher.phases),
        "sensitivity": sum(phase.epochs for phase in recipe.sensitivity.phases),
        "masks": recipe.masks.epochs,
        "finetune": recipe.finetune.epochs,
    }
    paces = []
    for stage, seconds in clock.seconds.items():
        if seconds:
            rate = size / median(seconds)
            hours = None
            if size == recipe.batch:
                hours = round(epochs[stage] * images / rate / 3600, 1)
            paces.append(Pace(stage, len(seconds), round(rate, 1), epochs[stage], hours))
    return paces
