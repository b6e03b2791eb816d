"""Measurements over models, budgets, backends, batch sizes and threads, from one TOML file.

A scenario is a list of grids::

    [[grid]]
    models = ["random:resnet18", "demo"]
    relus = [0, 49600, "all"]   # budgets of the random models that name none
    backends = ["fss"]
    batch = [1, 4]
    plans = ["default", "high"]     # of backend fss; the others have none
    repeat = 20

Grids are measured in their order: what takes longest goes last. A sweep that was stopped goes on
where it was: rows that the output has are not measured again.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .. import models
from ..backends import DEFAULT, base
from ..backends.fss.plan import PRECISIONS
from ..config import load_toml
from ..errors import PiError, UsageError
from ..graph import serialize
from ..net import link
from ..parties.timeouts import Timeouts
from .measure import Measurement, measure
from .sheet import Key, Sheet

PLANS: Final = tuple(PRECISIONS)
DEFAULT_PLAN: Final = PLANS[0]
WITH_PLANS: Final = "fss"
_MAX_INFERENCES: Final = 100_000


@dataclass(frozen=True)
class Grid:
    """Every combination of its lists is a row.

    Attributes:
        models: as on the command line; ``random:ARCH`` without a budget takes all of ``relus``.
        relus: numbers of ReLUs, or "all".
        plans: the server's precisions, of backends that have them; if none, the one asked for
            with the scenario.
        repeat: inferences timed in a row.
        warmup: inferences before these.
    """

    models: tuple[str, ...]
    relus: tuple[int | str, ...] = ()
    backends: tuple[str, ...] = (DEFAULT,)
    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    networks: tuple[str, ...] = ("loopback",)
    plans: tuple[str, ...] = ()
    repeat: int = 20
    warmup: int = 2


@dataclass(frozen=True)
class Scenario:
    """What a sweep measures."""

    grid: tuple[Grid, ...]


@dataclass(frozen=True)
class Case:
    """One row to be."""

    model: str
    backend: str
    network: str
    batch: int
    threads: int
    repeat: int
    warmup: int
    plan: str = DEFAULT_PLAN

    def key(self, sha256: str) -> Key:
        """What the row is known by.

        Args:
            sha256: of the model.
        """
        return Key(
            sha256, self.backend, self.network, self.threads, self.batch, self.repeat, self.plan
        )

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.backend}, {self.network}, batch {self.batch}, "
            f"{self.threads} thread(s)"
            + (f", plan {self.plan}" if self.plan != DEFAULT_PLAN else "")
        )


@dataclass(frozen=True)
class Outcome:
    """What a sweep did: rows measured now, rows that were there, and what failed."""

    measured: int
    skipped: int
    failures: list[tuple[Case, PiError]] = field(default_factory=list)


def read_scenario(path: Path, plan: str = DEFAULT_PLAN) -> list[Case]:
    """The cases of a scenario, each once, in the order of its grids and model by model in each.

    Args:
        plan: of the grids that name none.

    Raises:
        UsageError: the file is missing or wrong; the message says where.
    """
    grids = load_toml(path, Scenario).grid
    if not grids:
        raise UsageError(f"{path}: there is no [[grid]]")
    cases: dict[Case, None] = {}
    for number, grid in enumerate(grids, start=1):
        cases |= dict.fromkeys(_cases(grid, plan, f"{path}: grid {number}"))
    return list(cases)


def sweep(
    cases: Sequence[Case],
    sheet: Sheet,
    *,
    timeouts: Timeouts | None = None,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Outcome:
    """Measure what ``sheet`` lacks, and add it row by row. A case that fails does not stop the
    others.

    Args:
        progress: told what runs next, how many rows are done and of how many; outside timed
            regions.

    Raises:
        UsageError: a model that does not exist.
    """
    digests = {name: models.resolve(name).sha256() for name in {case.model for case in cases}}
    missing = [case for case in cases if case.key(digests[case.model]) not in sheet.keys]
    skipped = len(cases) - len(missing)
    failures: list[tuple[Case, PiError]] = []
    done = skipped
    for model, group in itertools.groupby(missing, key=lambda case: case.model):
        with tempfile.TemporaryDirectory(prefix="pi-bench-") as folder:
            # The parties read it from there: making a random one takes seconds.
            serialize.save(Path(folder) / "model", models.resolve(model))
            for case in group:
                progress(str(case), done, len(cases))
                try:
                    result = measure(_measurement(case, Path(folder) / "model", timeouts))
                except PiError as error:
                    failures.append((case, error))
                else:
                    sheet.append(result.to_json())
                done += 1
    return Outcome(len(missing) - len(failures), skipped, failures)


def _measurement(case: Case, path: Path, timeouts: Timeouts | None) -> Measurement:
    graph = models.resolve(str(path))
    images, labels = models.images(graph, case.repeat * case.batch)
    return Measurement(
        model=str(path),
        graph=graph,
        backend=case.backend,
        images=images,
        labels=labels,
        batch=case.batch,
        threads=case.threads,
        network=case.network,
        repeat=case.repeat,
        warmup=case.warmup,
        timeouts=timeouts or Timeouts(),
        plan=case.plan,
    )


def _cases(grid: Grid, plan: str, where: str) -> list[Case]:
    _check(grid, where)
    names = [
        name
        for model in grid.models
        for name in (
            [f"{model}@{relus}" for relus in grid.relus] if _takes_budget(model) else [model]
        )
    ]
    return [
        Case(model, backend, network, batch, threads, grid.repeat, grid.warmup, precision)
        for model, backend in itertools.product(names, grid.backends)
        for network, batch, threads, precision in itertools.product(
            grid.networks,
            grid.batch,
            grid.threads,
            (grid.plans or (plan,)) if backend == WITH_PLANS else (DEFAULT_PLAN,),
        )
    ]


def _check(grid: Grid, where: str) -> None:
    for name in ("models", "backends", "batch", "threads", "networks"):
        if not getattr(grid, name):
            raise UsageError(f"{where}: {name} is empty")
    for name in grid.plans:
        if name not in PLANS:
            raise UsageError(f"{where}: plans are {', '.join(PLANS)}, not {name!r}")
    for name in ("batch", "threads"):
        if min(getattr(grid, name)) < 1:
            raise UsageError(f"{where}: {name} must be 1 or more")
    if not 1 <= grid.repeat * max(grid.batch) <= _MAX_INFERENCES or grid.warmup < 0:
        raise UsageError(f"{where}: repeat must be 1 or more, and warmup not negative")
    for relus in grid.relus:
        if relus != "all" and (not isinstance(relus, int) or relus < 0):
            raise UsageError(f'{where}: relus are numbers or "all", not {relus!r}')
    random = [model for model in grid.models if _takes_budget(model)]
    if random and not grid.relus:
        raise UsageError(f"{where}: {random[0]} needs relus, a list of budgets")
    if grid.relus and not random:
        raise UsageError(f"{where}: relus go with a model random:ARCH; there is none")
    try:
        for backend in grid.backends:
            base.check(backend)
        for network in grid.networks:
            link.parse(network)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _takes_budget(model: str) -> bool:
    return model.startswith("random:") and "@" not in model
