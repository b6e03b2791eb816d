"""Sections of a report: what is plotted, and the table beside it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from .charts import Bars, Chart, Line, Lines
from .sources import Comparison, Material, Peer, Run, Student

Cell = str | float | int | None

MIN_IMAGES: Final = 100
"""Fewer labelled images than that are no accuracy worth a point."""
MAX_BARS: Final = 24
OPEN: Final = 2
"""Layer tables that are unfolded on the screen; all are on paper."""


_FIGURE: Final = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        digits: decimals of a number; None for text.
    """

    title: str
    digits: int | None = None


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Part:
    """A table, and a chart of it.

    Attributes:
        folded: shown by its title alone until it is opened.
    """

    key: str
    title: str
    table: Table
    chart: Chart | None = None
    note: str = ""
    folded: bool | None = None


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    text: str
    parts: tuple[Part, ...]


def build(material: Material) -> list[Section]:
    """All sections that the material has something for."""
    found = [
        _warnings(material),
        _accuracy(material),
        _latency(material.runs),
        _bytes(material.runs),
        _layers(material.runs),
        _work(material.runs),
        _peers(material.comparisons),
        _results(material.runs),
        _environment(material),
        _files(material),
    ]
    return [section for section in found if section.parts]


def _table(columns: Iterable[tuple[str, int | None]], rows: Iterable[Sequence[Cell]]) -> Table:
    return Table(tuple(Column(*c) for c in columns), tuple(tuple(row) for row in rows))


def _warnings(material: Material) -> Section:
    kinds: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
    for run in material.runs:
        for warning in run.warnings:
            figures = [float(figure) for figure in _FIGURE.findall(warning)]
            kind = _FIGURE.sub("", warning)
            kinds[kind].append((max(figures, default=0.0), warning, run.file))
    rows: list[tuple[Cell, ...]] = [
        (max(found)[1], len(found), ", ".join(dict.fromkeys(file for *_, file in found)))
        for found in kinds.values()
    ]
    machines = {_machine(run) for run in material.runs}
    if len(machines) > 1:
        text = "unlike machines or versions of the software: their latencies do not compare"
        rows.insert(0, (text, len(material.runs), "see Environment"))
    columns = [("warning, the worst of its kind", None), ("measurements", 0), ("files", None)]
    part = Part("warnings", "", _table(columns, rows))
    return Section(
        "warnings",
        "Warnings",
        "Reasons to distrust a latency. Bytes and round trips do not depend on the machine.",
        (part,) if rows else (),
    )


def _machine(run: Run) -> tuple[tuple[str, str], ...]:
    return tuple((k, v) for k, v in run.environment if k in ("cpu", "cores_usable", "pi_system"))


def _accuracy(material: Material) -> Section:
    recipes: dict[str, list[Student]] = defaultdict(list)
    for student in material.students:
        recipes[student.recipe].append(student)
    parts = [
        _students(f"accuracy-{number}", recipe, students)
        for number, (recipe, students) in enumerate(recipes.items(), 1)
    ]
    labelled = [run for run in material.runs if run.correct is not None and run.images]
    if labelled:
        parts.append(_private_accuracy(labelled))
    return Section(
        "accuracy", "Accuracy against ReLUs",
        "Trained students on the test set: the mean over seeds. The stem's ReLUs are counted.",
        tuple(parts),
    )  # fmt: skip


def _students(key: str, recipe: str, students: Sequence[Student]) -> Part:
    methods: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in students:
        methods[one.method][one.relus].append(100 * one.accuracy)
    rows: list[tuple[Cell, ...]] = [
        (method, relus, fmean(values), min(values), max(values), len(values))
        for method, points in methods.items()
        for relus, values in sorted(points.items())
    ]
    teacher = students[0]
    rows.append(("teacher, all ReLUs", teacher.relus_total, 100 * teacher.teacher, *(None,) * 3))
    columns = [("method", None), ("ReLUs", 0), ("test accuracy %", 2), ("least", 2)]
    columns += [("greatest", 2), ("seeds", 0)]
    counts = [one.relus for one in students]
    chart = Lines(
        f"Test accuracy against ReLUs, {recipe}", "ReLUs kept", "test accuracy, %",
        tuple(
            Line(method, list(points), [fmean(values) for values in points.values()])
            for method, points in methods.items()
        ),
        log_x=min(counts) > 0 and max(counts) > 4 * min(counts),
        levels=(("teacher", 100 * teacher.teacher),),
    )  # fmt: skip
    return Part(key, recipe, _table(columns, rows), chart)


