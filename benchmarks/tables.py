"""Print the tables of ``README.md`` and ``benchmarks/README.md`` from result files, as Markdown.

python benchmarks/tables.py runs benchmarks/results/run-*.json
python benchmarks/tables.py compare benchmarks/results/compare-*.json
python benchmarks/tables.py growth benchmarks/results/sweep-relus.json
python benchmarks/tables.py networks benchmarks/results/sweep-networks.json
python benchmarks/tables.py networks benchmarks/results/sweep-threads.json
python benchmarks/tables.py published benchmarks/published.json
python benchmarks/tables.py network benchmarks/results/network.json
python benchmarks/tables.py pingpong benchmarks/results/pingpong.json
python benchmarks/tables.py predict benchmarks/results/predict.json
python benchmarks/tables.py spu benchmarks/results/spu-network.json
python benchmarks/tables.py aware benchmarks/results/senet-network/*.json \\
    benchmarks/results/senet/senet-7000-*.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi_system.bench import cost
from pi_system.bench.sheet import Sheet
from pi_system.bench.table import over_rounds, significant, span
from pi_system.net import link as links

Row = tuple[str, ...]
NETWORKS = (
    "backend",
    "ReLUs",
    "network",
    "threads",
    "batch",
    "online ms, median (min)",
    "offline ms",
    "online MB",
    "offline MB",
    "round trips",
)
PUBLISHED = (
    "system",
    "parties",
    "network evaluated",
    "link",
    "latency",
    "traffic",
    "hardware",
    "source",
)
NETWORK = (
    "backend",
    "model",
    "network",
    "kernel: RTT ms, Mbit/s",
    "emulated: RTT ms, Mbit/s",
    "kernel: online ms, median (min)",
    "emulated: online ms, median (min)",
    "emulated / kernel",
)
SPU = ("peer", "model", "ReLUs", "network", "ms, median (min)", "MB", "agreement")
PINGPONG = (
    "network",
    "message, bytes",
    "link alone, ms",
    "kernel, ms",
    "emulated, ms",
    "emulated / link",
    "emulated / kernel",
)
PREDICT = (
    "model",
    "network",
    "online ms, predicted",
    "measured, least (median)",
    "error",
    "offline ms, predicted",
    "measured, least (median)",
    "error",
    "bytes",
)
RUNS = (
    "model",
    "backend",
    "ReLUs",
    "online ms, median (min)",
    "offline ms",
    "online MB",
    "of it ReLU",
    "offline MB",
    "round trips",
    "plaintext ms",
    "agreement",
    "max logit error",
)
COMPARE = (
    "model",
    "",
    "ReLUs",
    "online ms, median (min)",
    "x plaintext",
    "online MB",
    "round trips",
    "offline ms",
    "offline MB",
    "agreement",
)
GROWTH = (
    "ReLUs",
    "batch",
    "network",
    "online ms, median (min)",
    "x plaintext",
    "server: linear",
    "gates",
    "local",
    "waiting",
    "online kB",
    "round trips",
    "offline ms",
    "offline MB",
    "B per ReLU to client / server",
)
AWARE = (
    "layer budgets",
    "ReLUs",
    "layers with ReLUs",
    "network",
    "predicted online ms",
    "measured online ms, median (min)",
    "measured / predicted",
    "test accuracy %, mean (each seed's)",
)
WHOLE = "(whole)"
TABLES = (
    "runs",
    "compare",
    "growth",
    "networks",
    "network",
    "pingpong",
    "predict",
    "published",
    "aware",
    "spu",
)
WORK = ("linear", "gates", "local", "wait")
PARTIES = ("client", "server")
NAMES = {
    "fss": "fss",
    "fss-all": "fss, all ReLUs",
    "crypten": "CrypTen",
    "crypten-all": "CrypTen, all ReLUs",
    "crypten-stock": "CrypTen as distributed",
    "crypten-stock-all": "CrypTen as distributed, all ReLUs",
    "spu-semi2k": "SPU, SEMI2K",
    "spu-semi2k-all": "SPU, SEMI2K, all ReLUs",
    "spu-cheetah": "SPU, Cheetah",
    "spu-cheetah-all": "SPU, Cheetah, all ReLUs",
}
PARTIES_OF = {
    "fss": "2, and a dealer offline",
    "crypten": "2, and a dealer offline",
    "crypten-stock": "2, and a dealer online",
    "spu-semi2k": "2, the first trusted to deal",
    "spu-cheetah": "2, no dealer",
}


def run_row(result: Mapping[str, Any]) -> Row:
    """The cells of one result of ``pi-bench run``."""
    online, offline, accuracy = result["online"], result["offline"], result["accuracy"]
    model = result["model"]
    batch = f" x{result['batch_size']}" if result["batch_size"] > 1 else ""
    return (
        f"{model['name']}{batch}",
        result["backend"],
        f"{model['relu_kept']:,}",
        _milliseconds(online["latency_ms"]),
        f"{offline['latency_ms']['median']:,.0f}",
        _megabytes(online),
        f"{online['relu_bytes'] / 1e6:,.2f}",
        _megabytes(offline),
        f"{online['round_trips']:g}",
        f"{result['plaintext']['latency_ms']['median']:,.1f}",
        _agreement(accuracy),
        f"{accuracy['max_abs_error']:.4f}",
    )


def compare_rows(comparison: Mapping[str, Any]) -> list[Row]:
    """Plaintext and every contender of one result of ``pi-bench compare``, the slowest first."""
    model = comparison["model"]
    name, latency = model["name"], comparison["plaintext"]["latency_ms"]
    over = {
        ratio["contender"]: ratio["online_latency"]
        for ratio in comparison["ratios"]
        if ratio["over"] == "plaintext"
    }
    rows = [(name, "plaintext", f"{model['relu_kept']:,}", _milliseconds(latency), "1", *[""] * 5)]
    ran = [one for one in comparison["contenders"] if one["not_run"] is None]
    for one in sorted(ran, key=lambda one: over[one["name"]]["median"], reverse=True):
        online, offline, ratio = one["online"], one["offline"], over[one["name"]]
        whole = one.get("whole")
        head = (
            name,
            NAMES.get(one["name"], one["name"]),
            f"{one['model']['relu_kept']:,}",
            _milliseconds((whole or online)["latency_ms"]) + (f" {WHOLE}" if whole else ""),
            f"{significant(ratio['median'])} ({span(ratio['min'], ratio['max'])})",
        )
        if whole:
            carried = whole["interface_bytes"]
            megabytes = "" if carried is None else f"{carried / 1e6:,.2f} {WHOLE}"
            rows.append((*head, megabytes, "", "", "", _agreement(one["accuracy"])))
            continue
        rows.append(
            (
                *head,
                _megabytes(online),
                f"{online['round_trips']:g}",
                f"{offline['latency_ms']['median']:,.0f}",
                _megabytes(offline),
                _agreement(one["accuracy"]),
            )
        )
    return rows


def compare_notes(comparison: Mapping[str, Any]) -> list[str]:
    """The ratios between contenders, and who could not run."""
    rounds = len(comparison["rounds"])
    notes = []
    for ratio in comparison["ratios"]:
        if ratio["over"] != "plaintext":
            above, below = (NAMES.get(ratio[key], ratio[key]) for key in ("contender", "over"))
            latency = ratio["online_latency"]
            note = (
                f"- {comparison['model']['name']}, {above} over {below}: "
                f"{significant(latency['median'])} times the online latency "
                f"({over_rounds(latency['min'], latency['max'], rounds)})"
            )
            if ratio["online_bytes"] is not None:
                note += f", {significant(ratio['online_bytes'])} times the online bytes"
            notes.append(f"{note}.")
    if any(one.get("whole") for one in comparison["contenders"]):
        notes.append(
            f"- {WHOLE} The whole inference, the making of triples included, as this peer's phases "
            "cannot be told apart; bytes as the loopback interface counted them, headers included."
        )
    notes += [
        f"- {comparison['model']['name']}, {NAMES.get(one['name'], one['name'])} was not run: "
        f"{one['not_run']}."
        for one in comparison["contenders"]
        if one["not_run"] is not None
    ]
    return notes


def growth_row(row: Mapping[str, Any]) -> Row:
    """The cells of one tidy row of ``pi-bench sweep``."""
    online = float(row["online.latency_ms.median"])

    def cell(key: str, digits: int) -> str:
        value = row.get(key)
        return "" if value in (None, "") else f"{float(value):.{digits}f}"

    return (
        f"{int(row['model.relu_kept']):,}",
        str(row["batch_size"]),
        str(row["network.name"]),
        f"{online:,.1f} ({float(row['online.latency_ms.min']):,.1f})",
        f"{online / float(row['plaintext.latency_ms.median']):.3g}",
        *(cell(f"online.work_ms.server.{kind}", 2) for kind in WORK),
        f"{_bytes(row, 'online') / 1e3:,.0f}",
        f"{float(row['online.round_trips']):g}",
        f"{float(row['offline.latency_ms.median']):,.0f}",
        f"{_bytes(row, 'offline') / 1e6:,.2f}",
        " / ".join(cell(f"offline.bytes_per_relu.dealer_to_{to}", 0) for to in PARTIES),
    )


def growth_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Least-squares lines through bytes and latency against ReLUs, and how far the worst row is
    off; nothing unless three rows or more differ in the ReLUs alone."""
    relus = [int(row["model.relu_kept"]) for row in rows]
    others = {tuple(str(row[key]) for key in ("batch_size", "network.name")) for row in rows}
    if len(set(relus)) < 3 or len(others) > 1:
        return []
    figures: list[tuple[str, Callable[[Mapping[str, Any]], float], str]] = [
        ("Online bytes", lambda row: float(_bytes(row, "online")), "B"),
        ("Online latency", lambda row: 1e3 * float(row["online.latency_ms.median"]), "us"),
        ("Offline bytes", lambda row: float(_bytes(row, "offline")), "B"),
    ]
    notes = []
    for name, figure, unit in figures:
        values = np.array([figure(row) for row in rows])
        slope, constant = np.polyfit(relus, values, 1)
        off = np.abs(slope * np.array(relus) + constant - values) / values
        notes.append(
            f"- {name}: {constant:,.0f} {unit} + {slope:.3g} {unit} per ReLU; no row is further "
            f"than {off.max():.0%} from this line."
        )
    return notes


