"""What a report is made from: results of ``pi-bench`` and of ``pi-train sweep``, read and checked.

A file may be damaged or come from anywhere, so every figure is checked when it is read, and every
text is made one printable line of bounded length.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ...errors import PiError, UsageError
from ...net.link import PRESETS, parse
from ..schema import SCHEMA_VERSION
from ..sheet import Sheet, tidy

MAX_TEXT: Final = 200
MAX_BYTES: Final = 200 * 2**20
_DIRECTIONS: Final = ("client_to_server", "server_to_client")
_ENVIRONMENT: Final = (
    "cpu", "cores_usable", "memory_mb", "os", "kernel", "python", "packages.torch",
    "packages.crypten", "pi_system", "commit", "kernels.gates", "tcp_congestion_control",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer of one inference, by direction."""

    name: str
    op: str
    to_server: int
    to_client: int


@dataclass(frozen=True)
class Run:
    """One measured row. Times in ms, bytes per inference, directions together.

    Attributes:
        architecture: the model's name without a budget.
        measured_rtt, measured_mbps: the network, as the client found it.
        correct, plaintext_correct: of ``images``, where these have labels.
        work: where the time goes, by party and kind; empty where the backend does not tell.
        layers: empty where the file has none (tidy tables).
    """

    file: str
    model: str
    backend: str
    network: str
    threads: int
    batch: int
    relus: int
    relus_total: int
    online: float
    online_min: float
    plaintext: float
    offline: float
    offline_min: float
    online_bytes: int
    relu_bytes: int
    offline_bytes: int
    round_trips: float
    agreement: float
    answers: int
    max_error: float
    images: int
    correct: int | None
    plaintext_correct: int | None
    measured_rtt: float | None
    measured_mbps: float | None
    work: dict[str, dict[str, float]]
    environment: tuple[tuple[str, str], ...]
    layers: tuple[Layer, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return self.model.partition("@")[0]

    @property
    def setting(self) -> str:
        """What it was measured with, besides the model and the network."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.threads} thread{'s' * (self.threads > 1)} per party{batch}"


@dataclass(frozen=True)
class Whole:
    """A peer whose phases cannot be told apart: milliseconds and bytes of a whole inference."""

    relus: int
    median: float
    least: float
    bytes: float | None
    agreement: float
    max_error: float


@dataclass(frozen=True)
class Peer:
    """A contender of a comparison: its run or whole inferences, or why there are none.

    Attributes:
        over: its online latency over that of another contender (or plaintext): median, least and
            greatest of the rounds.
    """

    name: str
    run: Run | None
    not_run: str | None
    over: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    whole: Whole | None = None


@dataclass(frozen=True)
class Comparison:
    file: str
    model: str
    network: str
    relus: int
    plaintext: float
    plaintext_min: float
    rounds: int
    peers: tuple[Peer, ...]


@dataclass(frozen=True)
class Student:
    """A trained network. Accuracies are fractions of the test set."""

    file: str
    method: str
    recipe: str
    relus: int
    relus_total: int
    seed: int
    accuracy: float
    teacher: float


@dataclass(frozen=True)
class File:
    name: str
    kind: str
    rows: int
    sha256: str


@dataclass
class Material:
    """Everything that the files hold."""

    files: list[File] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    students: list[Student] = field(default_factory=list)


def read(paths: Iterable[Path]) -> Material:
    """Read result files; of a folder, those of its ``.json`` files that are results.

    Raises:
        UsageError: a file that is missing, damaged or no result; the message names it and why.
    """
    material = Material()
    names = _names([*dict.fromkeys(paths)])
    for path, name in names.items():
        if path.is_dir():
            found = sorted(path.glob("*.json"))
            if not found:
                raise UsageError(f"{name}: the folder holds no .json files")
            for one in found:
                _read(one, f"{name}/{clean(one.name)}", material, passing=True)
        else:
            _read(path, name, material, passing=False)
    if not (material.runs or material.comparisons or material.students):
        raise UsageError(f"{', '.join(names.values())}: no results in there")
    return material


def clean(text: object) -> str:
    """One printable line of bounded length."""
    whole = "".join(c if c.isprintable() else " " for c in str(text)[: 2 * MAX_TEXT])
    line = " ".join(whole.split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def _names(paths: list[Path]) -> dict[Path, str]:
    """Short names, none twice."""
    names: dict[Path, str] = {}
    for path in paths:
        parts = path.parts or (str(path),)
        name = next(
            (
                candidate
                for length in range(1, len(parts) + 1)
                if (candidate := clean("/".join(parts[-length:]))) not in names.values()
            ),
            str(path),
        )
        names[path] = name
    return names


def _read(path: Path, name: str, material: Material, *, passing: bool) -> None:
    """Add one file.

    Args:
        passing: leave out what is no result.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{name}: larger than {MAX_BYTES >> 20} MiB, which no result is")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix in (".csv", ".parquet"):
        try:
            rows = Sheet(path).tidy_rows()
        except PiError as error:
            raise UsageError(f"{name}: {error}") from error
        material.runs += [_run(row, name, _row(name, i)) for i, row in enumerate(rows, 1)]
        material.files.append(File(name, "sweep", len(rows), digest))
        return
    try:
        document = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: no JSON ({clean(error)})") from error
    rows = document if isinstance(document, list) else [document]
    kinds = []
    for number, row in enumerate(rows, 1):
        kind = _kind(row)
        where = _row(name, number) if len(rows) > 1 else name
        if kind == "run":
            material.runs.append(_run_of(row, name, where))
        elif kind == "comparison":
            _compare(row, name, where, material)
        elif kind == "student":
            material.students.append(_student(row, name, where))
        elif passing:
            continue
        else:
            raise UsageError(
                f"{where}: no result of pi-bench run, compare or sweep, nor of pi-train sweep"
            )
        kinds.append(kind)
    if kinds:
        kind = "sweep" if len(kinds) > 1 else kinds[0]
        material.files.append(File(name, kind, len(kinds), digest))
    elif not passing:
        raise UsageError(f"{name}: it is empty")


def _row(name: str, number: int) -> str:
    return f"{name}: row {number}"


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no figure")


def _kind(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    if "contenders" in row and "rounds" in row:
        return "comparison"
    if "online" in row and "backend" in row:
        return "run"
    if "method" in row and "test_accuracy" in row:
        return "student"
    return None


@dataclass(frozen=True)
class _Record:
    """The scalars of a document, by dotted keys."""

    values: Mapping[str, Any]
    where: str

    def text(self, key: str) -> str:
        if self.values.get(key) in (None, ""):
            raise UsageError(f"{self.where}: {key} is missing")
        return clean(self.values[key])

    def number(self, key: str) -> float:
        found = self.maybe(key)
        if found is None:
            raise UsageError(f"{self.where}: {key} is missing")
        return found

    def maybe(self, key: str) -> float | None:
        value = self.values.get(key)
        if value in (None, ""):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.where}: {key} is no number: {clean(value)}") from error
        if not math.isfinite(number) or number < 0:
            raise UsageError(f"{self.where}: {key} is {clean(value)}; it must be 0 or more")
        return number

    def count(self, key: str) -> int:
        return int(self.number(key))

    def maybe_count(self, key: str) -> int | None:
        found = self.maybe(key)
        return None if found is None else int(found)

    def total(self, prefix: str) -> int:
        return sum(self.count(key) for key in self.values if key.startswith(f"{prefix}."))


def _run_of(document: dict[str, Any], name: str, where: str) -> Run:
    """A whole result."""
    try:
        flat = tidy(document)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where}: no whole result of pi-bench run") from error
    online, stability = document["online"], document.get("stability", {})
    layers = online.get("layers", []) if isinstance(online, dict) else []
    warnings = stability.get("warnings", []) if isinstance(stability, dict) else []
    if not isinstance(layers, list) or not isinstance(warnings, list):
        raise UsageError(f"{where}: layers and warnings must be lists")
    return _run(flat, name, where, layers, warnings)


