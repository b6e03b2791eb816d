"""Three real sessions over in-process channels against plaintext torch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fss_networks import Builder, Floats, Sessions, images, planned, random_graph, residual

from pi_system.backends import base
from pi_system.backends.base import Options
from pi_system.backends.fss import batch as batches
from pi_system.backends.fss import (
    client,
    kernels,
    masks,
    packing,
    pairing,
    prg,
    program,
    server,
    store,
)
from pi_system.backends.fss.plan import HIGH, Precision, calibrated
from pi_system.backends.fss.public import Public, agree, send_plan
from pi_system.backends.fss.server import PLAN_KEY
from pi_system.bench.rounds import round_trips
from pi_system.errors import IntegrityError, PiError, ProtocolError, RefusedError, UsageError
from pi_system.graph import serialize
from pi_system.graph.execute import run
from pi_system.graph.ir import Graph
from pi_system.net.channel import channel_pair

SPARE = 3
ROUNDINGS = 24
"""Typical error allowed on a logit, in units of the last place of an activation."""


def close_to(private: Floats, graph: Graph, x: Floats, f_x: int, bound: float) -> None:
    error = np.abs(private - run(graph, x)).max()
    assert error <= bound
    assert error <= ROUNDINGS * 2.0**-f_x


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed: int) -> None:
    graph, plan = planned(random_graph(seed))
    batch = 1 + seed % 3
    x = images(graph, batch)
    with Sessions(graph, Options(batch=batch)) as sessions:
        sessions.offline(SPARE)
        close_to(sessions.online(x), graph, x, plan.f_x, plan.error)


@pytest.mark.parametrize("seed", [2, 7, 19])
def test_every_kernel_gives_the_same_session(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seeds, byte for byte the same frames and the same logits."""
    graph, _ = planned(random_graph(seed))
    x = images(graph, 2)
    for module in (store, pairing):
        monkeypatch.setattr(module, "new_id", lambda: "0" * 32)
    results = []
    for level in ("numpy", "portable", "avx2", "vaes", "auto"):
        drawn: Counter[str] = Counter()

        def seeded(drawn: Counter[str] = drawn) -> bytes:
            who = sys._getframe(2).f_code.co_name  # one function of each party draws
            drawn[who] += 1
            return hashlib.sha256(f"{who} {drawn[who]}".encode()).digest()[:16]

        monkeypatch.setattr(prg, "fresh_seed", seeded)
        with kernels.using(level):
            with Sessions(graph, Options(batch=2)) as sessions:
                sessions.offline(1)
                logits = sessions.online(x)
            frames = [
                (role, peer, sessions.tapes[role].received(peer))
                for role in sessions.tapes
                for peer in sessions.tapes
            ]
        results.append((logits.tobytes(), frames))
    assert len(drawn) == 3
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize(("keep", "threads"), [(0.0, 1), (0.5, 1), (0.5, 3), (1.0, 2)])
def test_residual_network_in_high_precision(keep: float, threads: int) -> None:
    graph, plan = planned(residual(keep=keep), HIGH)
    x = images(graph, 2)
    with Sessions(graph, Options(batch=2, threads=threads)) as sessions:
        sessions.offline(SPARE)
        close_to(sessions.online(x), graph, x, plan.f_x, plan.error)


def test_a_model_without_a_plan_is_calibrated_by_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graph = residual()
    x = np.random.default_rng(0).uniform(-2, 2, (1, *graph.input.shape)).astype(np.float32)
    with Sessions(graph) as sessions:
        sessions.offline(SPARE)
        assert np.abs(sessions.online(x) - run(graph, x)).max() < 0.1
    assert "no fixed-point plan" in caplog.text


def test_the_server_chooses_among_the_stored_plans() -> None:
    graph = residual()
    stored, failures = calibrated(graph, images(graph, 16, seed=2), "noise")
    assert not failures and set(stored) == {"calibrated_on", "default", "high"}
    graph = dataclasses.replace(graph, metadata={**graph.metadata, PLAN_KEY: stored})
    x = images(graph, 1)
    errors = {}
    for name, f_x in (("default", 9), ("high", 12)):
        with Sessions(graph, Options(plan=name)) as sessions:
            sessions.offline(SPARE)
            errors[name] = np.abs(sessions.online(x) - run(graph, x)).max()
            facts = sessions.client.facts()
        assert facts["f_x"] == f_x and facts["retries"] == 0
        assert errors[name] <= facts["error"] == stored[name]["error"]
    assert errors["high"] < errors["default"]


