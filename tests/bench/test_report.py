"""The report: from real result files, from hostile ones, and in a browser."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pi_system.bench.report import charts, page, sections, sources
from pi_system.bench.sheet import Sheet
from pi_system.cli import bench, common

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RUN: dict[str, Any] = json.loads((RESULTS / "fss-cifar100-test-default.json").read_text())
CHROMIUM = shutil.which("chromium")
EVIL = '</text><script>alert(1)</script><img src=x onerror="alert(2)">$\\frac{&\x1b[31m'
VOID = {"meta", "img", "link", "input", "br"}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Elements(HTMLParser):
    """Elements with their attributes, and the text of everything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


def run_of(relus: int, network: str = "loopback", **changes: Any) -> dict[str, Any]:
    return {
        **RUN,
        "model": {**RUN["model"], "relu_kept": relus, "name": f"random:resnet18@{relus}"},
        "network": {**RUN["network"], "name": network},
        **changes,
    }


def comparison() -> dict[str, Any]:
    keys = ("setup", "offline", "online", "accuracy", "peak_memory_mb")
    ran = {"name": "fss", "backend": "fss", "model": RUN["model"], "not_run": None}
    why = "needs the package 'spu'"
    missing = {**ran, "name": "spu", "backend": "spu", "not_run": why, **dict.fromkeys(keys)}
    spread = {"median": 3.5, "min": 3.25, "max": 4.0, "values": [3.25, 3.5, 4.0]}
    shared = ("schema_version", "environment", "model", "network", "threads_per_party")
    return {
        **{key: RUN[key] for key in (*shared, "batch_size", "plaintext", "stability")},
        "contenders": [{**ran, **{key: RUN[key] for key in keys}}, missing],
        "ratios": [{"contender": "fss", "over": "plaintext", "online_latency": spread}],
        "rounds": [{}, {}, {}],
    }


