"""Graphs from a peer that are well-formed and ruinous: refused before anything is allocated."""

from __future__ import annotations

import json
import math
import struct

import pytest

from pi_system.errors import ProtocolError
from pi_system.graph import serialize
from pi_system.graph.ir import Graph, Node

ONE = (1, 1)
Shape = tuple[int, ...]


def source(*shape: int) -> Node:
    return Node("image", "input", (), shape)


def conv(
    shape: Shape,
    *,
    kernel: Shape = ONE,
    stride: Shape = ONE,
    padding: Shape = (0, 0),
    dilation: Shape = ONE,
) -> Node:
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return Node("y", "conv", ("image",), shape, {**attrs, "groups": 1})


def pool(
    op: str, shape: Shape, kernel: Shape, *, stride: Shape = ONE, padding: Shape = (0, 0)
) -> Node:
    return Node(
        "y", op, ("image",), shape, {"kernel": kernel, "stride": stride, "padding": padding}
    )


@pytest.mark.parametrize(
    "nodes",
    [
        (source(1 << 27),),
        (source(1 << 25), Node("y", "flatten", ("image",), (1 << 25,)),
         Node("z", "flatten", ("y",), (1 << 25,))),
        (source(1 << 15), Node("y", "linear", ("image",), (1 << 15,))),
        (source(1, 1, 1), conv((1, 2, 2), stride=(65536, 65536), padding=(65535, 65535))),
        (source(1, 4000, 4000), conv((1, 2001, 2001), kernel=(2000, 2000))),
        (source(1, 1, 1),
         pool("maxpool", (1, 2, 2), (65536, 65536), padding=(32768, 32768))),
        (source(1, 3000, 3000), pool("maxpool", (1, 2001, 2001), (1000, 1000))),
        (source(1, 3000, 3000), pool("avgpool", (1, 2001, 2001), (1000, 1000))),
    ],
    ids=["one tensor", "all tensors", "weights", "padding", "a long convolution",
         "padded windows", "windows", "a long pool"],
)  # fmt: skip
def test_a_network_beyond_all_measure_is_refused(nodes: tuple[Node, ...]) -> None:
    with pytest.raises(ProtocolError, match="too large"):
        serialize.from_bytes(serialize.to_bytes(Graph(nodes, {})))


def test_a_large_network_of_the_field_is_not() -> None:
    """VGG-16's widest layers at 224 x 224, and its first linear layer."""
    for nodes in (
        (source(64, 224, 224), conv((64, 224, 224), kernel=(3, 3), padding=(1, 1))),
        (source(25088), Node("y", "linear", ("image",), (4096,))),
        (source(64, 224, 224), pool("maxpool", (64, 112, 112), (2, 2), stride=(2, 2))),
    ):
        graph = Graph(nodes, {})
        assert serialize.from_bytes(serialize.to_bytes(graph)) == graph
        assert math.prod(nodes[0].shape) > 20_000


def test_deeply_nested_metadata_are_refused() -> None:
    """What can just be parsed here could not be written or hashed further down the stack."""
    graph = Graph((source(3),), {}, {"deep": 0})
    for depth, good in ((20, True), (40, False), (900, False), (100_000, False)):
        text = json.dumps(graph.header()).replace(
            '"deep": 0', f'"deep": {"[" * depth}{"]" * depth}'
        )
        data = b"PIGRAPH1" + struct.pack("<I", len(text)) + text.encode()
        if good:
            serialize.from_bytes(data).sha256()
            continue
        with pytest.raises(ProtocolError, match=r"nested|recursion"):
            serialize.from_bytes(data)