@pytest.mark.parametrize(
    ("stored", "name", "error"),
    [
        ({"default": {}}, "high", UsageError),
        ([], "default", UsageError),
        ({"default": {"f_x": 9}}, "default", IntegrityError),
        (None, "low", UsageError),
    ],
)
def test_a_plan_the_model_lacks_is_refused(
    stored: object, name: str, error: type[Exception]
) -> None:
    graph = residual()
    if stored is not None:
        graph = dataclasses.replace(graph, metadata={**graph.metadata, PLAN_KEY: stored})
    a, b = channel_pair(names=("server", "client"))
    with a, b, pytest.raises(error, match="plan"):
        server.Server(graph, a, a, Options(plan=name)).setup()


def test_parties_told_different_things_are_refused_with_both_named() -> None:
    graph, plan = planned(residual())
    told, other = (
        Public(graph.public(), program.build(graph), plan, name * 64, 1) for name in "ab"
    )
    a, b = channel_pair(names=("server", "client"))
    with a, b:
        send_plan(a, told)
        asked = client.Client(graph.public(), b, None, Options(model="b" * 64))
        with pytest.raises(RefusedError, match=f"{'a' * 64}.*{'b' * 64}"):
            asked.setup()
    digests = f"{told.digest[:16]}.*{other.digest[:16]}"
    with pytest.raises(RefusedError, match=digests):
        agree(told.digest, other, "client")
    assert told.digest != dataclasses.replace(told, batch=2).digest


def test_the_registry_knows_the_backend() -> None:
    assert base.get("fss").name == "fss"


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_online_bytes_and_round_trips(keep: float) -> None:
    """k + n + 2 bits per kept ReLU, the image, the logits, framing; nothing for empty layers."""
    graph, plan = planned(residual(keep=keep))
    batch = 2
    with Sessions(graph, Options(batch=batch)) as sessions:
        sessions.offline(SPARE)
        meter = sessions.at_client.meter
        with meter.in_phase("online"):
            sessions.online(images(graph, batch))
        events = [event for event in meter.events if event.phase == "online"]
    lowered = program.build(graph)
    kept = {relu.out: batch * len(relu.kept) for relu in lowered.relus}
    up = 4 + 8 + packing.size(batch * graph.input.shape[0] * 64, plan.input_n)
    down = 4 + 1 + packing.size(batch * 5, plan.output_k)
    for name, count in kept.items():
        up += 4 + packing.size(count, plan.gates[name].n) + packing.size(count, 1)
        down += 4 + packing.size(count, plan.gates[name].k)
        down += 4 + packing.size(count, 1)
    assert sum(kept.values()) == batch * graph.relu_kept
    assert sum(event.bytes for event in events if event.direction == "sent") == up
    assert sum(event.bytes for event in events if event.direction == "received") == down
    assert len(events) == 3 * lowered.round_trips - 1
    assert lowered.round_trips == 1 + (3 if keep else 0)
    assert {event.peer for event in events} == {"server"}


def test_a_batch_of_gates_in_many_parts_is_one_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, plan = planned(residual(keep=0.7))
    x = images(graph, 2)
    monkeypatch.setattr(batches, "PART", 48)
    with Sessions(graph, Options(batch=2)) as sessions:
        sessions.offline(SPARE)
        ends = {"client": sessions.at_client, "server": sessions.at_server}
        with contextlib.ExitStack() as stack:
            for channel in ends.values():
                stack.enter_context(channel.meter.in_phase("online"))
            close_to(sessions.online(x), graph, x, plan.f_x, plan.error)
        logs = {
            role: [event for event in channel.meter.events if event.phase == "online"]
            for role, channel in ends.items()
        }
    lowered = program.build(graph)
    parts = sum(len(batches.parts(step.gates, 2)) for step in lowered.steps)
    assert parts > 3 * lowered.round_trips
    assert len(logs["client"]) == 3 * parts + 2
    assert round_trips(logs) == lowered.round_trips