def networks_row(row: Mapping[str, Any]) -> Row:
    """The cells of one tidy row of ``pi-bench sweep``, with what tells settings apart."""
    online = {key: float(row[f"online.latency_ms.{key}"]) for key in ("median", "min")}
    return (
        NAMES.get(str(row["backend"]), str(row["backend"])),
        f"{int(row['model.relu_kept']):,}",
        str(row["network.name"]),
        str(row["threads_per_party"]),
        str(row["batch_size"]),
        _milliseconds(online),
        f"{float(row['offline.latency_ms.median']):,.0f}",
        f"{_bytes(row, 'online') / 1e6:,.2f}",
        f"{_bytes(row, 'offline') / 1e6:,.2f}",
        f"{float(row['online.round_trips']):g}",
    )


def networks_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every combination of what the rows differ in, near networks first; one that none of them has
    is marked."""
    settings: dict[str, Callable[[str], float]] = {
        "backend": lambda name: [*NAMES, name].index(name),
        "model.relu_kept": int,
        "network.name": _round_trip_ms,
        "threads_per_party": int,
        "batch_size": int,
    }
    found: dict[Row, Mapping[str, Any]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[key]) for key in settings), row)
    choices = [
        sorted({setting[place] for setting in found}, key=rank)
        for place, rank in enumerate(settings.values())
    ]
    printed = []
    for setting in itertools.product(*choices):
        if setting in found:
            printed.append(networks_row(found[setting]))
            continue
        backend, relus, *others = setting
        head = (NAMES.get(backend, backend), f"{int(relus):,}", *others, "not measured")
        printed.append((*head, *[""] * (len(NETWORKS) - len(head))))
    return printed


def _round_trip_ms(network: str) -> float:
    link = links.parse(network)
    return link.rtt_ms if link else 0.0


def published_rows(document: Mapping[str, Any], folder: Path) -> list[Row]:
    """What papers say of themselves, and of each other, as their texts have it; below, what was
    measured here, from result files.

    Args:
        folder: that the names of ``ours`` are relative to.
    """
    keys = ("system", "parties", "evaluated", "link", "latency", "traffic", "hardware", "source")
    rows = [tuple(str(one[key]) for key in keys) for one in document["published"]]
    for name in document["ours"]:
        held = json.loads((folder / name).read_text())
        if isinstance(held, list):
            rows += [_ours(name, one, one["backend"], one) for one in held]
        else:
            peers = [one for one in held["contenders"] if one.get("whole")]
            rows += [_ours(name, held, one["name"], one) for one in peers]
    return rows


def _ours(source: str, result: Mapping[str, Any], system: str, measured: Mapping[str, Any]) -> Row:
    """``measured`` is a backend's or peer's part of ``result``."""
    model, environment = measured["model"], result["environment"]
    link, threads = result["network"], result["threads_per_party"]
    if "rtt_ms" in link and link["rtt_ms"] is not None:
        shaped = f"emulated, {link['rtt_ms']:g} ms, {link['mbps']:g} Mbit/s"
    else:
        shaped = "loopback"
    whole = measured.get("whole")
    if whole:
        latency = f"{whole['latency_ms']['median'] / 1e3:.3g} s, the whole"
        carried = whole["interface_bytes"]
        traffic = "" if carried is None else f"{carried / 1e6:.3g} MB, the whole"
    else:
        online, offline = (measured[phase] for phase in ("online", "offline"))
        seconds = [one["latency_ms"]["median"] / 1e3 for one in (online, offline)]
        latency = f"{seconds[0]:.3g} s online, {seconds[1]:.3g} s offline"
        traffic = f"{_megabytes(online)} MB online, {_megabytes(offline)} MB offline"
    return (
        f"measured here: {NAMES.get(system, system)}",
        PARTIES_OF[system.removesuffix("-all")],
        f"{model['name']}, {model['relu_kept']:,} of {model['relu_total']:,} ReLUs",
        shaped,
        latency,
        traffic,
        f"{environment['cpu']}, {environment['cores']} cores for all parties, {threads} thread "
        "per party",
        Path(source).name,
    )


def network_row(row: Mapping[str, Any]) -> Row:
    """The cells of one row of ``network.py``."""
    ends = (row["kernel"], row["emulated"])
    return (
        row["backend"],
        row["model"],
        row["network"],
        *(f"{one['rtt_ms']:.2f}, {one['mbps']:.0f}" for one in ends),
        *(_milliseconds(one["online_ms"]) for one in ends),
        f"{row['emulated_over_kernel']:.3f}",
    )


def spu_row(row: Mapping[str, Any]) -> Row:
    """The cells of one row of ``spu_network.py``."""
    model, accuracy = row["model"], row["accuracy"]
    return (
        NAMES[row["peer"]],
        model["name"],
        f"{model['relu_kept']:,}",
        row["network"],
        f"{_milliseconds(row['latency_ms'])} {WHOLE}",
        f"{row['interface_bytes'] / 1e6:,.2f} {WHOLE}",
        _agreement(accuracy),
    )


def pingpong_row(row: Mapping[str, Any]) -> Row:
    """The cells of one row of ``pingpong.py``."""
    link, kernel, emulated = (row[f"{path}_ms"] for path in ("expected", "kernel", "emulated"))
    return (
        row["network"],
        f"{row['bytes']:,}",
        *(f"{one:,.3f}" for one in (link, kernel, emulated)),
        f"{emulated / link:.3f}",
        f"{emulated / kernel:.3f}",
    )


BY_ROW: Mapping[str, tuple[Row, Callable[[Mapping[str, Any]], Row]]] = {
    "network": (NETWORK, network_row),
    "pingpong": (PINGPONG, pingpong_row),
    "spu": (SPU, spu_row),
}
"""Tables with one line for each of a file's rows."""


