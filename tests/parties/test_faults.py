"""A sample of benchmarks/faults.py: real parties, real TLS, one broken message a session."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import faults  # noqa: E402
from fault_proxy import Fault  # noqa: E402

Cell = Callable[[Fault], dict[str, Any]]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    """Runs one cell; at the end nothing is left."""
    folder = tmp_path_factory.mktemp("faults")
    model, truth = faults.model_at(folder)
    at = faults.Deployment(folder / "one", model, tls=True, store=True, backend="fss", short=True)
    try:
        yield lambda fault: {"phase": "", **faults.run_cell(at, fault, truth)}
    finally:
        left = at.close()
    assert not left


@pytest.mark.parametrize(
    "fault",
    [
        Fault("client-server", "client", 4, "kill sender"),
        Fault("client-server", "client", 20, "kill receiver"),
        Fault("client-server", "server", 6, "reset"),
        Fault("client-server", "client", 0, "stall"),
        Fault("server-dealer", "dealer", 9, "truncation"),
        Fault("server-dealer", "server", 8, "kill receiver"),
    ],
    ids=lambda fault: "-".join(map(str, fault)),
)
def test_a_broken_message_ends_in_a_named_error_and_a_retry_succeeds(
    cell: Cell, fault: Fault
) -> None:
    row = cell(fault)
    assert row["fired"] and faults.verdict(row) == "ok", row


def test_a_client_that_vanishes_between_requests_is_no_orderly_end(cell: Cell) -> None:
    row = cell(Fault("client-server", "client", 28, "kill sender"))
    assert row["server"]["event"] == "failed", row
    assert "client" in row["server"]["error"] and faults.verdict(row) == "ok"


def test_a_dealer_names_the_error_of_a_party_whose_tls_broke(cell: Cell) -> None:
    row = cell(Fault("client-dealer", "client", 5, "bit flip"))  # its hello
    assert row["dealer"]["kind"] == "RefusedError", row
    assert "bad record mac" in row["dealer"]["error"] and faults.verdict(row) == "ok"


_FULL_DISK = """
import dataclasses, json, resource, sys
from pathlib import Path
from pi_system.backends.fss.ledger import Entry, new_id
from pi_system.backends.fss.store import Store
from pi_system.errors import PiError

class Text:
    def encode(self, inference, item): return item
    def decode(self, inference, data): return bytes(data)

store = Store(Path(sys.argv[1]), "server")
entry = Entry(new_id(), "", "digest", new_id())
store.ledger.create(entry)
stock = store.stock(entry, Text())
step = stock.plan(10, claim=False)
stock.follow(step, 10, claim=False)
stock.add(0, bytes(100))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
said = []
try:
    stock.add(1, bytes(1 << 20))
except PiError as error:
    said.append(str(error))
done = 0
try:
    while done < 10_000:
        step = stock.plan(1, claim=True)
        stock.follow(step, 1, claim=True)
        done = stock.entry.burnt + 1
except PiError as error:
    said.append(str(error))
print(json.dumps({"said": said, "burnt": stock.entry.burnt, "pair": entry.pair}))
"""


def test_a_full_disk_is_one_line_and_what_was_burnt_stays_burnt(tmp_path: Path) -> None:
    from pi_system.backends.fss.store import Store

    found = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / "store")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    report = json.loads(found.stdout)
    assert len(report["said"]) == 2 and report["said"][0].startswith("cannot write"), report
    assert not list((tmp_path / "store").rglob("*.tmp"))
    with Store(tmp_path / "store", "server") as store:
        entry = store.ledger.get(report["pair"])
        assert entry is not None and entry.burnt >= report["burnt"]