def test_offline_bytes_are_those_of_the_protocol() -> None:
    """Section 3's table, by what they are for: gates and linear layers, and a seed."""
    graph, plan = planned(residual(keep=0.5))
    batch = 2
    with Sessions(graph, Options(batch=batch)) as sessions:
        meters = sessions.at_client.meter, sessions.at_server.meter
        sessions.client_dealer.meter, sessions.server_dealer.meter = meters
        with meters[0].in_phase("offline"), meters[1].in_phase("offline"):
            sessions.offline(1)
        client, server = ([e for e in meter.events if e.phase == "offline"] for meter in meters)

    def total(log: list[Any], mark: str, peer: str, direction: str) -> int:
        return sum(
            e.bytes for e in log if (e.layer, e.peer, e.direction) == (mark, peer, direction)
        )

    lowered = program.build(graph)
    shares = sum(4 + packing.size(batch * op.size, plan.convs[op.out].n) for op in lowered.convs)
    corrections = server_side = 0
    for op in lowered.relus:
        width, count = plan.gates[op.out], batch * len(op.kept)
        corrections += 4 + 16 * width.blocks * count
        bits = (width.k, 1, *[width.n] * 3, *[max(width.n - width.k, 0)] * 2)
        server_side += 4 + 16 * (width.blocks + 1) * count
        server_side += sum(packing.size(count, size) for size in bits)
    assert total(client, "linear", "server", "sent") == shares
    assert total(server, "linear", "client", "received") == shares
    assert total(server, "linear", "dealer", "received") == shares
    assert total(client, "gates", "dealer", "received") == corrections
    assert total(server, "gates", "dealer", "received") == server_side
    assert total(client, "", "dealer", "sent") < 200  # the request and a seed
    assert {e.layer for e in client + server} == {"", "gates", "linear"}


def test_rings_shrink_where_every_position_is_kept() -> None:
    _, full = planned(residual(keep=1.0))
    _, partial = planned(residual(keep=0.5))
    assert max(conv.n for conv in full.convs.values()) < 32
    assert not any(conv.bound for conv in full.convs.values())
    assert any(conv.bound for conv in partial.convs.values())
    assert 0 < partial.retry_rate <= 2.0 ** -Precision().retry_bits
    assert full.retry_rate == 0


def test_material_is_burnt_before_use() -> None:
    graph, _ = planned(residual())
    x = images(graph, 1)
    with Sessions(graph) as sessions:
        sessions.offline(SPARE)
        sessions.online(x)
        for party in (sessions.client, sessions.server):
            assert party._stock().entry.burnt == SPARE - 1
            with pytest.raises(RefusedError, match="spent"):
                party._claimed.take(0)
        sessions.client._claimed.take(2)
        with pytest.raises(RefusedError, match="no one-time material is left"):
            sessions.client.online(x)


def test_a_replayed_inference_is_refused_by_the_server() -> None:
    graph, plan = planned(residual())
    with Sessions(graph) as sessions:
        sessions.offline(SPARE)
        sessions.online(images(graph, 1))
        size = packing.size(graph.input.shape[0] * 64, plan.input_n)
        frame = (0).to_bytes(8, "little") + bytes(size)
        with pytest.raises(RefusedError, match="spent"):
            sessions.together(lambda: sessions.at_client.send(frame), sessions.server.online)


def test_an_aborted_inference_burns_its_id_on_both_sides() -> None:
    graph, plan = planned(residual())
    with Sessions(graph) as sessions:
        sessions.offline(SPARE)

        def half() -> None:
            inference, _ = sessions.client._claimed.take_next()
            size = packing.size(graph.input.shape[0] * 64, plan.input_n)
            sessions.at_client.send(inference.to_bytes(8, "little") + bytes(size))
            sessions.at_client.recv()
            sessions.at_client.send(b"short")

        with pytest.raises(ProtocolError):
            sessions.together(half, sessions.server.online)
        for party in (sessions.client, sessions.server):
            with pytest.raises(RefusedError, match="spent"):
                party._claimed.take(0)


def test_what_reaches_the_dealer() -> None:
    """Architecture, masks, plan, W' (uniform, fresh per setup) and seeds of masks; no more."""
    graph, plan = planned(residual())
    seen = []
    for _ in range(2):
        with Sessions(graph) as sessions:
            sessions.offline(SPARE)
            tape = sessions.tapes["dealer"]
            before = len(tape.frames)
            sessions.online(images(graph, 1))
            assert len(tape.frames) == before
        seen.append(tape)
    lowered = program.build(graph)
    ops = lowered.convs
    head = 2  # graph, plan
    for tape in seen:
        from_server, from_client = tape.received("server"), tape.received("client")
        assert len(from_server) == head + len(ops)
        assert from_server[0] == serialize.to_bytes(graph.public())
        assert set(json.loads(from_server[1])) == {"plan", "model"}
        assert [len(data) for data in from_client[1:]] == [8 + 16] * SPARE
        assert len({data[8:] for data in from_client[1:]}) == SPARE
    first, second = (tape.received("server")[head:] for tape in seen)
    for op, a, b in zip(ops, first, second, strict=True):
        count, n = int(np.prod(op.weight_shape)), plan.convs[op.out].n
        x, y = (packing.unpack(data, count, n) for data in (a, b))
        assert len(a) == packing.size(count, n)
        assert (x != y).mean() > 0.99  # two setups never share b
    joined = np.frombuffer(b"".join(first), np.uint8)
    cells = np.bincount(joined, minlength=256)
    expected = len(joined) / 256
    assert ((cells - expected) ** 2 / expected).sum() < 380  # 255 degrees, p < 1e-6


