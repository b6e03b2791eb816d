"""An audit: run, judged and as a document."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...backends.fss.party import FssBackend
from ...backends.fss.public import Public
from ...backends.fss.transcript import LEARNS
from ...errors import RefusedError, UsageError
from ...graph.ir import Graph
from .. import environment
from . import cut, tally
from .sabotage import SABOTAGES
from .session import Session
from .tally import FIXED, VARIED, Tally

SCHEMA_VERSION: Final = 1
LEVEL: Final = 1e-6
"""Chance that a whole audit of parties without fault finds one."""
LEAST: Final = 8
"""Inferences below which a mask used in every second of them could pass."""
_SMALLEST: Final = 1e-300
"""Where p-values end, for logarithms' sake."""


@dataclass(frozen=True)
class Audit:
    """What to audit.

    Attributes:
        images: (N, C, H, W) with N at least half the inferences: one for the first session, all
            of them in turn for the second.
        inferences: an even number.
    """

    graph: Graph
    images: npt.NDArray[np.float32]
    inferences: int
    backend: str = FssBackend.name
    plan: str = "default"
    batch: int = 1
    threads: int = 1
    sabotage: str | None = None


@dataclass(frozen=True)
class Row:
    """One field of one kind of message of one layer."""

    phase: str
    kind: str
    sender: str
    receiver: str
    layer: str
    field: str
    values: int
    bits: int
    cover: str
    frames: int
    repeats: int
    p: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """The test with the smallest p-value, and that."""
        return min(self.p.items(), key=lambda pair: pair[1], default=("", 1.0))

    @property
    def name(self) -> str:
        layer = f" of {self.layer}" if self.layer else ""
        return f"{self.field} in {self.kind}{layer} ({self.sender} to {self.receiver})"


