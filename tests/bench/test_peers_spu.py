"""SecretFlow SPU as a peer: its translation of a graph anywhere, its protocols where it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from pi_system.bench import peers
from pi_system.bench.compare import Plan, compare
from pi_system.bench.peers import processes
from pi_system.bench.peers.secretflow import VARIABLE, write_model
from pi_system.bench.peers.secretflow_party import forward, interface_bytes
from pi_system.bench.schema import json_schema
from pi_system.errors import PeerError, PeerTimeout
from pi_system.graph.execute import run as run_plaintext
from pi_system.graph.ir import Graph, Node
from pi_system.graph.serialize import load

Floats = npt.NDArray[np.float32]


def conv(images: Floats, weight: Floats, stride: Any, padding: Any, dilation: Any) -> Floats:
    tensors = torch.from_numpy(images.copy()), torch.from_numpy(weight.copy())
    return F.conv2d(*tensors, None, stride, padding, dilation).numpy()


def translated(graph: Graph, images: Floats) -> Floats:
    """The network as SPU is given it, in NumPy."""
    masks = {name: value for name, value in graph.tensors.items() if name.endswith(".mask")}
    weights = {name: value for name, value in graph.tensors.items() if name not in masks}
    result: Floats = forward(graph.header()["nodes"], masks, weights, images, np, conv)
    return result


def every_kind() -> Graph:
    """One node of every kind, with strides, padding, dilation and groups that differ by axis."""
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> Floats:
        return generator.standard_normal(shape).astype(np.float32)

    pool = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0)}
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    shape = (6, 5, 9)
    nodes = (
        Node("input", "input", (), (4, 9, 9)),
        Node("conv", "conv", ("input",), shape, {"kernel": (3, 3), **geometry, "groups": 2}),
        Node("affine", "affine", ("conv",), shape),
        Node("some", "relu", ("affine",), shape),
        Node("all", "relu", ("affine",), shape),
        Node("none", "relu", ("conv",), shape),
        Node("add", "add", ("some", "all", "none"), shape),
        Node("max", "maxpool", ("add",), (6, 3, 8), pool),
        Node("mean", "avgpool", ("add",), (6, 3, 8), pool),
        Node("concat", "concat", ("max", "mean"), (12, 3, 8)),
        Node("flat", "flatten", ("concat",), (288,)),
        Node("fc", "linear", ("flat",), (10,)),
    )
    tensors = {
        "conv.weight": draw(6, 2, 3, 3), "conv.bias": draw(6),
        "affine.scale": draw(6), "affine.shift": draw(6),
        "some.mask": generator.random(shape) < 0.3,
        "all.mask": np.ones(shape, np.bool_),
        "none.mask": np.zeros(shape, np.bool_),
        "fc.weight": draw(10, 288), "fc.bias": draw(10),
    }  # fmt: skip
    return Graph(nodes, tensors)


def test_every_kind_of_layer_is_translated() -> None:
    graph = every_kind()
    images = np.random.default_rng(1).standard_normal((3, 4, 9, 9)).astype(np.float32)
    np.testing.assert_allclose(
        translated(graph, images), run_plaintext(graph, images), rtol=1e-4, atol=1e-4
    )


def test_the_translation_compares_only_kept_positions(toy_model: Path, toy_images: Floats) -> None:
    graph, compared = load(toy_model), []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def maximum(self, first: Floats, second: Any) -> Any:
            compared.append(first.size)
            return np.maximum(first, second)

    masks = dict(graph.public().tensors)
    logits = forward(graph.header()["nodes"], masks, graph.tensors, toy_images, Counting(), conv)
    np.testing.assert_allclose(logits, run_plaintext(graph, toy_images), rtol=1e-4, atol=1e-4)
    assert compared == [len(toy_images) * graph.kept(node) for node in graph.relus]


def test_the_client_is_told_no_weights(toy_model: Path, tmp_path: Path) -> None:
    graph = load(toy_model)
    for role, secret in (("server", True), ("client", False)):
        write_model(tmp_path / role, graph, secret=secret)
    server, client = (
        set(np.load(tmp_path / role / "tensors.npz", allow_pickle=False).files)
        for role in ("server", "client")
    )
    assert server == set(graph.tensors) and client == {f"{n.name}.mask" for n in graph.relus}
    headers = [(tmp_path / role / "graph.json").read_text() for role in ("server", "client")]
    assert headers[0] == headers[1]
    assert json.loads(headers[1])["weights"]["conv1.weight"] == [4, 3, 3, 3]


def test_without_the_peer_the_row_says_why(toy_model: Path) -> None:
    fss, without = compare(
        Plan(str(toy_model), ("fss", "spu-semi2k"), rounds=1, repeat=1)
    ).contenders
    assert fss.not_run is None and without.whole is None
    assert without.not_run is not None
    assert "--spu-python" in without.not_run and VARIABLE in without.not_run


@pytest.mark.parametrize(
    ("python", "why"),
    [("/nowhere/python", "cannot be started: .*/nowhere/python"), (sys.executable, "No module")],
)
def test_a_python_without_the_peer_is_named(python: str, why: str, toy_model: Path) -> None:
    if python == sys.executable:
        for name in ("jax", "spu"):
            if importlib.util.find_spec(name):
                pytest.skip(f"{name} is installed here")
    run = peers.PeerRun(
        toy_model, np.zeros((1, 3, 8, 8), np.float32), 1, 1, 0, threads=1, python=python
    )
    with pytest.raises(PeerError, match=why):
        peers.get("spu-cheetah").run(run)


def test_a_party_is_started_where_it_is_to_run(toy_model: Path) -> None:
    run = peers.PeerRun(
        toy_model, np.zeros((1, 3, 8, 8), np.float32), 1, 1, 0, threads=1, python=sys.executable,
        places={"client": peers.Place(("/nowhere/enter", "there"))},
    )  # fmt: skip
    with pytest.raises(PeerError, match=r"cannot be started: .*/nowhere/enter"):
        peers.get("spu-semi2k").run(run)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_bytes_of_an_interface_are_those_it_carried() -> None:
    before = interface_bytes("lo")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
    ):
        sender.sendall(bytes(50_000))
        left = 50_000
        with listener.accept()[0] as receiver:
            while left:
                left -= len(receiver.recv(left))
    after = interface_bytes("lo")
    assert before is not None and after is not None and after - before >= 50_000
    assert interface_bytes("no such") is None


def test_one_process_that_fails_ends_the_others() -> None:
    commands = {
        "waits": [sys.executable, "-c", "import time; time.sleep(60)"],
        "fails": [sys.executable, "-c", "raise SystemExit('first\\nthe reason')"],
    }
    started = time.monotonic()
    with pytest.raises(PeerError, match=r"^it failed; its fails: the reason$"):
        processes.run("it", commands, os.environ, 50)
    assert time.monotonic() - started < 20
    with pytest.raises(PeerTimeout, match=r"^it was not done within 0.5 s$"):
        processes.run("it", {"waits": commands["waits"]}, os.environ, 0.5)
    with pytest.raises(PeerError, match=r"^it failed; its silent: ended without a word$"):
        processes.run("it", {"silent": [sys.executable, "-c", "exit(3)"]}, os.environ, 20)
    with pytest.raises(PeerError, match=r"^it ended without a result$"):
        processes.run("it", {"silent": [sys.executable, "-c", "pass"]}, os.environ, 20)


@pytest.fixture
def spu_python() -> str:
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"SecretFlow SPU is not there: {VARIABLE} names no Python that has it")
    return python


@pytest.mark.parametrize("name", ["spu-semi2k", "spu-cheetah"])
def test_spu_answers_as_plaintext(
    name: str, spu_python: str, toy_model: Path, toy_images: Floats
) -> None:
    run = peers.PeerRun(
        toy_model, toy_images, batch=2, repeat=2, warmup=1, threads=1, python=spu_python
    )
    report = peers.get(name).run(run)
    assert [one["images"] for one in report.inferences] == [[0, 1], [2, 0]]
    expected = run_plaintext(load(toy_model), toy_images)
    for one in report.inferences:
        np.testing.assert_allclose(one["logits"], expected[one["images"]], atol=0.02)
    assert len(report.seconds) == 2 and min(report.seconds) > 0
    assert report.interface_bytes is None or report.interface_bytes > 8 * toy_images[:2].size
    assert set(report.peak_memory) == {"server", "client"}
    assert report.settings["protocol"] == name.removeprefix("spu-").upper()
    assert report.settings["field"] == "FM64" and report.settings["fraction_bits"] == 18
    trusted = {"SEMI2K": "TrustedFirstParty", "CHEETAH": None}
    assert report.settings.get("triples") == trusted[str(report.settings["protocol"])]


def test_every_kind_of_layer_in_spu(spu_python: str, tmp_path: Path) -> None:
    from pi_system.graph.serialize import save

    graph = every_kind()
    scaled = {
        name: value if value.dtype == np.bool_ else 0.25 * value
        for name, value in graph.tensors.items()
    }
    graph = dataclasses.replace(graph, tensors=scaled)
    save(tmp_path / "model", graph)
    images = np.random.default_rng(1).standard_normal((2, 4, 9, 9)).astype(np.float32)
    run = peers.PeerRun(tmp_path / "model", images, 2, 1, 0, threads=1, python=spu_python)
    (answer,) = peers.get("spu-semi2k").run(run).inferences
    np.testing.assert_allclose(answer["logits"], run_plaintext(graph, images), atol=0.02)


def test_spu_beside_a_backend(spu_python: str, toy_model: Path) -> None:
    contenders = ("fss", "spu-semi2k", "spu-semi2k-all")
    plan = Plan(str(toy_model), contenders, rounds=1, repeat=1, spu_python=spu_python)
    data = json.loads(json.dumps(compare(plan).to_json(), allow_nan=False))
    jsonschema.validate(data, json_schema("compare"))
    _, some, all_ = data["contenders"]
    assert some["not_run"] is None and all_["not_run"] is None
    assert all_["model"]["relu_kept"] == 2 * some["model"]["relu_kept"]
    assert some["whole"]["settings"]["protocol"] == "SEMI2K"
    carried = [one["whole"]["interface_bytes"] for one in (some, all_)]
    assert carried[0] is None or carried[1] > carried[0]