def test_the_dealer_refuses_a_client_of_another_session() -> None:
    graph, _ = planned(residual())
    with Sessions(graph) as sessions:
        public = sessions.client._public
        assert public is not None
        sessions.client._public = dataclasses.replace(public, model="another")
        sessions.at_client.timeout = sessions.at_server.timeout = 1.0
        sessions.server_dealer.timeout = sessions.client_dealer.timeout = 1.0
        with pytest.raises(PiError):
            sessions.offline(1)
        assert any(isinstance(error, RefusedError) for error in sessions.errors)


def test_no_wrap_is_silent_and_retries_are_as_rare_as_derived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a ring so small that wraps are common: every answer right, or a retry."""
    graph, plan = planned(residual(keep=0.4, side=4), Precision(retry_bits=2))
    assert 1 / 9 <= plan.retry_rate <= 1 / 4
    for module in (client, server):
        monkeypatch.setattr(module, "MAX_RETRIES", 50)
    runs = 40
    x = images(graph, 1)
    reference = run(graph, x)
    with Sessions(graph) as sessions:
        sessions.offline(runs)
        for _ in range(runs):
            assert np.abs(sessions.online(x) - reference).max() < ROUNDINGS * 2.0**-plan.f_x
        assert not len(sessions.client._claimed) and not len(sessions.server._claimed)
        used = sessions.client._claimed.used + 1
        assert sessions.client.facts()["retries"] == used - runs
    rate = 1 - runs / used
    limit = plan.retry_rate
    assert used - runs > 0
    assert rate <= limit + 5 * (limit / used) ** 0.5


def test_without_the_zone_check_the_same_ring_fails() -> None:
    """The check is what keeps answers right: without it some of them are wrong."""
    graph, plan = planned(residual(keep=0.4, side=4), Precision(retry_bits=0))
    open_plan = plan.to_json()
    large = open_plan["input_n"]
    open_plan["input_n"] -= 3
    for layer in (*open_plan["convs"].values(), *open_plan["gates"].values()):
        layer["n"] -= 3 * (layer["n"] == large)
        layer.pop("bound", None)
    for conv in open_plan["convs"].values():
        conv["bound"] = 0
    graph = Graph(graph.nodes, graph.tensors, {**graph.metadata, PLAN_KEY: {"default": open_plan}})
    x = images(graph, 1)
    reference = run(graph, x)
    with Sessions(graph) as sessions:
        sessions.offline(40)
        errors = [np.abs(sessions.online(x) - reference).max() for _ in range(40)]
    wrong = [error for error in errors if error > ROUNDINGS * 2.0**-plan.f_x]
    assert len(wrong) > 0


def test_images_that_do_not_fit_are_refused() -> None:
    graph, plan = planned(residual())
    with Sessions(graph) as sessions:
        sessions.offline(1)
        for wrong in (
            images(graph, 2),
            np.full((1, *graph.input.shape), 2 * plan.input_limit, np.float32),
            np.full((1, *graph.input.shape), np.nan, np.float32),
        ):
            with pytest.raises(UsageError):
                sessions.client.online(wrong)
        assert len(sessions.client._claimed) == 1


def test_streams_never_repeat() -> None:
    """No mask or one-time word twice, across tensors, purposes and inferences."""
    graph, plan = planned(residual())
    lowered = program.build(graph)
    seen: list[Any] = []
    for inference in range(20):
        bundle = masks.Bundle(bytes(16), "model", inference)
        for item in masks.walk(lowered, plan, bundle, 1):
            if isinstance(item, masks.LinearMasks):
                seen += [item.t.reshape(-1), item.u.reshape(-1)]
            elif isinstance(item, masks.GateMasks):
                seen.append(item.fresh)
            else:
                seen.append(item.image.reshape(-1))
    words = np.concatenate(seen)
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("module", ["client", "dealer", "party"])
def test_client_and_dealer_import_no_torch(module: str) -> None:
    code = f"import sys, pi_system.backends.fss.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_max_pooling_with_padding_and_odd_windows() -> None:
    b = Builder(np.random.default_rng(5), (2, 7, 7))
    x = b.pool(b.conv("image", 3), "maxpool", 3, 2, 1)
    b.linear(x, 5)
    graph, plan = planned(b.graph())
    x_in = images(graph, 1)
    with Sessions(graph) as sessions:
        sessions.offline(SPARE)
        close_to(sessions.online(x_in), graph, x_in, plan.f_x, plan.error)