def _run(
    flat: Mapping[str, Any],
    name: str,
    where: str,
    layers: Iterable[Any] = (),
    warnings: Iterable[Any] | None = None,
) -> Run:
    record = _Record(flat, where)
    if record.count("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{where}: schema version {flat.get('schema_version')!r}; this is {SCHEMA_VERSION}"
        )
    if warnings is None:
        stable = str(flat.get("stability.stable", "True")) in ("True", "true")
        warnings = () if stable else ("unstable; its JSON would say why",)
    work: dict[str, dict[str, float]] = {}
    for key in flat:
        if key.startswith("online.work_ms.") and (spent := record.maybe(key)) is not None:
            party, _, kind = key.removeprefix("online.work_ms.").partition(".")
            work.setdefault(clean(party), {})[clean(kind)] = spent
    return Run(
        file=name,
        model=record.text("model.name"),
        backend=record.text("backend"),
        network=_network(record.text("network.name")),
        threads=record.count("threads_per_party"),
        batch=record.count("batch_size"),
        relus=record.count("model.relu_kept"),
        relus_total=record.count("model.relu_total"),
        online=record.number("online.latency_ms.median"),
        online_min=record.number("online.latency_ms.min"),
        plaintext=record.number("plaintext.latency_ms.median"),
        offline=record.number("offline.latency_ms.median"),
        offline_min=record.number("offline.latency_ms.min"),
        online_bytes=record.total("online.bytes"),
        relu_bytes=record.count("online.relu_bytes"),
        offline_bytes=record.total("offline.bytes"),
        round_trips=record.number("online.round_trips"),
        agreement=record.number("accuracy.argmax_agreement"),
        answers=record.count("accuracy.answers"),
        max_error=record.number("accuracy.max_abs_error"),
        images=record.count("accuracy.images"),
        correct=record.maybe_count("accuracy.correct"),
        plaintext_correct=record.maybe_count("accuracy.plaintext_correct"),
        measured_rtt=record.maybe("network.measured.rtt_ms"),
        measured_mbps=record.maybe("network.measured.mbps"),
        work=work,
        environment=tuple(
            (key, clean(flat[f"environment.{key}"]))
            for key in _ENVIRONMENT
            if flat.get(f"environment.{key}") not in (None, "")
        ),
        layers=tuple(_layer(layer, where) for layer in layers),
        warnings=tuple(clean(warning) for warning in warnings),
    )


