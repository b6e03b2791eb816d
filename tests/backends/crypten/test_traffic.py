"""What a layer costs, counted on the sockets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from crypten_trio import Builder, Trio, images, one_relu

Make = Callable[..., Trio]

RELU_BYTES = 232
"""8-byte words per party: AND 2, six tree levels of 4, bit conversion 1, product 2."""
RELU_FRAMES = 9
HEADER = 4


def relu_bytes(session: Trio, role: str, peer: str, layer: str) -> int:
    return sum(e.bytes for e in session.online(role, peer, layer) if e.direction == "sent")


def test_a_relu_costs_232_bytes_and_nine_exchanges(trio: Make) -> None:
    graph = one_relu(1.0)
    (relu,) = graph.relus
    session = trio(graph)
    session.infer(images(graph))
    for role, peer in (("server", "client"), ("client", "server")):
        events = session.online(role, peer, relu.name)
        sent = [e.bytes for e in events if e.direction == "sent"]
        received = [e.bytes for e in events if e.direction == "received"]
        assert sent == received and len(sent) == RELU_FRAMES
        assert sum(sent) == RELU_BYTES * graph.relu_kept + HEADER * RELU_FRAMES


def test_a_tenth_of_the_relus_is_a_tenth_of_the_traffic(trio: Make) -> None:
    cost = {}
    for keep in (1.0, 0.1):
        graph = one_relu(keep, (8, 10, 10))
        session = trio(graph)
        session.infer(images(graph))
        cost[keep] = relu_bytes(session, "client", "server", graph.relus[0].name)
    assert cost[0.1] / cost[1.0] == pytest.approx(0.1, abs=0.02)


def test_an_emptied_relu_sends_nothing(trio: Make) -> None:
    graph = one_relu(0.0)
    session = trio(graph)
    session.infer(images(graph))
    for role, peer in (("server", "client"), ("client", "server")):
        assert not session.online(role, peer, graph.relus[0].name)
    assert len(session.online("client", "server")) == 2 * 2 + 1  # affine, linear, logits


def test_every_online_frame_belongs_to_a_layer(trio: Make) -> None:
    b = Builder()
    b.relu(b.conv(2), keep=0.5)
    b.linear(2)
    graph = b.graph()
    session = trio(graph)
    session.infer(images(graph))
    labels = {e.layer for e in session.online("client", "server")}
    assert labels == {"conv1", "relu2", "linear4", "logits"}
    logits = session.online("client", "server", "logits")
    assert [e.direction for e in logits] == ["received"], "the server must not see the logits"


def test_linear_layers_open_input_and_weights(trio: Make) -> None:
    b = Builder()
    b.conv(5)
    b.linear(3)
    graph = b.graph()
    session = trio(graph, batch=2)
    session.infer(images(graph, 2))
    weights = graph.tensors["conv1.weight"].size
    expected = 8 * (2 * 3 * 8 * 8 + weights) + HEADER
    assert relu_bytes(session, "server", "client", "conv1") == expected


@pytest.mark.parametrize(
    "kernel,exchanges,comparisons",
    [((2, 2), 18, 8 * 4 + 4 * 4), ((3, 3), 36, 2 * 8 * 3 + 2 * 3 * 3), ((1, 1), 0, 0)],
)
def test_max_pooling_is_a_tree_over_rows_and_columns(
    trio: Make, kernel: tuple[int, int], exchanges: int, comparisons: int
) -> None:
    b = Builder((1, 8, 8))
    node = b.pool("maxpool", kernel=kernel, stride=(2, 2))
    b.linear(1)
    session = trio(b.graph())
    session.infer(images(b.graph()))
    sent = [e.bytes for e in session.online("server", "client", node.name) if e.direction == "sent"]
    assert len(sent) == exchanges
    assert sum(sent) == RELU_BYTES * comparisons + HEADER * exchanges


def test_setup_exchanges_seeds_and_shapes_only(trio: Make) -> None:
    graph = one_relu(0.5)
    session = trio(graph)
    between = [e for e in session.meters["client"].events if e.peer == "server"]
    assert [e.bytes for e in between] == [32 + HEADER] * 2
    assert {e.phase for e in session.meters["client"].events} == {"setup"}


def test_crypten_is_told_what_the_channel_counted(trio: Make) -> None:
    graph = one_relu(0.2)
    session = trio(graph)
    session.infer(images(graph))
    state = session.client._state
    sent = sum(
        e.bytes
        for e in session.meters["client"].events
        if e.peer == "server" and e.direction == "sent"
    )
    assert state.communicator.get_communication_stats() == {"bytes": sent}
    assert np.isfinite(sent)
