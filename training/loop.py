"""Epochs: one resumable training loop that every stage shares.

A stage is a function of (recipe, data, stages before it) alone: the randomness of an epoch is
derived from (seed, stage, epoch), the state after each epoch is written atomically, and a run
that was killed at any moment goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from pi_system.checkpoint import write_atomic
from pi_system.errors import IntegrityError, PiError, UsageError

from . import data
from .data import Dataset, Source
from .ranks import Ranks
from .recipe import STAGES, STUDENT_STAGES, Optimizer, Phase, Recipe

log = logging.getLogger(__name__)

STATE_VERSION = 1


@dataclass(frozen=True)
class Row:
    """Metrics of one epoch. Accuracies are fractions of 1; ``hamming`` is that of the masks."""

    stage: str
    epoch: int
    epochs: int
    lr: float
    loss: float
    train_accuracy: float
    validation_accuracy: float | None
    hamming: float | None
    seconds: float


class Reporter:
    """Hears how a run goes on; the base class is silent."""

    def begin(self, stage: str, epochs: int, done: int) -> None:
        """A stage starts, or goes on after ``done`` epochs."""

    def step(self, stage: str, fraction: float, loss: float) -> None:
        """A training step is over; ``fraction`` of the stage is done."""

    def epoch(self, row: Row) -> None:
        """An epoch is over and its state is on disk."""

    def end(self, stage: str) -> None:
        """A stage is over."""


@dataclass(frozen=True)
class Run:
    """A run directory with the recipe and data that fill it.

    Args:
        shared: where the teacher and the sensitivities are, if several runs have the same ones.
        cores: CPU threads in place of the recipe's; 0 leaves those.
    """

    directory: Path
    recipe: Recipe
    dataset: Dataset
    reporter: Reporter = field(default_factory=Reporter)
    shared: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)
    cores: int = 0

    @property
    def threads(self) -> int:
        """CPU threads to train with; 0 leaves the choice to torch."""
        return self.cores or self.recipe.threads

    def folder(self, stage: str) -> Path:
        """The directory that holds what ``stage`` writes."""
        if self.shared is None or stage in STUDENT_STAGES:
            return self.directory
        return self.shared

    def split(self) -> tuple[Source, Source]:
        """(train, validation) images; a function of the recipe's seed."""
        seed = derive_seed(self.recipe.seed, "split", 0)
        return data.split(self.dataset.train, self.recipe.validation, seed)

    def compiled(self, model: nn.Module, *, trained: bool = True) -> Callable[..., Any]:
        """``model`` through ``torch.compile`` where the recipe says so.

        Args:
            trained: its gradients are those of the global batch, over all ranks.
        """
        if trained:
            model = self.ranks.wrap(model)
        return torch.compile(model, dynamic=False) if self.recipe.compile else model

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Whether this rank writes; none goes on before that is done."""
        yield self.ranks.first
        self.ranks.wait()

    def write_json(self, name: str, stage: str, document: dict[str, Any]) -> None:
        """Write ``name``, the output of ``stage``, whole, with the digest of what it is from."""
        document = {"stage": stage, "digest": self.recipe.digest(stage)} | document
        folder = self.folder(stage)
        with self.writing() as mine:
            if mine:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(folder / name, (json.dumps(document, indent=2) + "\n").encode())

    def read_json(self, name: str, stage: str) -> dict[str, Any] | None:
        """Read ``name``, the output of ``stage``, if it is there and of this very recipe.

        Raises:
            UsageError: another recipe wrote it.
            IntegrityError: it is corrupt.
        """
        path = self.folder(stage) / name
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise IntegrityError(f"{path} is corrupt: {error}") from error
        self.check(document.get("digest"), stage, path)
        return dict(document)

    def check(self, digest: object, stage: str, path: Path) -> None:
        """Refuse what another recipe wrote."""
        if digest != self.recipe.digest(stage):
            raise UsageError(
                f"{path} was written by a different recipe; use another run directory or remove it"
            )


def derive_seed(seed: int, stage: str, epoch: int) -> int:
    """A 63-bit seed that depends on all three and nothing else."""
    text = f"{seed}/{stage}/{epoch}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


class Stage:
    """One stage of training; subclasses say what is minimised and what happens in between.

    Args:
        name: one of ``recipe.STAGES``.
        model: its parameters and buffers are trained and are part of the state.
    """

    name: str

    def __init__(self, run: Run, model: nn.Module, phases: tuple[Phase, ...], sgd: Optimizer):
        self.run = run
        self.model = model.to(memory_format=run.recipe.layout(self.name))  # type: ignore[call-overload]
        self.phases = phases
        self.settings = sgd
        self.optimizer = torch.optim.SGD(
            self.groups(),
            lr=sgd.schedule.at(0),
            momentum=sgd.momentum,
            weight_decay=sgd.weight_decay,
            nesterov=sgd.nesterov,
        )
        self.rows: list[Row] = []

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    @property
    def done(self) -> int:
        return len(self.rows)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser; ``scale`` multiplies a group's learning rate."""
        return [{"params": list(self.model.parameters())}]

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, logits) of a batch in the stage's memory format."""
        raise NotImplementedError

    def before_first(self, train: Source) -> None:
        """Called once, before the first epoch; not when a run goes on from a state."""

    def before_step(self) -> None:
        """Called between the gradient and the optimiser's step."""

    def after_step(self, step: int, steps: int, epoch: int) -> None:
        """Called after each optimiser step."""

    def after_epoch(self, epoch: int) -> float | None:
        """Called before the epoch's validation; returns a Hamming distance to log."""
        return None

    def extra(self) -> dict[str, Tensor]:
        """Tensors of the state beyond model and momentum, restored in place."""
        return {}

    def fit(self) -> None:
        """Train until the last epoch, from the state on disk if there is one.

        Raises:
            UsageError: the state is that of another recipe.
            IntegrityError: the state is corrupt.
            PiError: the loss is no longer finite.
        """
        self.restore()
        train, validation = self.run.split()
        batch = self.run.recipe.batch
        if len(train) < batch:
            raise UsageError(f"{len(train)} training images do not fill one batch of {batch}")
        if batch % self.run.ranks.size:
            raise UsageError(f"{self.run.ranks.size} ranks cannot share a batch of {batch}")
        self.run.reporter.begin(self.name, self.epochs, self.done)
        with threads(self.run.threads):
            if not self.done:
                self.before_first(train)
            while self.done < self.epochs:
                row = self._epoch(self.done, train, validation)
                self.rows.append(row)
                self._save()
                self.run.reporter.epoch(row)
        self.run.reporter.end(self.name)
        self.model.eval()

    def _epoch(self, epoch: int, train: Source, validation: Source) -> Row:
        started = time.perf_counter()
        recipe = self.run.recipe
        generator = torch.Generator().manual_seed(
            derive_seed(recipe.seed_of(self.name), self.name, epoch)
        )
        steps = len(train) // recipe.batch
        total_loss, correct, rate = 0.0, 0, 0.0
        layout = recipe.layout(self.name)
        half = recipe.precision == "bf16" and self.name in STUDENT_STAGES
        self.model.train()
        batches = data.batches(
            train,
            size=recipe.batch,
            mean=self.run.dataset.mean,
            std=self.run.dataset.std,
            generator=generator,
            padding=recipe.padding,
            flip=recipe.flip,
            resolution=self._resolution(epoch) or None,
        )
        for step, (images, labels) in enumerate(batches):
            fraction = (epoch + step / steps) / self.epochs
            rate = self.settings.schedule.at(fraction)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
            images, labels = self.run.ranks.part(images), self.run.ranks.part(labels)
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss, logits = self.loss(images.contiguous(memory_format=layout), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            value = loss.item()
            if not math.isfinite(value):
                raise PiError(
                    f"{self.name}: the loss is {value} in epoch {epoch + 1}; lower the rate"
                )
            self.before_step()
            self.optimizer.step()
            self.after_step(step, steps, epoch)
            total_loss += value
            correct += int((logits.argmax(1) == labels).sum())
            self.run.reporter.step(self.name, (epoch + (step + 1) / steps) / self.epochs, value)
        hamming = self.after_epoch(epoch)
        totals = torch.tensor([total_loss / self.run.ranks.size, correct], dtype=torch.float64)
        self.run.ranks.sum([totals])
        measured = None
        if len(validation):
            measured = accuracy(self.model, validation, self.run.dataset)
        return Row(
            stage=self.name,
            epoch=epoch + 1,
            epochs=self.epochs,
            lr=rate,
            loss=float(totals[0]) / steps,
            train_accuracy=float(totals[1]) / (steps * recipe.batch),
            validation_accuracy=measured,
            hamming=hamming,
            seconds=round(time.perf_counter() - started, 2),
        )

    def _resolution(self, epoch: int) -> int:
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase.resolution
            epoch -= phase.epochs
        raise AssertionError("epoch out of range")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        return tensors | {f"extra.{k}": v for k, v in self.extra().items()}

    def _save(self) -> None:
        document = {
            "version": STATE_VERSION,
            "stage": self.name,
            "digest": self.run.recipe.digest(self.name),
            "rows": [asdict(row) for row in self.rows],
        }
        tensors = {k: v.detach().contiguous() for k, v in self._tensors().items()}
        folder = self.run.folder(self.name)
        with self.run.writing() as mine:
            if mine:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(
                    state_path(folder, self.name),
                    dump_tensors(tensors, metadata={"state": json.dumps(document)}),
                )
                write_metrics(folder)

    def restore(self) -> None:
        """Take over the state on disk, if there is one.

        Raises:
            UsageError: it is that of another recipe.
            IntegrityError: it is corrupt.
        """
        path = state_path(self.run.folder(self.name), self.name)
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                document = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rows = [Row(**row) for row in document["rows"]]
            fits = document["version"] == STATE_VERSION and document["stage"] == self.name
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is corrupt: {error}") from error
        if not fits:
            raise IntegrityError(f"{path} is no state of stage {self.name}")
        self.run.check(document.get("digest"), self.name, path)
        for name, parameter in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
        with torch.no_grad():
            targets = self._tensors()
            if targets.keys() != tensors.keys():
                raise IntegrityError(f"{path} does not fit the network")
            for name, target in targets.items():
                target.copy_(tensors[name])
        self.rows = rows


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many CPU threads inside; 0 leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(model: nn.Module, images: Source, dataset: Dataset, batch: int = 250) -> float:
    """The fraction of ``images`` that ``model`` classifies correctly, without augmentation."""
    training = model.training
    model.eval()
    correct = 0
    with torch.no_grad():
        for start in range(0, len(images), batch):
            pixels = images.block(start, min(start + batch, len(images)))
            logits = model(data.normalise(pixels, dataset.mean, dataset.std))
            correct += int((logits.argmax(1) == images.labels[start : start + batch]).sum())
    model.train(training)
    return correct / len(images)


def state_path(directory: Path, stage: str) -> Path:
    """Where the state of ``stage`` lives."""
    return directory / f"{stage}.state.safetensors"


def stored_rows(directory: Path) -> list[Row]:
    """The metrics of all stages so far, in order, from their states."""
    rows: list[Row] = []
    for stage in STAGES:
        path = state_path(directory, stage)
        if path.exists():
            with safe_open(path, framework="pt") as file:
                document = json.loads((file.metadata() or {})["state"])
            rows += [Row(**row) for row in document["rows"]]
    return rows


def write_metrics(directory: Path) -> None:
    """Write ``metrics.jsonl``, one line per epoch, from the states (which are the truth)."""
    text = "".join(json.dumps(asdict(row)) + "\n" for row in stored_rows(directory))
    write_atomic(directory / "metrics.jsonl", text.encode())