def student(method: str, relus: int, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "version": 1, "method": method.lower(), "title": method, "recipe": "cifar100-resnet10-w16",
        "relu_kept": relus, "relu_total": 77824, "seed": seed, "test_accuracy": accuracy,
        "teacher": {"test_accuracy": 0.64},
    }  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One of every kind."""
    documents: dict[str, Any] = {
        "run.json": RUN,
        "sweep.json": [run_of(r, n) for r in (0, 5000, 50000) for n in ("loopback", "wan")],
        "compare.json": comparison(),
    }
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document))
    folder = tmp_path / "students"
    folder.mkdir()
    for method, gain in (("SENet", 0.0), ("SNL", -0.01)):
        for relus in (3000, 7000, 14000):
            for seed in (1, 2):
                one = student(method, relus, seed, 0.5 + relus / 1e6 + gain + seed / 1000)
                (folder / f"{method}-{relus}-{seed}.json").write_text(json.dumps(one))
    (folder / "summary.json").write_text('{"not": "a result"}')
    return [*(tmp_path / name for name in documents), folder]


@pytest.fixture
def report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def command(*paths: Path, output: Path | None = None) -> tuple[int, str, str]:
        where = output or tmp_path / "report.html"
        code = common.run(bench.cli, ["report", *map(str, paths), "--output", str(where)])
        return code, *capsys.readouterr()

    return command


def test_every_kind_of_result_gets_its_section_charts_and_tables(
    report: Callable[..., tuple[int, str, str]], files: list[Path], tmp_path: Path
) -> None:
    code, out, err = report(*files)
    assert (code, err) == (0, "") and "report.html" in out
    text = (tmp_path / "report.html").read_text()
    found = Elements(text)
    assert not found.open
    titles = {attributes.get("id") for tag, attributes in found.found if tag == "section"}
    assert titles == {
        *("warnings", "accuracy", "latency", "bytes", "layers", "work", "peers", "results"),
        *("environment", "files"),
    }
    ids = [attributes["id"] for _, attributes in found.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    figures = {str(i).removeprefix("figure-") for i in ids if str(i).startswith("figure-")}
    assert len(figures) == found.count("svg") >= 6
    assert {f"table-{key}" for key in figures} <= set(ids)
    for words in ("needs the package 'spu'", "3.5 (3.25 to 4)", "SNL", "AMD EPYC"):
        assert words in found.text
    # Nothing is fetched from anywhere and nothing runs.
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in found.found}
    for _, attributes in found.found:
        for name, value in attributes.items():
            if name in ("href", "xlink:href", "src"):
                assert str(value).startswith("#") and str(value)[1:] in ids
    assert "@import" not in text and "url(http" not in text and "fe00" not in text


def test_csv_and_png_beside_the_page_say_the_same(
    report: Callable[..., tuple[int, str, str]], files: list[Path], tmp_path: Path
) -> None:
    assert report(*files)[0] == 0
    beside = tmp_path / "report-files"
    rows = _rows(beside / "accuracy-1.csv")
    senet = [r for r in rows if r["method"] == "SENet" and r["ReLUs"] == "7000"]
    assert float(senet[0]["test accuracy %"]) == pytest.approx(100 * (0.507 + 0.0015))
    assert senet[0]["seeds"] == "2"
    latency = _rows(beside / "latency-1.csv")
    assert {(r["network"], r["ReLUs"]) for r in latency} == {
        (n, r) for n in ("loopback", "wan") for r in ("0", "5000", "50000")
    }
    layers = _rows(beside / "layers-1.csv")
    directions = RUN["online"]["bytes"]
    for column, key in (("kB to server", "client_to_server"), ("kB to client", "server_to_client")):
        assert sum(float(r[column]) for r in layers) == pytest.approx(
            directions[key] / 1e3, rel=1e-3
        )
    text = (tmp_path / "report.html").read_text()
    drawn = {path.stem for path in beside.glob("*.png")}
    assert drawn and all(f'id="figure-{name}"' in text for name in drawn)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in beside.glob("*.png"))


def test_a_tidy_table_gives_the_same_latencies(tmp_path: Path) -> None:
    rows = [run_of(relus) for relus in (0, 100)]
    for number, row in enumerate(rows):
        row["model"]["sha256"] = f"{number:064x}"
    for suffix in ("csv", "json"):
        sheet = Sheet(tmp_path / f"sweep.{suffix}")
        for row in rows:
            sheet.append(row)
    found = {
        suffix: sections.build(sources.read([tmp_path / f"sweep.{suffix}"]))
        for suffix in ("csv", "json")
    }
    parts = {s: {x.key: x.parts[0].table for x in found[s]} for s in found}
    for key in ("latency", "bytes", "work", "environment"):
        if key != "environment":
            assert parts["csv"][key] == parts["json"][key]
    assert "layers" in parts["json"] and "layers" not in parts["csv"]


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    layers = [{**layer, "name": EVIL} for layer in RUN["online"]["layers"]]
    work = {EVIL: {EVIL: 1.0, "wait": 2.0}}
    runs = [
        {
            **run_of(relus),
            "backend": EVIL,
            "environment": {**RUN["environment"], "cpu": EVIL},
            "stability": {"stable": False, "warnings": [EVIL]},
            "online": {**RUN["online"], "layers": layers, "work_ms": work},
        }
        for relus in (0, 10)
    ]
    for run in runs:
        run["model"]["name"] = run["network"]["name"] = EVIL
    odd = {**comparison(), "contenders": [{**comparison()["contenders"][1], "not_run": EVIL}]}
    (tmp_path / "=evil.json").write_text(json.dumps([*runs, odd, student(EVIL, 10, 1, 0.5)]))
    material = sources.read([tmp_path / "=evil.json"])
    text = page.render(material, EVIL)
    found = Elements(text)
    assert not {"script", "img"} & {tag for tag, _ in found.found}
    assert not any(name.startswith("on") for _, a in found.found for name in a)
    assert "<script>alert(1)</script>" in found.text and "\x1b" not in text
    written = {asset.name: asset.data for asset in page.assets(material)}
    assert b"'=evil.json" in written["files.csv"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "No such file"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "it is empty"),
        (b'{"a": 1}', "no result of pi-bench"),
        ({"schema_version": 2}, "schema version 2"),
        ({"online": []}, "no whole result"),
        ({"online": {**RUN["online"], "round_trips": float("nan")}}, "NaN"),
        ({"online": {**RUN["online"], "round_trips": -1}}, "online.round_trips is -1"),
        ({"online": {**RUN["online"], "round_trips": "x"}}, "online.round_trips is no number"),
        ({"online": {**RUN["online"], "layers": [3]}}, "a layer is no record"),
        ({"accuracy": {}}, "accuracy.argmax_agreement is missing"),
    ],
)
def test_files_that_are_no_results_are_named_with_the_reason(
    report: Callable[..., tuple[int, str, str]], tmp_path: Path, data: Any, why: str
) -> None:
    path = tmp_path / "broken.json"
    if isinstance(data, dict):
        data = json.dumps({**RUN, **data}).encode()
    if data is not None:
        path.write_bytes(data)
    code, _, err = report(path)
    assert code == 2 and err.count("\n") == 1
    assert "broken.json" in err and why in err
    assert not (tmp_path / "report.html").exists()


def test_damaged_tables_and_empty_folders_too(
    report: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "sweep.csv").write_text("a,b\n1,2")
    code, _, err = report(tmp_path / "sweep.csv")
    assert code == 2 and "sweep.csv" in err
    (tmp_path / "none").mkdir()
    code, _, err = report(tmp_path / "none")
    assert code == 2 and "holds no .json files" in err
    code, _, err = report(RESULTS / "run-demo-fss.json", output=tmp_path / "nowhere" / "x.html")
    assert code == 2 and "there is no folder" in err


@pytest.mark.parametrize("log", [False, True])
def test_charts_of_nothing_much(log: bool) -> None:
    one = charts.Lines("t", "x", "y", (charts.Line("a", [5], [1.0]),), log_x=log, log_y=log)
    assert charts.svg(one, "k").startswith("<svg ")
    flat = charts.Bars("t", "x", ("a", "b"), (("k", (0.0, 0.0)),))
    assert charts.svg(flat, "k").endswith("</svg>\n")


@pytest.mark.parametrize("greatest", [1.5, 6.0, 70.0, 5000.0])
def test_ticks_are_plain_numbers(greatest: float) -> None:
    values = [4.4, 4.4 * greatest]
    one = charts.Lines("t", "x", "y", (charts.Line("a", values, values),), log_x=True, log_y=True)
    spreads = tuple((value, 0.9 * value, 1.2 * value) for value in values)
    for chart in (one, charts.Dots("t", "x", ("a", "b"), spreads)):
        text = Elements(charts.svg(chart, "k")).text
        assert "mathdefault" not in text and "$" not in text
        assert sum(part.strip("kM.").replace(".", "").isdigit() for part in text.split()) >= 2


# --- in a browser ---


def _chromium(folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


LOOK = """
const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
const all = selector => [...page.querySelectorAll(selector)].filter(e => e.checkVisibility());
const boxes = selector => all(selector).map(e => e.getBoundingClientRect());
const channels = colour => colour.match(/[0-9.]+/g).map(Number);
const luminance = colour => channels(colour).slice(0, 3)
  .map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const contrast = (one, other) => {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + .05) / (low + .05);
};
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const found = view.getComputedStyle(e).backgroundColor;
    if ((channels(found)[3] ?? 1) === 1) return found;
  }
  return 'rgb(255, 255, 255)';
};
const texts = all('body *').filter(e => [...e.childNodes].some(
  n => n.nodeType === 3 && n.data.trim()));
