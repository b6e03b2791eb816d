"""One-time material: made offline, used once, and the dealer silent online."""

from __future__ import annotations

import gc
import json
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from crypten_trio import Builder, Trio, images, one_relu

from pi_system.errors import PeerError, ProtocolError, RefusedError, UsageError
from pi_system.graph import execute

Make = Callable[..., Trio]


def test_the_dealer_is_silent_online(trio: Make) -> None:
    graph = one_relu(0.5)
    session = trio(graph)
    session.both("offline", 2)
    before = len(session.meters["dealer"].events)
    x = images(graph)
    for _ in range(2):
        np.testing.assert_allclose(
            session.both("online", images=x), execute.run(graph, x), atol=1e-3
        )
    for role in ("server", "client"):
        assert not session.online(role, "dealer")
    assert len(session.meters["dealer"].events) == before
    phases = {(e.phase, e.inference) for e in session.meters["server"].events}
    assert phases == {
        ("setup", -1),
        ("offline", 0),
        ("offline", 1),
        ("online", 0),
        ("online", 1),
    }


def test_material_is_taken_before_use_and_runs_out(trio: Make) -> None:
    graph = one_relu(0.5)
    session = trio(graph)
    x = images(graph)
    with pytest.raises(RefusedError, match="no one-time material is left"):
        session.client.online(x)
    session.both("offline", 1)
    assert len(session.client._store) == len(session.server._store) == 1
    session.both("online", images=x)
    assert len(session.client._store) == len(session.server._store) == 0
    frames = len(session.taps["client", "server"].sent)
    with pytest.raises(RefusedError, match="offline phase"):
        session.client.online(x)
    assert len(session.taps["client", "server"].sent) == frames, "a refusal must send nothing"


def test_an_aborted_inference_burns_its_material(trio: Make) -> None:
    graph = one_relu(0.5)
    session = trio(graph)
    session.both("offline", 2)
    session.channels["server", "client"].close()
    with pytest.raises(PeerError):
        session.client.online(images(graph))
    assert len(session.client._store) == 1


def test_no_two_inferences_share_a_frame(trio: Make) -> None:
    """The same image twice: every message of the second run is new."""
    graph = one_relu(1.0)
    session = trio(graph)
    session.both("offline", 2)
    seen: list[set[bytes]] = []
    for _ in range(2):
        start = len(session.taps["client", "server"].sent)
        session.both("online", images=images(graph))
        seen.append(set(session.taps["client", "server"].sent[start:]))
    assert not seen[0] & seen[1]
    corrections = [m for m in session.taps["server", "dealer"].received if len(m) > 32]
    assert len(corrections) == len(set(corrections))


def test_the_dealer_hears_shapes_and_counts_only(trio: Make) -> None:
    graph = one_relu(0.5)
    session = trio(graph)
    session.infer(images(graph))
    heard = {
        role: [json.loads(m) for m in session.taps["dealer", role].received]
        for role in ("server", "client")
    }
    tape, count = heard["server"]
    assert set(tape) == {"tape"} and count == {"count": 1}
    kinds = [kind for kind, _, _ in tape["tape"]]
    assert kinds == ["mul", *["and"] * 7, "bit", "mul", "matmul"]
    assert tape["tape"][0] == ["mul", [[1, 4, 6, 6], [4, 1, 1]], {}]
    assert set(heard["client"][0]) == {"tape_sha256"} and heard["client"][1] == {"count": 1}


def held(root: object) -> Iterator[bytes]:
    """The bytes of every tensor, array and string reachable from a session object."""
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        skip = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
        if id(item) in seen or isinstance(item, skip):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item.detach().contiguous().numpy().tobytes()
        elif isinstance(item, np.ndarray):
            yield item.tobytes()
        elif isinstance(item, bytes | bytearray):
            yield bytes(item)
        if isinstance(item, types.MethodType):
            todo.append(item.__self__)
        todo += gc.get_referents(item)


def encodings(values: Any) -> list[bytes]:
    """A tensor's first row in the forms it might be kept in."""
    row = np.ascontiguousarray(values.reshape(-1)[:8])
    return [row.tobytes(), np.round(row.astype(np.float64) * 2**16).astype(np.int64).tobytes()]


def test_who_holds_what(trio: Make) -> None:
    b = Builder()
    b.relu(b.conv(4), keep=0.5)
    b.linear(3)
    graph = b.graph()
    x = images(graph)
    session = trio(graph)
    for secret in encodings(graph.tensors["conv1.weight"]):
        assert not any(secret in data for data in held(session.client))
    # The image lives for the time of an inference; look while the server computes.
    seen: list[list[bytes]] = []
    relu = session.server._model._modules["relu2"]
    original = relu.forward

    def spy(value: Any) -> Any:
        seen.append([*held(session.server), *held(value)])
        return original(value)

    session.server._model._modules["relu2"] = spy
    session.infer(x)
    assert seen
    for secret in encodings(x):
        assert not any(secret in data for data in [*seen[0], *held(session.server)])
    for secret in [*encodings(x), *encodings(graph.tensors["conv1.weight"])]:
        assert not any(secret in data for data in held(session.dealer))


def test_the_search_can_find(trio: Make) -> None:
    graph = one_relu(1.0)
    found = list(held(types.SimpleNamespace(graph=graph)))
    (secret, _) = encodings(graph.tensors["affine1.scale"])
    assert any(secret[:8] in data for data in found)


def test_bad_images_are_refused_before_anything_is_used(trio: Make) -> None:
    graph = one_relu(0.5)
    session = trio(graph)
    session.both("offline", 1)
    x = images(graph)
    bad = x.copy()
    bad.flat[0] = np.nan
    for wrong in (bad, x[0], x[:0], np.concatenate([x, x]), x[:, :2]):
        with pytest.raises(UsageError, match=r"image"):
            session.client.online(wrong)
    assert len(session.client._store) == 1
    with pytest.raises(UsageError):
        session.client.offline(0)


def test_parties_that_disagree_are_refused(trio: Make) -> None:
    session = trio(one_relu(0.5), ready=False)
    session.client._graph = one_relu(0.4).public()
    for channel in session.channels.values():
        channel.timeout = 1
    with pytest.raises(PeerError):
        session.both("setup")
    refusals = [e for e in session.errors if isinstance(e, RefusedError)]
    assert [str(e) for e in refusals] == ["server and client ask for different one-time material"]


def test_counts_that_disagree_are_refused(trio: Make) -> None:
    session = trio(one_relu(0.5))
    for channel in session.channels.values():
        channel.timeout = 1
    session.channels["client", "dealer"].send_json({"count": 2})
    with pytest.raises(PeerError):
        session.server.offline(1)
    assert any("different numbers" in str(e) for e in session.errors)


def test_the_dealer_refuses_nonsense(trio: Make) -> None:
    session = trio(one_relu(0.5), ready=False)
    session.channels["server", "dealer"].timeout = 1
    session.channels["server", "dealer"].send_json({"tape": [["mul", [[1, 2]], {}]]})
    with pytest.raises(PeerError):
        for _ in range(2):
            session.channels["server", "dealer"].recv()
    assert any(isinstance(e, ProtocolError) for e in session.errors)