def predict_rows(document: Mapping[str, Any]) -> list[Row]:
    """Every check of one result of ``pi-bench predict``."""
    rows = []
    for check in document["checks"]:
        one = check["prediction"]
        cells = [one["model"], one["network"]]
        for phase, digits in (("online", 1), ("offline", 0)):
            cells += [
                f"{one[f'{phase}_ms']:,.{digits}f}",
                f"{check['measured_ms'][phase]:,.{digits}f} "
                f"({check['median_ms'][phase]:,.{digits}f})",
                f"{check['error'][phase]:+.1%}",
            ]
        rows.append((*cells, "exact" if check["exact"] else "other"))
    return rows


def predict_notes(document: Mapping[str, Any]) -> list[str]:
    """How far off the fit is for what it has not seen."""
    fit = document["fit"]
    notes = [
        f"- Fitted to {fit['rows']} measurements on loopback of {', '.join(fit['architectures'])}."
    ]
    for phase in ("online", "offline"):
        kinds = {
            "each measurement left out": fit["left_out"].get(phase),
            "each architecture left out": fit["unseen"].get(phase),
            "the rows above": document.get("held_out", {}).get(phase),
        }
        said = [
            f"{kind} {error['median']:.1%} ({error['largest']:.1%})"
            for kind, error in kinds.items()
            if error
        ]
        notes.append(f"- Error of the {phase} latency, median (largest): {', '.join(said)}.")
    return notes