const pale = texts.map(e => {
  const style = view.getComputedStyle(e), drawn = e instanceof view.SVGElement;
  return [contrast(drawn ? style.fill : style.color, behind(e)), e.textContent];
}).sort((a, b) => a[0] - b[0])[0];
const series = [1, 2, 3, 4, 5, 6, 7, 8].map(i => {
  const mark = page.body.appendChild(page.createElement('i'));
  mark.style.color = `var(--series-${i})`;
  const found = contrast(view.getComputedStyle(mark).color, behind(mark));
  mark.remove();
  return found;
});
const cut = all('body *').filter(e => !e.closest('.scroll') || e.matches('.scroll'))
  .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1)
  .map(e => e.outerHTML.slice(0, 80));
const overlaps = [], sizes = [];
for (const figure of all('figure')) {
  const words = [...figure.querySelectorAll('text')];
  sizes.push(...words.map(
    e => parseFloat(view.getComputedStyle(e).fontSize) * e.getScreenCTM().d));
  const at = words.map(e => e.getBoundingClientRect());
  const edge = figure.querySelector('svg').getBoundingClientRect();
  at.forEach((a, i) => {
    if (a.right > edge.right + 2 || a.left < edge.left - 2) overlaps.push(words[i].textContent);
    at.slice(0, i).forEach((b, j) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 3) overlaps.push(words[i].textContent + ' on ' + words[j].textContent);
    });
  });
}
const alone = all('figure').filter(
  e => !all('table').some(t => t.closest('.part') === e.closest('.part') && t.rows.length > 1));
