"""The backend's entry in the registry."""

from __future__ import annotations

from ...errors import UsageError
from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from .client import Client
from .dealer import Dealer
from .server import Server


class FssBackend:
    """One round trip per ReLU layer, and none for linearized positions.

    Convolutions run on as many threads of the CPU as the options ask for, all else on one; there
    is no other device.
    """

    name = "fss"

    def server(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> Server:
        _check(options)
        return Server(graph, client, dealer, options)

    def client(self, public: Graph, server: Channel, dealer: Channel, options: Options) -> Client:
        _check(options)
        return Client(public, server, dealer, options)

    def dealer(self, server: Channel, client: Channel, options: Options) -> Dealer:
        _check(options)
        return Dealer(server, client, options)


def _check(options: Options) -> None:
    """Refuse what would be ignored, and recorded in results as if it had not been.

    Raises:
        UsageError: another device than the CPU.
    """
    if options.device != "cpu":
        raise UsageError(f"the fss backend has no device {options.device!r}: use --device cpu")
