"""What is read back is what was written, or an error of ours."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system import models
from pi_system.errors import IntegrityError, ProtocolError, UsageError
from pi_system.graph import serialize
from pi_system.graph.ir import Graph, Node

FILES = (serialize.HEADER_NAME, serialize.TENSORS_NAME)


@pytest.fixture
def saved(tmp_path: Path, graph: Graph) -> Path:
    serialize.save(tmp_path / "model", graph)
    return tmp_path / "model"


def test_round_trip(saved: Path, graph: Graph) -> None:
    loaded = serialize.load(saved)
    assert loaded.nodes == graph.nodes and loaded.metadata == graph.metadata
    assert loaded.sha256() == graph.sha256() == serialize.save(saved, graph)
    assert {k: v.dtype for k, v in loaded.tensors.items()} == {
        k: v.dtype for k, v in graph.tensors.items()
    }
    assert sorted(p.name for p in saved.iterdir()) == sorted(FILES), "no temporary file is left"


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(saved: Path, name: str) -> None:
    rng = random.Random(1)
    path = saved / name
    good = path.read_bytes()
    positions = {*range(16), *(rng.randrange(len(good)) for _ in range(150))}
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(IntegrityError):
            serialize.load(saved)
    path.write_bytes(good)
    serialize.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_extended_files_are_found(saved: Path, name: str) -> None:
    path = saved / name
    good = path.read_bytes()
    for bad in (b"", good[:1], good[: len(good) // 2], good[:-1], good + b"\n", b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(IntegrityError):
            serialize.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_mixed_up_pair_is_found(saved: Path, tmp_path: Path, name: str) -> None:
    other = models.random_graph("resnet10", width=2, relus=1215)
    serialize.save(tmp_path / "other", other)
    (saved / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(IntegrityError):
        serialize.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_a_usage_error(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UsageError, match=name):
        serialize.load(saved)
    with pytest.raises(UsageError, match="no exported model"):
        serialize.load(saved / "nowhere")


def test_an_unwritable_place_is_a_usage_error(tmp_path: Path, graph: Graph) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        serialize.save(tmp_path / "file", graph)


def test_another_version_is_refused(saved: Path) -> None:
    path = saved / serialize.HEADER_NAME
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(IntegrityError, match="version"):
        serialize.load(saved)


def test_the_wire_carries_masks_and_no_weights(graph: Graph) -> None:
    data = serialize.to_bytes(graph)
    public = serialize.from_bytes(data)
    assert public.sha256() == graph.public().sha256()
    assert set(public.tensors) == {f"{node.name}.mask" for node in graph.relus}
    assert public.relu_kept == graph.relu_kept
    packed = sum(-(-int(np.prod(node.shape)) // 8) for node in graph.relus)
    assert len(data) < packed + 16_000


@settings(max_examples=200, deadline=None)
@given(position=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit_on_the_wire_is_a_protocol_error_or_a_valid_graph(
    graph: Graph, position: float, bit: int
) -> None:
    data = bytearray(serialize.to_bytes(graph))
    # Most flips go into the header; those in the masks cannot be told from other masks.
    data[int(position**3 * (len(data) - 1))] ^= 1 << bit
    try:
        found = serialize.from_bytes(data)
    except ProtocolError:
        return
    assert isinstance(found, Graph)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_garbage_on_the_wire_is_a_protocol_error(data: bytes, framed: bool) -> None:
    if framed:
        data = b"PIGRAPH1" + struct.pack("<I", len(data)) + data
    with pytest.raises(ProtocolError):
        serialize.from_bytes(data)


def test_truncation_on_the_wire(graph: Graph) -> None:
    data = serialize.to_bytes(graph)
    for bad in (data[:5], data[:11], data[:100], data[:-1], data + b"\0"):
        with pytest.raises(ProtocolError):
            serialize.from_bytes(bad)


def _wire(document: Any, masks: bytes = b"") -> bytes:
    header = json.dumps(document).encode()
    return b"PIGRAPH1" + struct.pack("<I", len(header)) + header + masks


def _lie(graph: Graph, index: int, **changes: Any) -> bytes:
    document = graph.public().header()
    document["nodes"][index] |= changes
    masks = serialize.to_bytes(graph)[-graph.relu_total // 8 :]
    return _wire(document, masks)


CONV = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}


@pytest.mark.parametrize(
    "index,changes",
    [
        (1, {"shape": [2, 31, 32]}),
        (1, {"shape": [3, 1 << 39, 1]}),
        (1, {"shape": []}),
        (1, {"shape": [2, 32, True]}),
        (1, {"shape": [2, 32, 32.0]}),
        (1, {"shape": "abc"}),
        (1, {"shape": [0, 32, 32]}),
        (1, {"shape": [-2, 32, 32]}),
        (1, {"op": "softmax"}),
        (1, {"op": ["conv"]}),
        (1, {"op": "input"}),
        (0, {"op": "conv"}),
        (1, {"name": ""}),
        (1, {"name": "../../x"}),
        (1, {"name": "x\u001b[2J"}),
        (1, {"name": None}),
        (1, {"inputs": ["nobody"]}),
        (1, {"inputs": []}),
        (1, {"inputs": [0]}),
        (1, {"inputs": "x"}),
        (1, {"extra": 1}),
        (1, {"attrs": []}),
        (1, {"attrs": CONV | {"groups": 0}}),
        (1, {"attrs": CONV | {"groups": 2}}),
        (1, {"attrs": CONV | {"groups": [1, 1]}}),
        (1, {"attrs": CONV | {"stride": [0, 1]}}),
        (1, {"attrs": CONV | {"stride": [1]}}),
        (1, {"attrs": CONV | {"stride": 1}}),
        (1, {"attrs": CONV | {"kernel": [99, 99]}}),
        (1, {"attrs": CONV | {"padding": [-1, 1]}}),
        (1, {"attrs": CONV | {"padding": [1 << 70, 1]}}),
        (1, {"attrs": CONV | {"more": 1}}),
        (1, {"attrs": {}}),
        (2, {"shape": [2, 32, 16]}),
        (-1, {"inputs": ["x"]}),
    ],
)
def test_a_lying_peer_is_refused(graph: Graph, index: int, changes: dict[str, Any]) -> None:
    serialize.from_bytes(_lie(graph, 1))
    with pytest.raises(ProtocolError):
        serialize.from_bytes(_lie(graph, index, **changes))


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"nodes": [], "metadata": {}},
        {"nodes": {}, "metadata": {}},
        {"nodes": [1], "metadata": {}},
        {"nodes": [{}], "metadata": {}},
        {"nodes": [{}] * 20_000, "metadata": {}},
        {"nodes": [], "metadata": []},
    ],
)
def test_malformed_documents_are_refused(document: Any) -> None:
    with pytest.raises(ProtocolError):
        serialize.from_bytes(_wire(document))


def test_nan_in_metadata_is_refused() -> None:
    with pytest.raises(ProtocolError, match="NaN"):
        serialize.from_bytes(_wire({"nodes": [], "metadata": {"mean": float("nan")}}))


def _without(graph: Graph, name: str) -> Graph:
    return dataclasses.replace(graph, tensors={k: v for k, v in graph.tensors.items() if k != name})


@pytest.mark.parametrize(
    "change",
    [
        lambda g: _without(g, "conv1.bias"),
        lambda g: dataclasses.replace(g, tensors={**g.tensors, "more": np.zeros(1, np.float32)}),
        lambda g: dataclasses.replace(g, tensors={**g.tensors, "conv1.bias": np.zeros(2)}),
        lambda g: dataclasses.replace(
            g, tensors={**g.tensors, "conv1.bias": np.full(2, np.nan, np.float32)}
        ),
        lambda g: dataclasses.replace(
            g, tensors={**g.tensors, "relu.mask": np.ones((2, 32, 32), np.uint8)}
        ),
        lambda g: dataclasses.replace(
            g, nodes=(*g.nodes, Node("dead", "relu", ("x",), (3, 32, 32)), g.nodes[-1])[:-1]
        ),
    ],
)
def test_an_invalid_graph_is_not_saved(
    tmp_path: Path, graph: Graph, change: Callable[[Graph], Graph]
) -> None:
    with pytest.raises(UsageError):
        serialize.save(tmp_path / "bad", change(graph))
    assert not (tmp_path / "bad").exists()


def test_the_hash_covers_everything(graph: Graph) -> None:
    hashes = {graph.sha256(), graph.public().sha256()}
    hashes.add(dataclasses.replace(graph, metadata={}).sha256())
    for name in ("conv1.weight", "relu.mask"):
        changed = graph.tensors[name].copy()
        changed.flat[0] = not changed.flat[0]
        hashes.add(dataclasses.replace(graph, tensors={**graph.tensors, name: changed}).sha256())
    assert len(hashes) == 5