const hidden = all('.scroll').filter(e => e.scrollWidth > e.clientWidth + 1);
const unmarked = hidden.filter(e => {
  e.scrollLeft = 60;
  const first = e.querySelector('td').getBoundingClientRect().left;
  return view.getComputedStyle(e).backgroundImage === 'none' || e.tabIndex !== 0
    || Math.abs(first - e.getBoundingClientRect().left) > 1;
});
return {
  width: root.clientWidth, scroll: root.scrollWidth, cut, overlaps, pale, series,
  smallest: Math.min(...sizes), alone: alone.length,
  hidden: hidden.length, unmarked: unmarked.length, page: behind(page.body),
  charts: boxes('figure svg').map(b => [b.width, b.height]),
  tables: boxes('table').map(b => [b.width, b.height]),
  fetched: view.performance.getEntriesByType('resource').length,
};
"""
"""What a reader would see of the page in ``frame``; the page itself runs no script."""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; Debian: apt-get install chromium")
def test_in_a_browser(files: list[Path], tmp_path: Path) -> None:
    """In light and dark, at the widths of a phone and of a desktop."""
    names = ("compare-resnet18.json", "sweep-networks.json", "senet")
    html = tmp_path / "report.html"
    material = sources.read([*(RESULTS / name for name in names), *files])
    html.write_text(page.render(material, "Report"))
    (tmp_path / "frames.html").write_text(
        f"""<!DOCTYPE html><title></title><body>
        <iframe src="report.html" style="width:390px;height:800px;border:0"></iframe>
        <iframe src="report.html" style="width:1280px;height:800px;border:0"></iframe>
        <pre></pre><script>onload = () => {{
          const seen = [...document.querySelectorAll('iframe')].map(frame => {{ {LOOK} }});
          document.querySelector('pre').textContent = JSON.stringify(seen);
        }}</script>"""
    )
    for scheme, setting in (("light", 1), ("dark", 0)):
        dom = _chromium(
            tmp_path, f"--blink-settings=preferredColorScheme={setting}",
            "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frames.html",
        )  # fmt: skip
        shown = unescape(dom.partition("<pre>")[2].partition("</pre>")[0])
        phone, desktop = json.loads(shown)
        for seen, width in ((phone, 390), (desktop, 1280)):
            assert seen["width"] <= width and seen["scroll"] <= seen["width"]
            assert seen["cut"] == [] and seen["overlaps"] == []
            assert (seen["page"] == "rgb(255, 255, 255)") is (scheme == "light")
            # WCAG: 4.5 for text, 3 for the lines of a chart.
            assert seen["pale"][0] >= 4.5, seen["pale"]
            assert min(seen["series"]) >= 3, seen["series"]
            assert len(seen["charts"]) >= 6 and len(seen["tables"]) >= 9
            assert all(w > 250 and h > 80 for w, h in seen["charts"])
            assert all(w > 100 and h > 20 for w, h in seen["tables"])
            assert seen["smallest"] > 10 and seen["fetched"] == 0
            assert seen["alone"] == 0 and seen["unmarked"] == 0
        assert phone["hidden"] > 3


def test_a_peer_of_whole_inferences_has_its_row() -> None:
    (comparison,) = sources.read([RESULTS / "compare-demo.json"]).comparisons
    (stock,) = (one for one in comparison.peers if one.name == "crypten-stock-all")
    assert stock.run is None and stock.not_run is None and stock.whole is not None
    document = json.loads((RESULTS / "compare-demo.json").read_text())
    (raw,) = (one for one in document["contenders"] if one["name"] == stock.name)
    assert stock.whole.median == raw["whole"]["latency_ms"]["median"]
    assert stock.whole.bytes == raw["whole"]["interface_bytes"]
    row = sections._peer(stock)
    assert row[0] == "crypten-stock-all, whole inference" and row[2] == stock.whole.median
