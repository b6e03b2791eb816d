"""The audit of real parties: good ones pass, and every kind of bad one is found out."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pi_system.backends import base
from pi_system.backends.fss import packing, plan, ring, source, weights
from pi_system.backends.fss.party import FssBackend
from pi_system.backends.fss.plan import PLAN_KEY, Precision
from pi_system.bench.audit import cut, proof, tally
from pi_system.bench.audit.report import Audit, audit
from pi_system.bench.audit.sabotage import SABOTAGES
from pi_system.bench.audit.session import Session
from pi_system.cli.bench import cli
from pi_system.cli.bench.audit import SABOTAGES as OFFERED
from pi_system.cli.party import cli as party
from pi_system.errors import RefusedError, UsageError
from pi_system.graph.execute import run as run_plaintext
from pi_system.graph.ir import Graph
from pi_system.models import images, resolve

ROOT = Path(__file__).resolve().parents[2]
MODEL = "random:resnet10w4@600"


@cache
def model(retry_bits: int = 20) -> Graph:
    graph = resolve(MODEL)
    made = plan.calibrate(graph, plan.synthetic_images(graph), Precision(retry_bits=retry_bits))
    metadata = {**graph.metadata, PLAN_KEY: {"default": made.to_json()}}
    return Graph(graph.nodes, graph.tensors, metadata)


def wanted(inferences: int = 16, graph: Graph | None = None) -> Audit:
    graph = model() if graph is None else graph
    return Audit(graph, images(graph, inferences // 2)[0], inferences)


def test_good_parties_pass_and_every_message_is_accounted_for() -> None:
    report = audit(wanted())
    assert report.passed and report.findings == ()
    assert report.smallest_p > report.threshold
    assert report.ends_agree
    report.raise_if_failed()
    links = {(row.sender, row.receiver) for row in report.rows if row.cover}
    assert links == {
        ("server", "client"), ("client", "server"), ("server", "dealer"), ("dealer", "server"),
        ("client", "dealer"), ("dealer", "client"),
    }  # fmt: skip
    bare = {row.field for row in report.rows if not row.cover}
    assert bare == {"document", "inference", "status"}
    assert all(row.p for row in report.rows if row.cover and row.values * row.bits > 64)
    assert report.reuse["inference in image"] == {"seen": 16, "different": 16}
    # Of the dealer's links nothing is online.
    assert {key for key in report.payload if "dealer" in key and "online" in key} == set()


@pytest.mark.parametrize(
    ("kind", "message", "test"),
    [
        ("reused-mask", "seed of b, seed of masks", "used twice"),
        ("reused-mask", "Z in image of x (client to server)", "alike"),
        ("biased-mask", "X stages.3.0.relu1 in opening", "bytes"),
        ("unmasked-value", "image (client to server, online)", "in the clear"),
        ("unmasked-value", "Z in image of x (client to server)", "bytes"),
        ("truncated-mask", "Z in image of x (client to server)", "bytes"),
        ("truncated-mask", "next Z in worked out of stages.0.0.relu1", "bytes"),
    ],
)
def test_sabotage_is_found_where_it_is_done(kind: str, message: str, test: str) -> None:
    report = _sabotaged(kind)
    assert not report.passed
    with pytest.raises(RefusedError, match="the audit found"):
        report.raise_if_failed()
    names = {finding.message for finding in report.findings}
    assert any(message in name for name in names)
    rows = [row for row in report.rows if message in row.name]
    assert not rows or rows[0].p[test] < report.threshold


@cache
def _sabotaged(kind: str):  # type: ignore[no-untyped-def]
    return audit(replace(wanted(), sabotage=kind))


@pytest.mark.parametrize("kind", SABOTAGES)
def test_answers_stay_right_under_sabotage(kind: str) -> None:
    """Nothing but an audit tells."""
    graph = model()
    x, _ = images(graph, 1)
    with Session(graph, sabotage=SABOTAGES[kind]) as session:
        session.setup()
        for _ in range(2):
            session.offline()
            session.online(x)
            assert session.answer is not None
            assert np.abs(session.answer - run_plaintext(graph, x)).max() < 0.1


def test_retries_have_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan so narrow that the zone check often asks for more material."""
    monkeypatch.setattr("pi_system.backends.fss.client.MAX_RETRIES", 50)
    monkeypatch.setattr("pi_system.backends.fss.server.MAX_RETRIES", 50)
    report = audit(wanted(32, model(retry_bits=1)))
    assert report.retries > 0
    assert report.passed
    assert report.reuse["inference in image"]["seen"] == 32 + report.retries