def _private_accuracy(labelled: Sequence[Run]) -> Part:
    once = _unique(labelled, lambda r: (r.model, r.backend, r.relus, r.images, r.correct))
    rows = [
        (
            run.model, run.backend, run.relus, run.images, _percent(run.correct, run.images),
            _percent(run.plaintext_correct, run.images),
        )
        for run in once
    ]  # fmt: skip
    columns = [("model", None), ("backend", None), ("ReLUs", 0), ("images", 0)]
    columns += [("private accuracy %", 2), ("plaintext accuracy %", 2)]
    many = [run for run in once if run.images >= MIN_IMAGES]
    chart = None
    if len({run.relus for run in many}) > 1:
        lines = []
        for backend in dict.fromkeys(run.backend for run in many):
            own = [run for run in many if run.backend == backend]
            accuracies = [100 * (run.correct or 0) / run.images for run in own]
            lines.append(Line(backend, [run.relus for run in own], accuracies, joined=False))
        chart = Lines(
            "Accuracy of private inference against ReLUs", "ReLUs kept", "accuracy, %", tuple(lines)
        )
    note = f"Fewer than {MIN_IMAGES} images say little." if len(many) < len(once) else ""
    title = "Measured by private inference"
    return Part("accuracy-private", title, _table(columns, rows), chart, note)


def _percent(count: int | None, of: int) -> float | None:
    return None if count is None else 100 * count / of


