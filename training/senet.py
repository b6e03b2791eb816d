"""SENet from end to end: teacher, sensitivity, budgets, masks, fine-tuning, test accuracy."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from pi_system import checkpoint
from pi_system.errors import UsageError
from pi_system.nn import ReLUCount, count_relus

from . import allocate, distill, search, sensitivity, teacher
from .evaluate import macs, record_test
from .loop import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """One trained network; ``macs`` are multiply-accumulates. Accuracies are fractions of 1."""

    model: str
    relu_kept: int
    relu_total: int
    macs: int
    validation_accuracy: float | None
    test_accuracy: float | None


def check_budget(run: Run) -> None:
    """Refuse a budget over the network's ReLU count before any training.

    Raises:
        UsageError: the budget is too large.
    """
    total = _counted(run).total
    if run.recipe.relu_budget > total:
        raise UsageError(
            f"{run.recipe.name}: relu_budget {run.recipe.relu_budget} is over the network's {total}"
        )


def measure(run: Run) -> allocate.Rule:
    """Sensitivities and what the recipe's rule makes of the budget; the teacher is not needed."""
    check_budget(run)
    profile = sensitivity.run_stage(run)
    return allocate.run_stage(run, _counted(run), profile)


def shared(run: Run) -> None:
    """Train what all students of a sweep have in common: the teacher and the sensitivities."""
    check_budget(run)
    teacher.train(run)
    sensitivity.run_stage(run)


def find_masks(run: Run) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(teacher, network with the masks found), with all stages before."""
    check_budget(run)
    network = teacher.train(run)
    found = search.run_stage(run, network, measure(run))
    log.info("ReLUs by layer: %s", " ".join(str(n.kept) for n in count_relus(found).layers))
    return network, found


def train(run: Run) -> list[Result]:
    """Run the stages that are not finished yet; the test split is read once, at the end.

    Returns:
        The teacher's and the student's figures, those of the widest student last.
    """
    distill.run_stage(run, *find_masks(run))
    directories = [run.folder("teacher") / teacher.FOLDER, *students(run)]
    for directory in directories:
        with run.writing() as mine:
            if mine:
                record_test(directory, run.dataset)
    return [figures(directory) for directory in directories]


def students(run: Run) -> list[Path]:
    """The checkpoints of the run's students, from the narrowest to the widest."""
    return [run.directory / distill.folder(fraction) for fraction in run.recipe.fractions]


def figures(directory: Path) -> Result:
    """What the checkpoint in ``directory`` says of itself."""
    model, manifest = checkpoint.load(directory)
    count = count_relus(model)
    return Result(
        directory.name,
        count.kept,
        count.total,
        macs(model, manifest.input_shape),
        manifest.validation_accuracy,
        manifest.test_accuracy,
    )


def _counted(run: Run) -> ReLUCount:
    return count_relus(teacher.masked(run, teacher.fresh(run, "teacher")))
