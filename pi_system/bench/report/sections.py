"""Sections of a report: what is plotted, and the table beside it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, median
from typing import Any, Final

from ...errors import UsageError
from ...net.link import PRESETS, parse
from ..table import significant
from .charts import Bars, Chart, Dots, Line, Lines
from .sources import Comparison, Material, Peer, Run, Student

Cell = str | float | int | None

MIN_IMAGES: Final = 100
"""Fewer labelled images than that are no accuracy worth a point."""
MAX_BARS: Final = 24
SOME: Final = 4
"""So many file names are listed where there may be very many."""
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
        _peers(material.comparisons),
        _accuracy(material),
        _latency(material.runs),
        _bytes(material.runs),
        _work(material.runs),
        _layers(material.runs),
        _results(material),
        _warnings(material),
        _environment(material),
        _files(material),
    ]
    return [section for section in found if section.parts]


def _table(columns: Iterable[tuple[str, int | None]], rows: Iterable[Sequence[Cell]]) -> Table:
    return Table(tuple(Column(*c) for c in columns), tuple(tuple(row) for row in rows))


def _warnings(material: Material) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (number, max(found)[1], len(found), _some(file for *_, file in found))
        for number, found in enumerate(_kinds(material).values(), 1)
    ]
    machines = {_machine(run) for run in material.runs}
    if len(machines) > 1:
        text = "unlike machines or versions of the software: their latencies do not compare"
        rows.insert(0, (None, text, len(material.runs), "see Environment"))
    columns = [("no.", 0), ("warning, the worst of its kind", None), ("runs", 0)]
    part = Part("warnings", "", _table([*columns, ("files", None)], rows))
    return Section(
        "warnings",
        "Warnings",
        "Reasons to distrust a latency; bytes and round trips do not depend on the machine. "
        "All results says which measurement has which.",
        (part,) if rows else (),
    )


def _kinds(material: Material) -> dict[str, list[tuple[float, str, str]]]:
    """Figure, text and file of each warning, by what it says without its figures and names."""
    kinds: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
    kind = _kind(material)
    for run in material.runs:
        for warning in run.warnings:
            figures = [float(figure) for figure in _FIGURE.findall(warning)]
            kinds[kind(warning)].append((max(figures, default=0.0), warning, run.file))
    return kinds


def _kind(material: Material) -> Callable[[str], str]:
    contenders = {peer.name for one in material.comparisons for peer in one.peers}
    names = "|".join(re.escape(name) for name in sorted(contenders, key=len, reverse=True))
    whose = re.compile(rf"(?<![\w-])(?:{names or '(?!)'})(?![\w-])\s*(?:whole|online)?|\bonline\b")
    return lambda warning: " ".join(_FIGURE.sub("", whose.sub("", warning)).split())


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    once = list(dict.fromkeys(names))
    more = f" and {len(once) - SOME} more" if len(once) > SOME else ""
    return ", ".join(once[:SOME]) + more


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
    many = [run for run in once if run.images >= MIN_IMAGES]
    rows = [
        (
            run.model, run.backend, run.relus, run.images, _percent(run.correct, run.images),
            _percent(run.plaintext_correct, run.images),
        )
        for run in many or once
    ]  # fmt: skip
    columns = [("model", None), ("backend", None), ("ReLUs", 0), ("images", 0)]
    columns += [("private accuracy %", 2), ("plaintext accuracy %", 2)]
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
    note = ""
    if not many:
        note = f"Fewer than {MIN_IMAGES} images say little."
    elif len(many) < len(once):
        note = f"Measurements of fewer than {MIN_IMAGES} labelled images are left out."
    title = "Measured by private inference"
    return Part("accuracy-private", title, _table(columns, rows), chart, note)


def _percent(count: int | None, of: int) -> float | None:
    return None if count is None else 100 * count / of


def _grouped(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in ReLUs, backend and network only, with a title; the most varied first."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.batch, r.threads)):
        groups[f"{run.architecture}, {run.setting}"].append(run)
    kinds = {
        title: {(run.relus, run.backend, run.network) for run in group}
        for title, group in groups.items()
    }
    return sorted(groups.items(), key=lambda item: -len(kinds[item[0]]))


def _alike(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    groups: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return list(groups.values())


def _far(network: str) -> float:
    """The round trip of a network in ms, for an order; of an unknown one, infinite."""
    try:
        link = parse(network)
    except UsageError:
        return inf
    return 0.0 if link is None else link.rtt_ms


def _series(
    runs: Iterable[Run], name: Callable[[Run], str], value: Callable[[Run], float]
) -> tuple[Line, ...]:
    points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        points[name(run)][run.relus].append(value(run))
    return tuple(
        Line(label, list(at), [median(values) for values in at.values()])
        for label, at in points.items()
    )


def _over_relus(
    key: str,
    runs: Sequence[Run],
    columns: Sequence[tuple[str, int | None]],
    rows: Callable[[Sequence[Run]], list[tuple[Cell, ...]]],
    chart: Callable[[str, Sequence[Run]], Lines],
) -> tuple[Part, ...]:
    """A part with a chart for each group of several budgets, and one table of the others."""
    parts: list[Part] = []
    others: list[tuple[Cell, ...]] = []
    for title, group in _grouped(runs):
        found = rows(group)
        if len({run.relus for run in group}) > 1:
            name = f"{key}-{len(parts) + 1}"
            parts.append(Part(name, title, _table(columns, found), chart(title, group)))
        else:
            of = group[0]
            others += [(of.architecture, of.threads, of.batch, *row) for row in found]
    if others:
        head = [("model", None), ("threads per party", 0), ("batch", 0), *columns]
        title = "Models and settings measured at one budget"
        others.sort(key=lambda row: str(row[0]))
        parts.append(Part(f"{key}-others", title, _table(head, others)))
    return tuple(parts)


def _latency(runs: Sequence[Run]) -> Section:
    def order(run: Run) -> tuple[Any, ...]:
        return run.backend, _far(run.network), run.network, run.relus

    def rows(group: Sequence[Run]) -> list[tuple[Cell, ...]]:
        alike = _alike(sorted(group, key=order), order)
        return [
            (
                same[0].backend, same[0].network, same[0].relus,
                median(run.online for run in same), min(run.online_min for run in same),
                _ratio(same), median(run.offline for run in same), len(same),
            )
            for same in alike
        ]  # fmt: skip

    def chart(title: str, group: Sequence[Run]) -> Lines:
        return Lines(
            f"Online latency against ReLUs, {title}", "ReLUs kept", "online latency, ms",
            _series(
                sorted(group, key=order), lambda r: f"{r.backend}, {r.network}", lambda r: r.online
            ),
            log_y=True,
        )  # fmt: skip

    columns = [("backend", None), ("network", None), ("ReLUs", 0), ("online ms, median", 1)]
    columns += [("min", 1), ("times plaintext", 2), ("offline ms", 0), ("runs", 0)]
    return Section(
        "latency",
        "Latency against ReLUs",
        "Online: from holding the image to holding the logits, on the client's clock. What was "
        f"measured more than once is given as the median of the medians. {_NETWORKS}",
        _over_relus("latency", runs, columns, rows, chart),
    )


_NETWORKS: Final = (
    " ".join(
        f"{name} is {link.rtt_ms:g} ms and {link.mbps:,.0f} Mbit/s;"
        for name, link in PRESETS.items()
    )
    + " other networks are named by round trip in ms and Mbit/s."
)


def _ratio(runs: Sequence[Run]) -> float | None:
    ratios = [run.online / run.plaintext for run in runs if run.plaintext]
    return median(ratios) if ratios else None


def _bytes(runs: Sequence[Run]) -> Section:
    def once(group: Sequence[Run]) -> list[Run]:
        return sorted(
            _unique(group, lambda r: (r.backend, r.relus)), key=lambda r: (r.backend, r.relus)
        )

    def rows(group: Sequence[Run]) -> list[tuple[Cell, ...]]:
        return [
            (r.backend, r.relus, r.online_bytes / 1e6, r.relu_bytes / 1e6, r.offline_bytes / 1e6,
             r.round_trips)
            for r in once(group)
        ]  # fmt: skip

    def chart(title: str, group: Sequence[Run]) -> Lines:
        lines = [
            line
            for backend in dict.fromkeys(run.backend for run in once(group))
            for own in [[run for run in once(group) if run.backend == backend]]
            for line in (
                *_series(own, lambda r: f"{r.backend}, online", lambda r: r.online_bytes / 1e6),
                *_series(own, lambda r: f"{r.backend}, offline", lambda r: r.offline_bytes / 1e6),
            )
        ]
        return Lines(
            f"Bytes against ReLUs, {title}", "ReLUs kept", "MB of an inference", tuple(lines),
            log_y=True,
        )  # fmt: skip

    columns = [("backend", None), ("ReLUs", 0), ("online MB", 3), ("of it ReLU", 3)]
    columns += [("offline MB", 2), ("round trips", 0)]
    return Section(
        "bytes",
        "Bytes against ReLUs",
        "Counted on the sockets, framing included, all directions together; the same over any "
        "network.",
        _over_relus("bytes", runs, columns, rows, chart),
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
    groups = _alike(
        (run for _, group in _grouped(runs) for run in sorted(group, key=lambda r: r.relus)),
        lambda r: (r.architecture, r.relus, r.backend, r.setting),
    )
    bars = [
        (same[0], party, _medians([run.work[party] for run in same if run.work.get(party)]))
        for same in groups
        for party in dict.fromkeys(party for run in same for party in run.work if run.work[party])
    ]
    several = len({run.setting for run in runs}) > 1
    rows = [
        (run.model, run.relus, run.backend, *((run.setting,) if several else ()), party,
         *(spent.get(kind) for kind in kinds))
        for run, party, spent in bars
    ]  # fmt: skip
    columns: list[tuple[str, int | None]] = [("model", None), ("ReLUs", 0), ("backend", None)]
    columns += [("setting", None)] if several else []
    columns += [("party", None)]
    columns += [(f"{WORK.get(kind, kind)} ms", 2) for kind in kinds]
    least = min(run.batch for run, *_ in bars)
    drawn = [bar for bar in bars if bar[0].batch == least][:MAX_BARS]
    chart = Bars(
        f"Where the time goes, {network}", "ms of an inference",
        tuple(f"{_tail(run)} {party}" for run, party, _ in drawn),
        tuple(
            (WORK.get(kind, kind), tuple(spent.get(kind, 0.0) for _, _, spent in drawn))
            for kind in kinds
        ),
        muted=WORK["wait"],
    )  # fmt: skip
    note = f"The chart has {len(drawn)} of {len(bars)} rows." if len(bars) > len(drawn) else ""
    return Part(key, network, _table(columns, rows), chart, note)


def _medians(records: Sequence[dict[str, float]]) -> dict[str, float]:
    kinds = dict.fromkeys(kind for record in records for kind in record)
    return {kind: median(r[kind] for r in records if kind in r) for kind in kinds}


def _tail(run: Run) -> str:
    name = run.model.removeprefix("random:")
    budget = "" if "@" in name else f" {run.relus:,}"
    return f"{name}{budget}{f' x{run.batch}' if run.batch > 1 else ''}"


def _peers(comparisons: Sequence[Comparison]) -> Section:
    order = sorted(comparisons, key=lambda one: -sum(p.not_run is None for p in one.peers))
    return Section(
        "peers", "Side by side",
        "All in turns on one machine; ratios are of the medians of a round, given as the median "
        "(least to greatest) of the rounds. A peer whose phases cannot be told apart is given with "
        "its whole inference, the making of its material included.",
        tuple(_comparison(f"peers-{number}", one) for number, one in enumerate(order, 1)),
    )  # fmt: skip


def _comparison(key: str, one: Comparison) -> Part:
    rows: list[tuple[Cell, ...]] = [
        ("plaintext", one.relus, one.plaintext, one.plaintext_min, "1", *(None,) * 6, ""),
        *(_peer(peer) for peer in one.peers),
    ]
    columns: list[tuple[str, int | None]] = [("", None), ("ReLUs", 0), ("online ms, median", 1)]
    columns += [("min", 1), ("times plaintext", None), ("online MB", 3), ("round trips", 0)]
    columns += [("offline ms", 0), ("offline MB", 2), ("agreement %", 1), ("logit error", 4)]
    if any(peer.not_run is not None for peer in one.peers):
        columns.append(("not run, because", None))
    rows = [row[: len(columns)] for row in rows]
    settings = {peer.run.setting: None for peer in one.peers if peer.run is not None}
    rounds = f"{one.rounds} round{'s' * (one.rounds != 1)}"
    title = ", ".join([one.model, one.network, *settings, rounds])
    ratios = [(peer.name, peer.over["plaintext"]) for peer in one.peers if "plaintext" in peer.over]
    chart = Dots(
        f"Online latency as a multiple of plaintext's, {title}", "times plaintext",
        ("plaintext", *(name for name, _ in ratios)), ((1.0, 1.0, 1.0), *(v for _, v in ratios)),
    )  # fmt: skip
    note = " ".join(
        f"{peer.name} over {name}: {_spread(spread)} times the online latency."
        for peer in one.peers
        for name, spread in peer.over.items()
        if name != "plaintext"
    )
    return Part(key, title, _table(columns, rows), chart if ratios else None, note)


def _spread(spread: tuple[float, float, float]) -> str:
    middle, low, high = (significant(value) for value in spread)
    return middle if low == high else f"{middle} ({low} to {high})"


def _peer(peer: Peer) -> tuple[Cell, ...]:
    times = peer.over.get("plaintext")
    ratio = None if times is None else _spread(times)
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


def _results(material: Material) -> Section:
    kind, numbers = _kind(material), {name: i for i, name in enumerate(_kinds(material), 1)}
    columns: list[tuple[str, int | None]] = [("model", None), ("ReLUs", 0), ("backend", None)]
    columns += [("network", None), ("setting", None), ("online ms, median", 1), ("min", 1)]
    columns += [("plaintext ms", 1), ("online MB", 3), ("round trips", 0)]
    columns += [("offline ms", 0), ("offline MB", 2), ("agreement %", 2), ("of answers", 0)]
    columns += [("logit error", 4), ("measured RTT ms", 2), ("measured Mbit/s", 0)]
    columns += [("warnings", None), ("file", None)]
    rows = [
        (
            run.model, run.relus, run.backend, run.network, run.setting, run.online, run.online_min,
            run.plaintext, run.online_bytes / 1e6, run.round_trips, run.offline,
            run.offline_bytes / 1e6, 100 * run.agreement, run.answers, run.max_error,
            run.measured_rtt, run.measured_mbps,
            ", ".join(f"{n}" for n in sorted({numbers[kind(one)] for one in run.warnings})),
            run.file,
        )
        for run in sorted(
            material.runs,
            key=lambda r: (r.architecture, r.batch, r.relus, r.backend, _far(r.network)),
        )
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
    rows.append(("files", *(_some(files) for files in machines.values())))
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
