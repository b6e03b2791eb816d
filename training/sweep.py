"""Sweeps: methods x budgets x seeds from one TOML, one small result file for each student."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pi_system import checkpoint, config
from pi_system.checkpoint import write_atomic
from pi_system.errors import IntegrityError, UsageError
from pi_system.nn import count_relus

from . import distill, methods, recipe, senet, teacher
from .loop import Run, stored_rows
from .recipe import Recipe

log = logging.getLogger(__name__)

RESULT_VERSION = 1


@dataclass(frozen=True)
class Sweep:
    """All ``methods`` at each of ``budgets`` (ReLUs, the stem counted) for each of ``seeds``.

    ``recipe`` is bundled or the path of a TOML file; its own method, budget and student's seed
    are not used. ``relus`` has the layer budgets, one row for each of ``budgets``, for the methods
    that have them given.
    """

    recipe: str
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    relus: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("methods", "budgets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UsageError(f"{name} must be a list without repetitions, got {list(values)}")
        sums = tuple(sum(row) for row in self.relus)
        if self.relus and sums != self.budgets:
            raise UsageError(f"the rows of relus add up to {list(sums)}, not to the budgets")


@dataclass(frozen=True)
class Job:
    """One student of a sweep."""

    method: str
    budget: int
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.method}-{self.budget}-s{self.seed}"


def load(path: Path) -> tuple[Job, ...]:
    """The students of a sweep: all methods at one budget and seed before the next.

    Raises:
        UsageError: a key, value, method or recipe that does not fit.
    """
    sweep = config.load_toml(path, Sweep)
    base = recipe.load(sweep.recipe)
    rows = sweep.relus or ((),) * len(sweep.budgets)
    return tuple(
        Job(method, budget, seed, methods.apply(base, method, budget, seed, row))
        for seed in sweep.seeds
        for budget, row in zip(sweep.budgets, rows, strict=True)
        for method in sweep.methods
    )


def run(jobs: tuple[Job, ...], base: Run, results: Path) -> Iterator[dict[str, Any]]:
    """Train the students that have no result yet; yields each one's result.

    Several processes may run the same sweep at once: each takes students that no other trains.

    Args:
        base: students train in folders of ``base.directory``; ``base.shared`` has the teacher
            and the sensitivities, which are trained first if they are not there.
        results: gets one JSON file per student.

    Raises:
        UsageError: a result was made by another recipe.
    """
    todo = [job for job in jobs if stored(job, results) is None]
    log.info("%d of %d students to train", len(todo), len(jobs))
    if todo:
        with _alone(base, "shared", wait=True):
            senet.shared(dataclasses.replace(base, recipe=todo[0].recipe))
    for number, job in enumerate(todo, 1):
        with _alone(base, job.name) as mine:
            if not mine or stored(job, results) is not None:
                continue
            log.info("student %d of %d: %s", number, len(todo), job.name)
            # Each student compiles its own networks; the compiler gives up after a few of them.
            torch.compiler.reset()
            directory = base.directory / job.name
            run = dataclasses.replace(base, directory=directory, recipe=job.recipe)
            senet.train(run)
            document = result(job, run)
            text = json.dumps(document, indent=1) + "\n"
            with run.writing() as first:
                if first:
                    results.mkdir(parents=True, exist_ok=True)
                    write_atomic(results / f"{job.name}.json", text.encode())
        yield document


@contextlib.contextmanager
def _alone(base: Run, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether no other process of the sweep is at ``name``; the lock goes with the process.

    The ranks of one training go through the sweep together and take no lock.
    """
    if base.ranks.size > 1:
        yield True
        return
    base.directory.mkdir(parents=True, exist_ok=True)
    with open(base.directory / f"{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def stored(job: Job, results: Path) -> dict[str, Any] | None:
    """The result of ``job``, if there is one.

    Raises:
        UsageError: another recipe made it.
        IntegrityError: it is corrupt.
    """
    path = results / f"{job.name}.json"
    if not path.exists():
        return None
    try:
        document = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is corrupt: {error}") from error
    if document.get("digest") != job.recipe.digest("finetune"):
        raise UsageError(
            f"{path} was made by a different recipe; use another folder for results or remove it"
        )
    return document


def result(job: Job, run: Run) -> dict[str, Any]:
    """What is kept of a finished student. Accuracies are fractions of 1."""
    model, student = checkpoint.load(run.directory / distill.FOLDER)
    reference = checkpoint.load(run.folder("teacher") / teacher.FOLDER)[1]
    count, rows = count_relus(model), stored_rows(run.directory)
    return {
        "version": RESULT_VERSION,
        "method": job.method,
        "title": methods.METHODS[job.method].title,
        "relu_budget": job.budget,
        "relu_kept": count.kept,
        "relu_total": count.total,
        "seed": job.seed,
        "epochs": {"search": job.recipe.masks.epochs, "finetune": job.recipe.finetune.epochs},
        "validation_accuracy": student.validation_accuracy,
        "test_accuracy": student.test_accuracy,
        "teacher": {
            "validation_accuracy": reference.validation_accuracy,
            "test_accuracy": reference.test_accuracy,
        },
        "recipe": job.recipe.name,
        "dataset": job.recipe.dataset,
        "arch": f"{job.recipe.arch}-w{job.recipe.channels}",
        "digest": job.recipe.digest("finetune"),
        "layers": [{"site": x.name, "total": x.total, "relus": x.kept} for x in count.layers],
        "curve": [asdict(row) for row in rows],
        "seconds": round(sum(row.seconds for row in rows), 1),
        "environment": environment(run.threads),
    }


def environment(threads: int) -> dict[str, Any]:
    """The machine and software that trained, with so many threads (0: torch's choice)."""
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