@dataclass(frozen=True)
class Finding:
    """A check that failed: of which message, by which test."""

    message: str
    test: str
    detail: str

    def __str__(self) -> str:
        return f"{self.message}: {self.test}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """All an audit has to say."""

    model: dict[str, Any]
    backend: str
    plan: str
    batch_size: int
    inferences: int
    retries: int
    sabotage: str | None
    rows: tuple[Row, ...]
    payload: dict[str, int]
    ends_agree: bool
    reuse: dict[str, dict[str, int]]
    clear: dict[str, int]
    tests: int
    threshold: float
    smallest_p: float
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """One object; every p-value to three digits."""
        rows = []
        for row in self.rows:
            document = asdict(row)
            document["p"] = {test: float(f"{p:.3g}") for test, p in row.p.items()}
            rows.append(document)
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment.describe(),
            "model": self.model,
            "backend": self.backend,
            "plan": self.plan,
            "batch_size": self.batch_size,
            "inferences": self.inferences,
            "retries": self.retries,
            "sabotage": self.sabotage,
            "passed": self.passed,
            "findings": [asdict(finding) for finding in self.findings],
            "tests": {
                "count": self.tests,
                "false_alarm": LEVEL,
                "threshold": self.threshold,
                "smallest_p": self.smallest_p,
            },
            "recorded": {"payload_bytes": self.payload, "both_ends_agree": self.ends_agree},
            "reuse": self.reuse,
            "in_clear": self.clear,
            "messages": rows,
            "learns": {role: dict(facts) for role, facts in LEARNS.items()},
            "seconds": round(self.seconds, 2),
        }

    def flat(self) -> list[dict[str, Any]]:
        """One record per field."""
        records = []
        for row in self.rows:
            record = asdict(row)
            del record["p"]
            test, p = row.worst
            records.append({**record, "worst_test": test, "p": p if row.p else ""})
        return records

    def raise_if_failed(self) -> None:
        """As an exit code.

        Raises:
            RefusedError: there are findings; the first one is named.
        """
        if self.findings:
            more = len(self.findings) - 1
            rest = f" (and {more} more)" if more else ""
            raise RefusedError(f"the audit found: {self.findings[0]}{rest}")


def audit(wanted: Audit, *, progress: Callable[[str], None] = lambda text: None) -> Report:
    """Run an audit: two sessions of half the inferences each.

    Raises:
        UsageError: a backend without a described transcript, or too few inferences.
        RefusedError: the messages are not those described.
        PiError: a party failed.
    """
    if wanted.backend != FssBackend.name:
        raise UsageError(
            f"the backend {wanted.backend!r} has no description of its messages to audit by; "
            f"{FssBackend.name} has"
        )
    if wanted.inferences < LEAST or wanted.inferences % 2:
        raise UsageError(f"an audit needs an even number of inferences, at least {LEAST}")
    started = time.perf_counter()
    counts, agree = _run(wanted, progress)
    progress("testing")
    return _judge(wanted, counts, agree, started)


def _run(wanted: Audit, progress: Callable[[str], None]) -> tuple[Tally, bool]:
    sabotage = None if wanted.sabotage is None else SABOTAGES[wanted.sabotage]
    half = wanted.inferences // 2
    counts: Tally | None = None
    agree = True
    for group in (FIXED, VARIED):
        session = Session(
            wanted.graph,
            plan=wanted.plan,
            batch=wanted.batch,
            threads=wanted.threads,
            sabotage=sabotage,
        )
        with session:
            frames = session.setup()
            public = cut.read_public(frames, wanted.batch)
            if counts is None:
                counts = Tally(public)
            counts.next_session()
            secrets = {"weights": tally.weight_needles(public, wanted.graph)}
            counts.begin(secrets)
            counts.add(cut.setup(public, frames), group)
            for run in range(half):
                x = _image(wanted, public, group, run)
                counts.begin({**secrets, "the image": tally.image_needles(public, x)})
                counts.add(cut.offline(public, session.offline()), group)
                counts.add(cut.online(public, session.online(x)), group)
                progress(f"{group * half + run + 1} of {wanted.inferences} inferences")
        agree &= session.ends_agree
    assert counts is not None
    return counts, agree


def _image(wanted: Audit, public: Public, group: int, run: int) -> npt.NDArray[np.float32]:
    first = 0 if group == FIXED else run * wanted.batch
    rows = (first + np.arange(wanted.batch)) % len(wanted.images)
    return wanted.images[rows]


def _judge(wanted: Audit, counts: Tally, agree: bool, started: float) -> Report:
    rows = tuple(_rows(counts))
    p_values = [p for row in rows for p in row.p.values()]
    threshold = LEVEL / max(len(p_values), 1)
    reuse = {
        "seed of b, seed of masks": _reuse(counts.seeds),
        "root and corrections in gates": _reuse(counts.blocks),
        "inference in seed of masks": _reuse(counts.items),
        "inference in image": _reuse(counts.answered),
    }
    findings = [*_repeated(reuse, rows), *_odd(rows, threshold), *_open(counts)]
    unmade = set(counts.answered) - set(counts.items)
    if unmade:
        text = f"{len(unmade)} inferences on material that was not made in their session"
        findings.append(Finding("image", "material", text))
    if not agree:
        text = "a frame did not arrive as it was sent"
        findings.append(Finding("all messages", "both ends", text))
    return Report(
        model={
            "name": str(wanted.graph.metadata.get("name", "unnamed")),
            "relu_kept": wanted.graph.relu_kept,
            "relu_total": wanted.graph.relu_total,
            "sha256": wanted.graph.sha256(),
        },
        backend=wanted.backend,
        plan=wanted.plan,
        batch_size=wanted.batch,
        inferences=wanted.inferences,
        retries=counts.retries,
        sabotage=wanted.sabotage,
        rows=rows,
        payload={" ".join(key): size for key, size in counts.sizes.items()},
        ends_agree=agree,
        reuse=reuse,
        clear={"frames searched": counts.searched, "found": counts.clear.total()},
        tests=len(p_values),
        threshold=threshold,
        smallest_p=min(p_values, default=1.0),
        findings=tuple(findings),
        seconds=time.perf_counter() - started,
    )


def _rows(counts: Tally) -> Iterator[Row]:
    for (phase, message), frames in counts.documents.items():
        names = message.kind, message.sender, message.receiver, message.layer
        yield Row(phase, *names, "document", 0, 0, "", frames, 0)
    for column, seen in counts.fields.items():
        message, described = column.message, column.field
        yield Row(
            phase=column.phase,
            kind=message.kind,
            sender=message.sender,
            receiver=message.receiver,
            layer=message.layer,
            field=described.name,
            values=described.count,
            bits=described.width,
            cover=described.cover,
            frames=seen.frames,
            repeats=seen.repeats,
            p=dict(seen.p_values(described.width)) if described.cover else {},
        )


def _reuse(seen: Mapping[bytes, int]) -> dict[str, int]:
    return {"seen": sum(seen.values()), "different": len(seen)}


def _repeated(reuse: Mapping[str, Mapping[str, int]], rows: tuple[Row, ...]) -> Iterator[Finding]:
    for what, count in reuse.items():
        again = count["seen"] - count["different"]
        if again:
            yield Finding(what, "used twice", f"{again} of {count['seen']} came before")
    for row in rows:
        if row.repeats and row.cover:
            text = f"the whole field came again in {row.repeats} of {row.frames} messages"
            yield Finding(row.name, "used twice", text)


def _odd(rows: tuple[Row, ...], threshold: float) -> Iterator[Finding]:
    """The worst test of every field that fails one, the worst field first."""
    found = []
    for row in rows:
        test, p = row.worst
        if p < threshold:
            found.append((p, Finding(row.name, test, f"p = {p:.1e}, allowed {threshold:.1e}")))
    found.sort(key=lambda pair: math.log(max(pair[0], _SMALLEST)))
    yield from (finding for _, finding in found)


def _open(counts: Tally) -> Iterator[Finding]:
    for (what, phase, message), times in counts.clear.items():
        name = f"{message.kind} ({message.sender} to {message.receiver}, {phase})"
        yield Finding(name, "in the clear", f"{what} was found in {times} messages")