def test_messages_in_many_parts_are_cut_and_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi_system.backends.fss.batch.PART", 16)
    report = audit(wanted(8))
    assert report.passed
    whole = {row.layer: row.values for row in report.rows if row.field == "next Z"}
    parts = [row for row in report.rows if row.kind == "opening" and row.values]
    assert len(parts) > len(whole)
    assert sum(row.values for row in parts) == sum(whole.values())


def test_a_proof_counts_what_is_right() -> None:
    trials = proof.prove(wanted(8), 1)
    assert [trial.sabotage for trial in trials] == [None, *SABOTAGES]
    assert all(trial.right == trial.rounds == 1 for trial in trials)
    proof.raise_if_wrong(trials)
    with pytest.raises(RefusedError, match="biased-mask 1 of 1"):
        proof.raise_if_wrong([*trials[:2], replace(trials[2], right=0)])


def test_a_frame_too_many_or_too_few_is_refused() -> None:
    graph = model()
    x, _ = images(graph, 1)
    with Session(graph) as session:
        frames = session.setup()
        public = cut.read_public(frames, 1)
        assert public.digest == json.loads(
            next(s.data for s in cut.setup(public, frames) if s.message.kind == "digest")
        )
        made, asked = session.offline(), session.online(x)
    assert len(list(cut.offline(public, made))) == len(made)
    assert len(list(cut.online(public, asked))) == len(asked)
    for wrong in (made[:-1], [*made, made[-1]], [*made, asked[1]]):
        with pytest.raises(RefusedError, match="offline phase"):
            list(cut.offline(public, wrong))
    with pytest.raises(RefusedError, match="open as described"):
        cut.read_public(made, 1)
    counts = tally.Tally(public)
    longer = [replace(s, data=s.data + b"\0") for s in cut.online(public, asked)]
    with pytest.raises(RefusedError, match="form"):
        counts.add(longer, 0)


def test_a_record_that_the_other_end_contradicts_is_noticed() -> None:
    with Session(model()) as session:
        session.setup()
        session.offline()
        frames = session._tapes["client"].frames
        session._client.ping()
        frames[-1] = frames[-1]._replace(data=b"fine")
    assert not session.ends_agree


def test_weights_in_clear_would_be_recognised() -> None:
    graph = model()
    with Session(graph) as session:
        public = cut.read_public(session.setup(), 1)
    needles = tally.weight_needles(public, graph)
    op = public.lowered.convs[0]
    planned = public.plan.convs[op.out]
    fixed, _ = weights.fixed(graph, op, public.plan.f_x, planned.f_w)
    for frame in (
        packing.pack(fixed, planned.n),
        weights.reals(graph, op)[0].astype(np.float32).tobytes(),
        ring.encode(weights.reals(graph, op)[0], planned.f_w).tobytes(),
    ):
        assert any(needle in frame for needle in needles)


def test_no_serving_party_can_be_sabotaged() -> None:
    """Bad sources are made in one module, imported by the audit alone; the registry's backend
    has the good one, and no command or option of a party leads to another."""
    backend = base.get("fss")
    assert isinstance(backend, FssBackend) and type(backend._source) is source.Source
    importers = set()
    for path in (ROOT / "pi_system").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names]
                if "sabotage" in " ".join([*names, getattr(node, "module", "") or ""]):
                    importers.add(path.relative_to(ROOT / "pi_system").parent.as_posix())
    assert importers == {"bench/audit"}
    for command in ((), ("server",), ("client",), ("dealer",)):
        said = CliRunner().invoke(party, [*command, "--help"])
        assert said.exit_code == 0 and "sabotage" not in said.output


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "crypten"}, "no description of its messages"),
        ({"inferences": 7}, "even number"),
        ({"inferences": 6}, "at least 8"),
    ],
)
def test_what_cannot_be_audited_is_a_usage_error(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        audit(replace(wanted(), **changes))  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    assert tuple(SABOTAGES) == OFFERED
    target = tmp_path / "audit.json"
    small = ["audit", "--model", MODEL, "--images", "8"]
    done = CliRunner().invoke(cli, [*small, "--format", "json", "--output", str(target)])
    assert done.exit_code == 0, done.output
    document = json.loads(target.read_text())
    assert document["passed"] and document["inferences"] == 8
    assert set(document["learns"]) == {"server", "client", "dealer"}
    table = CliRunner().invoke(cli, [*small, "--sabotage", "unmasked-value"])
    assert isinstance(table.exception, RefusedError)
    assert "in the clear" in table.output and "[rho r]" in table.output
    rows = CliRunner().invoke(cli, [*small, "--format", "csv"])
    assert "worst_test" in rows.output.splitlines()[0]
    for wrong in (["--images", "9"], ["--sabotage", "biased-mask", "--prove", "2"]):
        assert isinstance(CliRunner().invoke(cli, [*small, *wrong]).exception, UsageError)
