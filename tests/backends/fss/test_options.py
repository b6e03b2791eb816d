"""What the backend cannot do yet is refused, not ignored."""

from __future__ import annotations

import pytest

from pi_system.backends.base import Options
from pi_system.backends.fss.party import FssBackend
from pi_system.errors import UsageError
from pi_system.graph.ir import Graph, Node
from pi_system.net.channel import channel_pair


@pytest.mark.parametrize("role", ["server", "client", "dealer"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Options(device="tpu"), "no device 'tpu'"),
        (Options(device="mps"), "no device 'mps'"),
    ],
)
def test_devices_are_refused(role: str, options: Options, text: str) -> None:
    backend, graph = FssBackend(), Graph((Node("x", "input", (), (1,)),), {})
    first, second = channel_pair()
    with first, second, pytest.raises(UsageError, match=text):
        if role == "dealer":
            backend.dealer(first, second, options)
        else:
            getattr(backend, role)(graph, first, second, options)