def aware_rows(students: Sequence[Mapping[str, Any]], folder: Path) -> list[Row]:
    """Accuracy and latency of each budget of a ``pi-train sweep``.

    Args:
        students: results of the sweep.
        folder: results of ``pi-bench run`` on one of each budget's students; the cost is fitted
            to those on loopback of the fewest and of the most ReLUs.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    loopback = [run for run in runs if run["network"]["name"] == "loopback"]
    loopback.sort(key=lambda run: int(run["model"]["relu_kept"]))
    fitted = cost.calibrate([loopback[0], loopback[-1]])
    rows = []
    for run in runs:
        link, kept = links.parse(run["network"]["name"]), run["model"]["relu_kept"]
        if link is None:
            continue
        same = [one for one in students if one["relu_kept"] == kept]
        relus = [layer["relus_kept"] for layer in run["online"]["layers"]]
        predicted, latency = fitted.latency_ms(relus, link), run["online"]["latency_ms"]
        accuracy = [100 * one["test_accuracy"] for one in same]
        each = ", ".join(f"{one:.2f}" for one in accuracy)
        rows.append(
            (
                same[0]["title"],
                f"{kept:,}",
                str(sum(one > 0 for one in relus)),
                run["network"]["name"],
                f"{predicted:,.1f}",
                _milliseconds(latency),
                f"{latency['median'] / predicted:.3f}",
                f"{np.mean(accuracy):.2f} ({each})",
            )
        )
    return sorted(rows, key=lambda row: float(row[4].replace(",", "")))


def markdown(columns: Row, rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """A Markdown table, and notes below it; one that comes again stands once, the last time."""
    once = list(dict.fromkeys(reversed(notes)))[::-1]
    lines = [columns, tuple("---" for _ in columns), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([table, *(["", *once] if once else [])])


def _milliseconds(latency: Mapping[str, float]) -> str:
    return f"{latency['median']:,.1f} ({latency['min']:,.1f})"


def _megabytes(phase: Mapping[str, Any]) -> str:
    return f"{sum(phase['bytes'].values()) / 1e6:,.2f}"


def _agreement(accuracy: Mapping[str, Any]) -> str:
    return f"{accuracy['argmax_agreement']:.1%} of {accuracy['answers']}"


def _bytes(row: Mapping[str, Any], phase: str) -> int:
    return sum(
        int(value)
        for key, value in row.items()
        if key.startswith(f"{phase}.bytes.") and value != ""
    )


def main(arguments: Sequence[str] | None = None) -> str:
    """The table asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    if given.table in ("growth", "networks"):
        rows = [row for path in given.files for row in Sheet(path).tidy_rows()]
        if given.table == "networks":
            return markdown(NETWORKS, networks_rows(rows))
        return markdown(GROWTH, [growth_row(row) for row in rows], growth_notes(rows))
    documents = [json.loads(path.read_text()) for path in given.files]
    if given.table == "compare":
        return markdown(
            COMPARE,
            [row for document in documents for row in compare_rows(document)],
            [note for document in documents for note in compare_notes(document)],
        )
    if given.table == "published":
        pairs = zip(documents, given.files, strict=True)
        return markdown(PUBLISHED, [row for d, p in pairs for row in published_rows(d, p.parent)])
    if given.table in BY_ROW:
        columns, of_row = BY_ROW[given.table]
        return markdown(columns, [of_row(row) for d in documents for row in d["rows"]])
    if given.table == "predict":
        return markdown(
            PREDICT,
            [row for document in documents for row in predict_rows(document)],
            [note for document in documents for note in predict_notes(document)],
        )
    if given.table == "aware":
        return markdown(AWARE, aware_rows(documents, given.files[0].parent / "latency"))
    results = [one for d in documents for one in (d if isinstance(d, list) else [d])]
    return markdown(RUNS, [run_row(result) for result in results])


if __name__ == "__main__":
    print(main())