def _network(name: str) -> str:
    """One name for one network: ``lan`` for ``0.3:1000``."""
    try:
        link = parse(name)
    except UsageError:
        return name
    same = (preset for preset, known in PRESETS.items() if link == replace(known, name=name))
    return next(same, name)


def _layer(layer: Any, where: str) -> Layer:
    if not isinstance(layer, dict):
        raise UsageError(f"{where}: a layer is no record")
    record = _Record(_dotted(layer), where)
    return Layer(
        record.text("name"),
        record.text("op"),
        *(record.count(f"bytes.{direction}") for direction in _DIRECTIONS),
    )


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """Like :func:`pi_system.bench.schema.flatten`, for what is not trusted to be a result."""
    if not isinstance(value, dict):
        return {} if isinstance(value, list) else {prefix: value}
    record: dict[str, Any] = {}
    for key, item in value.items():
        record |= _dotted(item, f"{prefix}.{key}" if prefix else str(key))
    return record


def _compare(document: dict[str, Any], name: str, where: str, material: Material) -> None:
    """A comparison; its contenders are runs, too."""
    lists = {key: document.get(key) for key in ("contenders", "ratios", "rounds")}
    if any(not isinstance(value, list) for value in lists.values()):
        raise UsageError(f"{where}: no whole result of pi-bench compare")
    record = _Record(_dotted(document), where)
    over: dict[str, dict[str, tuple[float, float, float]]] = {}
    for ratio in document["ratios"]:
        one = _Record(_dotted(ratio), where)
        spread = [one.number(f"online_latency.{key}") for key in ("median", "min", "max")]
        over.setdefault(one.text("contender"), {})[one.text("over")] = (
            spread[0],
            spread[1],
            spread[2],
        )
    peers = []
    for contender in document["contenders"]:
        if not isinstance(contender, dict):
            raise UsageError(f"{where}: a contender is no record")
        peer = _Record(_dotted(contender), where).text("name")
        if contender.get("not_run") is not None:
            peers.append(Peer(peer, None, clean(contender["not_run"])))
            continue
        if contender.get("whole") is not None:
            found = _whole(_Record(_dotted(contender), f"{where}: {peer}"))
            peers.append(Peer(peer, None, None, over.get(peer, {}), found))
            continue
        warned = any(one.run for one in peers)
        said: dict[str, Any] = {"stability": {}} if warned else {}
        run = _run_of({**document, **contender, **said}, name, f"{where}: {peer}")
        material.runs.append(run)
        peers.append(Peer(peer, run, None, over.get(peer, {})))
    material.comparisons.append(
        Comparison(
            file=name,
            model=record.text("model.name"),
            network=_network(record.text("network.name")),
            relus=record.count("model.relu_kept"),
            plaintext=record.number("plaintext.latency_ms.median"),
            plaintext_min=record.number("plaintext.latency_ms.min"),
            rounds=len(document["rounds"]),
            peers=tuple(peers),
        )
    )


def _whole(record: _Record) -> Whole:
    return Whole(
        relus=record.count("model.relu_kept"),
        median=record.number("whole.latency_ms.median"),
        least=record.number("whole.latency_ms.min"),
        bytes=record.maybe("whole.interface_bytes"),
        agreement=record.number("accuracy.argmax_agreement"),
        max_error=record.number("accuracy.max_abs_error"),
    )


def _student(document: dict[str, Any], name: str, where: str) -> Student:
    record = _Record(_dotted(document), where)
    return Student(
        file=name,
        method=clean(document.get("title") or record.text("method")),
        recipe=record.text("recipe"),
        relus=record.count("relu_kept"),
        relus_total=record.count("relu_total"),
        seed=record.count("seed"),
        accuracy=record.number("test_accuracy"),
        teacher=record.number("teacher.test_accuracy"),
    )