def _grouped(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs that differ in ReLUs, backend and network only."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.architecture, run.setting].append(run)
    return groups


def _series(
    runs: Iterable[Run], name: Callable[[Run], str], value: Callable[[Run], float]
) -> tuple[Line, ...]:
    points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        points[name(run)][run.relus].append(value(run))
    return tuple(
        Line(label, list(at), [fmean(values) for values in at.values()])
        for label, at in points.items()
    )


def _latency(runs: Sequence[Run]) -> Section:
    parts = []
    for number, ((architecture, setting), group) in enumerate(_grouped(runs).items(), 1):
        rows = sorted(
            (
                (run.backend, run.network, run.relus, run.online, run.online_min,
                 run.online / run.plaintext if run.plaintext else None, run.offline)
                for run in group
            ),
            key=lambda row: (row[0], row[1], row[2]),
        )  # fmt: skip
        columns = [("backend", None), ("network", None), ("ReLUs", 0), ("online ms, median", 1)]
        columns += [("min", 1), ("times plaintext", 2), ("offline ms", 0)]
        title = f"{architecture}, {setting}"
        chart = Lines(
            f"Online latency against ReLUs, {title}", "ReLUs kept", "online latency, ms",
            _series(group, lambda r: f"{r.backend}, {r.network}", lambda r: r.online),
            log_y=True,
        )  # fmt: skip
        several = len({run.relus for run in group}) > 1
        parts.append(
            Part(f"latency-{number}", title, _table(columns, rows), chart if several else None)
        )
    return Section(
        "latency",
        "Latency against ReLUs",
        "Online: from holding the image to holding the logits, on the client's clock; medians. "
        "A point measured more than once is the mean of these.",
        tuple(sorted(parts, key=lambda part: part.chart is None)),
    )


def _bytes(runs: Sequence[Run]) -> Section:
    parts = []
    for number, ((architecture, setting), group) in enumerate(_grouped(runs).items(), 1):
        once = sorted(
            _unique(group, lambda r: (r.backend, r.relus)), key=lambda r: (r.backend, r.relus)
        )
        rows = [
            (r.backend, r.relus, r.online_bytes / 1e6, r.relu_bytes / 1e6, r.offline_bytes / 1e6,
             r.round_trips)
            for r in once
        ]  # fmt: skip
        columns = [("backend", None), ("ReLUs", 0), ("online MB", 3), ("of it ReLU", 3)]
        columns += [("offline MB", 2), ("round trips", 0)]
        lines = _series(once, lambda r: f"{r.backend}, online", lambda r: r.online_bytes / 1e6)
        lines += _series(once, lambda r: f"{r.backend}, offline", lambda r: r.offline_bytes / 1e6)
        title = f"{architecture}, {setting}"
        chart = Lines(
            f"Bytes against ReLUs, {title}", "ReLUs kept", "MB of an inference", lines, log_y=True
        )
        several = len({run.relus for run in once}) > 1
        parts.append(
            Part(f"bytes-{number}", title, _table(columns, rows), chart if several else None)
        )
    return Section(
        "bytes",
        "Bytes against ReLUs",
        "Counted on the sockets, framing included, all directions together.",
        tuple(sorted(parts, key=lambda part: part.chart is None)),
    )


def _layers(runs: Sequence[Run]) -> Section:
    parts = []
    whole = [run for run in runs if run.layers]
    once = _unique(whole, lambda r: (r.model, r.backend, r.relus, r.batch))
    for number, run in enumerate(once, 1):
        layers = [layer for layer in run.layers if layer.to_server + layer.to_client]
        rows = [(one.name, one.op, one.to_server / 1e3, one.to_client / 1e3) for one in layers]
        columns = [("layer", None), ("kind", None), ("kB to server", 2), ("kB to client", 2)]
        batch = f", batch {run.batch}" if run.batch > 1 else ""
        title = f"{run.model}, {run.backend}, {run.relus:,} ReLUs{batch}"
        chart = Bars(
            f"Online bytes by layer, {title}", "online kB of an inference",
            tuple(one.name for one in layers),
            (
                ("client to server", tuple(one.to_server / 1e3 for one in layers)),
                ("server to client", tuple(one.to_client / 1e3 for one in layers)),
            ),
        )  # fmt: skip
        folded = number > OPEN
        parts.append(Part(f"layers-{number}", title, _table(columns, rows), chart, folded=folded))
    return Section(
        "layers", "Online bytes by layer", "In the order of execution. The same over any network.",
        tuple(parts),
    )  # fmt: skip


WORK: Final = {"linear": "linear", "gates": "gates", "local": "packing", "wait": "waiting"}


def _work(runs: Sequence[Run]) -> Section:
    networks: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if any(run.work.values()):
            networks[run.network].append(run)
    return Section(
        "work", "Where the time goes",
        "Each party's own clock: linear layers, gates (the DPFs of the ReLUs), packing and other "
        "local work, and waiting. While one works the other waits, so waiting holds the peer's "
        "work and the network.",
        tuple(
            _work_over(f"work-{number}", network, group)
            for number, (network, group) in enumerate(networks.items(), 1)
        ),
    )  # fmt: skip


def _work_over(key: str, network: str, runs: Sequence[Run]) -> Part:
    told = dict.fromkeys(kind for run in runs for spent in run.work.values() for kind in spent)
    kinds = sorted(told, key=lambda kind: kind == "wait")
    bars = [(run, party, spent) for run in runs for party, spent in run.work.items() if spent]
    several = len({run.setting for run in runs}) > 1
    rows = [
        (run.model, run.backend, *((run.setting,) if several else ()), party,
         *(spent.get(kind) for kind in kinds))
        for run, party, spent in bars
    ]  # fmt: skip
    columns: list[tuple[str, int | None]] = [("model", None), ("backend", None)]
    columns += [("setting", None)] if several else []
    columns += [("party", None)]
    columns += [(f"{WORK.get(kind, kind)} ms", 2) for kind in kinds]
    drawn = bars[:MAX_BARS]
    chart = Bars(
        f"Where the time goes, {network}", "ms of an inference",
        tuple(f"{_tail(run)} {party}" for run, party, _ in drawn),
        tuple(
            (WORK.get(kind, kind), tuple(spent.get(kind, 0.0) for _, _, spent in drawn))
            for kind in kinds
        ),
        muted=WORK["wait"],
    )  # fmt: skip
    note = f"The chart has the first {MAX_BARS} bars." if len(bars) > MAX_BARS else ""
    return Part(key, network, _table(columns, rows), chart, note)


def _tail(run: Run) -> str:
    name = run.model.removeprefix("random:")
    budget = "" if "@" in name else f" {run.relus:,}"
    return f"{name}{budget}{f' x{run.batch}' if run.batch > 1 else ''}"


def _peers(comparisons: Sequence[Comparison]) -> Section:
    parts = []
    for number, one in enumerate(comparisons, 1):
        rows: list[tuple[Cell, ...]] = [
            ("plaintext", one.relus, one.plaintext, one.plaintext_min, "1", *(None,) * 6, "")
        ]
        bars = [("plaintext", 1.0)]
        for peer in one.peers:
            rows.append(_peer(peer))
            if "plaintext" in peer.over:
                bars.append((peer.name, peer.over["plaintext"][0]))
        columns: list[tuple[str, int | None]] = [("", None), ("ReLUs", 0), ("online ms, median", 1)]
        columns += [("min", 1), ("times plaintext", None), ("online MB", 3), ("round trips", 0)]
        columns += [("offline ms", 0), ("offline MB", 2), ("agreement %", 1), ("logit error", 4)]
        columns += [("not run, because", None)]
        title = f"{one.model}, {one.network}, {one.rounds} rounds"
        chart = Bars(
            f"Online latency as a multiple of plaintext's, {title}", "times plaintext",
            tuple(name for name, _ in bars), (("times", tuple(v for _, v in bars)),), log=True,
        )  # fmt: skip
        note = " ".join(
            f"{peer.name} over {name}: {m:.3g} times the online latency ({low:.3g} to {high:.3g})."
            for peer in one.peers
            for name, (m, low, high) in peer.over.items()
            if name != "plaintext"
        )
        parts.append(
            Part(
                f"peers-{number}",
                title,
                _table(columns, rows),
                chart if len(bars) > 1 else None,
                note,
            )
        )
    return Section(
        "peers", "Side by side",
        "All in turns on one machine; ratios are of the medians of a round, given as the median "
        "(least to greatest) of the rounds.",
        tuple(parts),
    )  # fmt: skip


def _peer(peer: Peer) -> tuple[Cell, ...]:
    times = peer.over.get("plaintext")
    ratio = None if times is None else f"{times[0]:.3g} ({times[1]:.3g} to {times[2]:.3g})"
    run, whole = peer.run, peer.whole
    if whole is not None:
        return (
            f"{peer.name}, whole inference", whole.relus, whole.median, whole.least, ratio,
            None if whole.bytes is None else whole.bytes / 1e6, None, None, None,
            100 * whole.agreement, whole.max_error, "",
        )  # fmt: skip
    if run is None:
        return (peer.name, *(None,) * 10, peer.not_run)
    return (
        peer.name, run.relus, run.online, run.online_min, ratio, run.online_bytes / 1e6,
        run.round_trips, run.offline, run.offline_bytes / 1e6, 100 * run.agreement,
        run.max_error, "",
    )  # fmt: skip


def _results(runs: Sequence[Run]) -> Section:
    columns: list[tuple[str, int | None]] = [("model", None), ("backend", None), ("network", None)]
    columns += [("measured RTT ms", 2), ("measured Mbit/s", 0), ("setting", None), ("ReLUs", 0)]
    columns += [("online ms, median", 1), ("min", 1), ("plaintext ms", 1)]
    columns += [("online MB", 3), ("round trips", 0)]
    columns += [("offline ms", 0), ("offline MB", 2), ("agreement %", 2), ("of answers", 0)]
    columns += [("logit error", 4), ("file", None)]
    rows = [
        (
            run.model, run.backend, run.network, run.measured_rtt, run.measured_mbps, run.setting,
            run.relus, run.online, run.online_min, run.plaintext, run.online_bytes / 1e6,
            run.round_trips, run.offline, run.offline_bytes / 1e6, 100 * run.agreement, run.answers,
            run.max_error, run.file,
        )
        for run in runs
    ]  # fmt: skip
    part = Part("results", "", _table(columns, rows))
    return Section(
        "results", "All results", "One row for each measurement.", (part,) if rows else ()
    )


def _environment(material: Material) -> Section:
    machines: dict[tuple[tuple[str, str], ...], dict[str, None]] = defaultdict(dict)
    for run in material.runs:
        machines[run.environment][run.file] = None
    keys = list(dict.fromkeys(key for machine in machines for key, _ in machine))
    titles = [f"{number}" for number in range(1, len(machines) + 1)]
    rows: list[tuple[Cell, ...]] = [
        (key, *(dict(machine).get(key) for machine in machines)) for key in keys
    ]
    rows.append(("files", *(", ".join(files) for files in machines.values())))
    part = Part("environment", "", _table([("", None), *((t, None) for t in titles)], rows))
    return Section(
        "environment", "Environment", "The machines and software behind the figures.",
        (part,) if machines else (),
    )  # fmt: skip


def _files(material: Material) -> Section:
    rows = [(one.name, one.kind, one.rows, one.sha256) for one in material.files]
    columns = [("file", None), ("kind", None), ("rows", 0), ("SHA-256", None)]
    return Section(
        "files",
        "Files",
        "What this page was made from.",
        (Part("files", "", _table(columns, rows)),),
    )


def _unique(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[Run]:
    """The first of each."""
    found: dict[Any, Run] = {}
    for run in runs:
        found.setdefault(key(run), run)
    return list(found.values())
