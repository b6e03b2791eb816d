"""What one item of material used twice would cost, and that it cannot be used twice.

The stores' guard is replaced by one that hands the same item out again. Then two inferences give
the server x - x', and the client the first layer's weights, to the last bit. With the guard of
either party in place the second use is refused, and what was sent until then gives nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fss_networks import Builder, Floats, Sessions, planned

from pi_system.backends.fss import packing, ring, transcript, weights
from pi_system.backends.fss.plan import Plan
from pi_system.backends.fss.ring import Words
from pi_system.backends.fss.store import Claimed
from pi_system.errors import RefusedError
from pi_system.graph.ir import Graph

Weights = npt.NDArray[np.int64]

SIDE = 8
IMPULSES = ((0, 1, 1), (1, 1, 5), (2, 5, 1))
"""One pixel per channel, so far apart that no output of a 3x3 convolution sees two of them."""


class Unguarded(Claimed[Any]):
    """Material that is not spent: every item is handed out as often as it is asked for."""

    def take(self, inference: int) -> Any:
        return copy.deepcopy(self._items[inference])

    def take_next(self) -> tuple[int, Any]:
        inference = min(self._items)
        return inference, self.take(inference)


def network() -> tuple[Graph, Plan]:
    b = Builder(np.random.default_rng(11), (3, SIDE, SIDE))
    x = b.relu(b.conv("image", 16), 1.0)
    b.linear(x, 5)
    return planned(b.graph())


def victims(graph: Graph, plan: Plan) -> tuple[Floats, Floats]:
    """Two images that differ in three pixels, there by 2^f_w units, so that no rounding blurs W."""
    x = np.random.default_rng(3).uniform(-0.5, 0.5, (1, 3, SIDE, SIDE)).astype(np.float32)
    other = x.copy()
    step = np.float32(2.0 ** (plan.convs["conv1"].f_w - plan.f_x))
    for place in IMPULSES:
        x[(0, *place)], other[(0, *place)] = -step / 2, step / 2
    return x, other


def seen_by_server(sessions: Sessions) -> list[Words]:
    """Z of every image the server received."""
    return [fields["Z"] for fields in received(sessions, "server", "client", "image")]


def seen_by_client(sessions: Sessions) -> list[Words]:
    """X of every first opening the client received."""
    return [fields["X relu2"] for fields in received(sessions, "client", "server", "opening")]


def received(sessions: Sessions, by: str, sender: str, kind: str) -> list[dict[str, Words]]:
    public = sessions.client._public
    assert public is not None
    (form,) = [m for m in transcript.online(public) if m.kind == kind and m.receiver == by]
    size = sum(packing.size(field.count, field.width) for field in form.fields)
    frames = sessions.tapes[by].received(sender)
    return [form.split(data) for data in frames if len(data) == size]


def difference_of_images(first: Words, second: Words, n: int) -> Words:
    return ring.signed(second - first, n).view(np.uint64)


def first_layer(first: Words, second: Words, k: int) -> Weights:
    """X' - X = trunc(W x') - trunc(W x) = W where one pixel differs by one unit of trunc."""
    change = ring.signed(second - first, k).reshape(16, SIDE, SIDE)
    weight = np.zeros((16, 3, 3, 3), np.int64)
    for c, y, z in IMPULSES:
        # Output (i, j) sees the pixel through tap (y - i + 1, z - j + 1).
        weight[:, c] = change[:, y - 1 : y + 2, z - 1 : z + 2][:, ::-1, ::-1]
    return weight


def truth(graph: Graph, plan: Plan, sessions: Sessions) -> Weights:
    public = sessions.client._public
    assert public is not None
    op = public.lowered.convs[0]
    fixed, _ = weights.fixed(graph, op, plan.f_x, plan.convs[op.out].f_w)
    return fixed.view(np.int64)


def test_without_the_guard_one_replay_gives_images_and_weights_away() -> None:
    graph, plan = network()
    x, other = victims(graph, plan)
    with Sessions(graph) as sessions:
        sessions.client._claimed, sessions.server._claimed = Unguarded(), Unguarded()
        sessions.offline(1)
        sessions.online(x)
        sessions.online(other)
        first, second = seen_by_server(sessions)
        expected = ring.encode(other, plan.f_x) - ring.encode(x, plan.f_x)
        assert (difference_of_images(first, second, plan.input_n) == expected.reshape(-1)).all()
        assert expected.any()
        first, second = seen_by_client(sessions)
        found = first_layer(first, second, plan.gates["relu2"].k)
        assert (found == truth(graph, plan, sessions)).all()
        assert len(np.unique(found)) > 200


@pytest.mark.parametrize("cheat", ["nobody", "client", "server"])
def test_with_the_guard_the_second_use_is_refused_and_gives_nothing(cheat: str) -> None:
    """Also where one party has taken its own guard out."""
    graph, plan = network()
    x, other = victims(graph, plan)
    with Sessions(graph) as sessions:
        if cheat != "nobody":
            getattr(sessions, cheat)._claimed = Unguarded()
        sessions.offline(1)
        sessions.online(x)
        if cheat == "client":
            with pytest.raises(RefusedError, match="spent"):
                sessions.together(lambda: send_image(sessions, other), sessions.server.online)
        else:
            with pytest.raises(RefusedError, match="no one-time material is left"):
                sessions.client.online(other)
        # A cheating client gives its own image away, no more; nobody else's guard helps there.
        assert len(seen_by_server(sessions)) == (2 if cheat == "client" else 1)
        assert len(seen_by_client(sessions)) == 1


def test_with_fresh_material_the_same_arithmetic_gives_nothing() -> None:
    graph, plan = network()
    x, other = victims(graph, plan)
    with Sessions(graph) as sessions:
        sessions.offline(2)
        sessions.online(x)
        sessions.online(other)
        first, second = seen_by_server(sessions)
        expected = ring.encode(other, plan.f_x) - ring.encode(x, plan.f_x)
        hits = difference_of_images(first, second, plan.input_n) == expected.reshape(-1)
        assert hits.mean() < 0.05
        first, second = seen_by_client(sessions)
        found = first_layer(first, second, plan.gates["relu2"].k)
        assert (found == truth(graph, plan, sessions)).mean() < 0.05


def send_image(sessions: Sessions, x: Floats) -> None:
    """The client's first step on an item it has used before."""
    public = sessions.client._public
    assert public is not None
    inference, material = sessions.client._claimed.take_next()
    image = ring.encode(x, public.plan.f_x) - material.ends.image
    masked = packing.pack(image, public.plan.input_n)
    sessions.at_client.send(inference.to_bytes(8, "little") + masked)
