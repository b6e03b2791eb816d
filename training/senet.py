"""SENet from end to end: teacher, sensitivity, budgets, masks, fine-tuning, test accuracy."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pi_system import checkpoint
from pi_system.errors import UsageError
from pi_system.nn import count_relus

from . import allocate, distill, masks, sensitivity, teacher
from .evaluate import record_test
from .loop import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """One trained network. Accuracies are fractions of 1."""

    model: str
    relu_kept: int
    relu_total: int
    validation_accuracy: float | None
    test_accuracy: float | None


def check_budget(run: Run) -> None:
    """Refuse a budget over the network's ReLU count before any training.

    Raises:
        UsageError: the budget is too large.
    """
    total = count_relus(teacher.masked(run, teacher.fresh(run, "teacher"))).total
    if run.recipe.relu_budget > total:
        raise UsageError(
            f"{run.recipe.name}: relu_budget {run.recipe.relu_budget} is over the network's {total}"
        )


def train(run: Run) -> list[Result]:
    """Run the stages that are not finished yet; the test split is read once, at the end.

    Returns:
        The teacher's and the student's figures.
    """
    check_budget(run)
    network = teacher.train(run)
    profile = sensitivity.run_stage(run)
    budgets = allocate.run_stage(run, count_relus(network), profile)
    log.info("layer budgets: %s", " ".join(str(budget) for budget in budgets.values()))
    found = masks.run_stage(run, network, budgets)
    student = distill.run_stage(run, network, found)
    results = []
    for name, model in ((teacher.FOLDER, network), (distill.FOLDER, student)):
        directory = run.directory / name
        test = record_test(directory, run.dataset)
        count = count_relus(model)
        manifest = checkpoint.load(directory)[1]
        results.append(Result(name, count.kept, count.total, manifest.validation_accuracy, test))
    return results
