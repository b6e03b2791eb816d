"""The Markdown tables, from result files."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pi_system.bench.sheet import Sheet
from pi_system.net import link as links

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULT = json.loads((BENCHMARKS / "results" / "run-resnet18-49600-fss.json").read_text())


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "tables.py"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def growing(relus: int, sent: int, milliseconds: float, batch: int = 1) -> dict[str, Any]:
    latency = {"median": milliseconds, "min": milliseconds, "max": milliseconds}
    work = {"server": {"linear": 10.0, "gates": 2.5, "wait": 1.0}, "client": {}}
    return {
        **RESULT,
        "batch_size": batch,
        "model": {**RESULT["model"], "relu_kept": relus, "sha256": f"{relus:064x}"},
        "online": {
            **RESULT["online"],
            "latency_ms": {**latency, "values": [milliseconds] * 20},
            "bytes": {"client_to_server": sent, "server_to_client": 1000},
            "work_ms": work,
        },
    }


def test_runs_are_a_row_each_from_files_of_one_or_of_many(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    many = tmp_path / "many.json"
    many.write_text(json.dumps([RESULT, RESULT]))
    text = tables["main"](["runs", str(BENCHMARKS / "results" / "run-demo-fss.json"), str(many)])
    head, rule, *rows = text.splitlines()
    assert len(rows) == 3 and {len(cells(line)) for line in (head, rule, *rows)} == {12}
    assert cells(rows[0])[:3] == ["demo", "fss", "12,500"]
    assert cells(rows[2])[:3] == ["random:resnet18@49600", "fss", "49,600"]


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_growth_shows_where_the_time_goes_and_the_line_through_it(
    tables: dict[str, Any], tmp_path: Path, suffix: str
) -> None:
    sheet = Sheet(tmp_path / f"sweep{suffix}")
    for relus in (0, 1000, 4000):
        # 2,000 B + 8 B per ReLU, 5 ms + 2 us per ReLU
        sheet.append(growing(relus, 1000 + 8 * relus, 5 + 0.002 * relus))
    text = tables["main"](["growth", str(sheet.path)])
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(cells(line)) for line in (head, rule, *rows)} == {len(tables["GROWTH"])}
    assert cells(rows[2])[0] == "4,000" and cells(rows[2])[3] == "13.0 (13.0)"
    assert cells(rows[2])[5:9] == ["10.00", "2.50", "", "1.00"]
    assert cells(rows[2])[9] == "34"
    notes = [line for line in text.splitlines() if line.startswith("-")]
    assert notes[0] == (
        "- Online bytes: 2,000 B + 8 B per ReLU; no row is further than 0% from this line."
    )
    assert notes[1].startswith("- Online latency: 5,000 us + 2 us per ReLU; no row is further")


def test_batches_have_no_line(tables: dict[str, Any], tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "sweep.json")
    for batch in (1, 2, 4):
        sheet.append(growing(1000, 1000 * batch, batch, batch=batch))
    text = tables["main"](["growth", str(sheet.path)])
    assert [cells(line)[1] for line in text.splitlines()[2:]] == ["1", "2", "4"]


def test_tables_over_networks_and_of_what_was_published(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    sheet = Sheet(tmp_path / "sweep.json")
    sheet.append(growing(1000, 3000, 7.5, batch=4))
    for arguments, columns in (
        (["networks", str(sheet.path)], "NETWORKS"),
        (["published", str(BENCHMARKS / "published.json")], "PUBLISHED"),
        (["network", str(BENCHMARKS / "results" / "network.json")], "NETWORK"),
    ):
        head, rule, *rows = tables["main"](arguments).splitlines()
        assert rows
        assert {len(cells(line)) for line in (head, rule, *rows)} == {len(tables[columns])}
    text = tables["main"](["published", str(BENCHMARKS / "published.json")])
    ours = [cells(line) for line in text.splitlines() if "measured here" in line]
    assert {row[0].removeprefix("measured here: ") for row in ours} >= {
        "fss", "CrypTen", "SPU, SEMI2K", "SPU, Cheetah",
    }  # fmt: skip
    row = cells(tables["main"](["networks", str(sheet.path)]).splitlines()[2])
    assert row[:6] == ["fss", "1,000", "loopback", "1", "4", "7.5 (7.5)"]


def test_cells_that_were_not_measured_are_marked(tables: dict[str, Any], tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "sweep.json")
    for relus, backend, network in (
        (500, "crypten", "80:20"),
        (500, "fss", "loopback"),
        (9000, "fss", "lan"),
    ):
        row = growing(relus, 3000, 7.5) | {"backend": backend}
        sheet.append(row | {"network": row["network"] | {"name": network}})
    text = tables["main"](["networks", str(sheet.path)])
    rows = [cells(line)[:6] for line in text.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        [backend, relus, network]
        for backend in ("fss", "CrypTen")
        for relus in ("500", "9,000")
        for network in ("loopback", "lan", "80:20")
    ]
    measured = {tuple(row[:3]) for row in rows if row[5] != "not measured"}
    assert measured == {
        ("fss", "500", "loopback"), ("fss", "9,000", "lan"), ("CrypTen", "500", "80:20"),
    }  # fmt: skip


def test_predictions_stand_beside_measurements(tables: dict[str, Any]) -> None:
    text = tables["main"](["predict", str(BENCHMARKS / "results" / "predict.json")])
    rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(tables["PREDICT"])}
    assert {row[-1] for row in rows[2:]} == {"exact"}
    # Over wide-area networks little of a latency is fitted.
    wide = [row for row in rows[2:] if row[1] in ("wan", "80:20")]
    assert wide and all(abs(float(row[4].strip("%"))) < 10 for row in wide)


def test_network_aware_budgets_beside_their_prediction(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    def run(relus: list[int], network: str, milliseconds: float) -> dict[str, Any]:
        one = growing(sum(relus), 10 * sum(relus), milliseconds)
        layers = [{**RESULT["online"]["layers"][0], "relus_kept": kept} for kept in relus]
        one["online"] |= {"layers": layers, "round_trips": sum(k > 0 for k in relus) + 1}
        measured = {"rtt_ms": 40.0, "mbps": 100.0}
        return one | {
            "network": {"name": network, "rtt_ms": 40.0, "mbps": 100.0, "measured": measured}
        }

    few, all_of_them = [0, 1000], [9000, 1000]
    (tmp_path / "latency").mkdir()
    for name, one in {
        "a": run(few, "loopback", 3.0),
        "b": run(all_of_them, "loopback", 12.0),
        "c": run(few, "wan", 95.0),
    }.items():
        (tmp_path / "latency" / f"{name}.json").write_text(json.dumps(one))
    for seed, accuracy in enumerate((0.5, 0.6)):
        student = {"title": "SENet", "relu_kept": 1000, "test_accuracy": accuracy}
        (tmp_path / f"s{seed}.json").write_text(json.dumps(student))
    files = sorted(str(path) for path in tmp_path.glob("*.json"))
    (row,) = tables["main"](["aware", *files]).splitlines()[2:]
    # 2 ms and 1 us a ReLU, two round trips of 40 ms, 11 kB and their headers at 100 Mbit/s.
    seconds = 11_000 * 8 * (1 + links.HEADERS / links.SEGMENT) / 100e6
    assert cells(row) == [
        "SENet", "1,000", "1", "wan", f"{3 + 80 + 1e3 * seconds:.1f}", "95.0 (95.0)",
        f"{95 / (83 + 1e3 * seconds):.3f}", "55.00 (50.00, 60.00)",
    ]  # fmt: skip


def test_the_pages_show_what_the_result_files_have() -> None:
    """Every table of README.md and benchmarks/README.md, to the letter."""
    command = [sys.executable, str(BENCHMARKS / "pages.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (BENCHMARKS.parent / "README.md", BENCHMARKS / "README.md"):
        assert "<!-- table: compare" in page.read_text()


def test_a_page_that_differs_is_found_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pages = importlib.import_module("pages")
    held = (
        "before\n<!-- table: published benchmarks/published.json -->\nold\n<!-- end of table -->\n"
    )
    found = pages.rendered(held)
    assert found.startswith("before\n<!-- table:") and found.endswith("<!-- end of table -->\n")
    assert "old" not in found.split() and "| Delphi |" in found
    assert pages.rendered(found) == found
    (tmp_path / "page.md").write_text(held)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", (tmp_path / "page.md",))
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    with pytest.raises(SystemExit, match="no result file for the table: published"):
        pages.main()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "published.json").write_text('{"published": [], "ours": []}')
    with pytest.raises(SystemExit, match=r"not as the result files are: page.md"):
        pages.main()
    assert (tmp_path / "page.md").read_text() == held
    monkeypatch.setattr(sys, "argv", ["pages.py"])
    pages.main()
    assert (tmp_path / "page.md").read_text() != held
