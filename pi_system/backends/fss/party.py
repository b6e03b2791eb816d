"""The backend's entry in the registry."""

from __future__ import annotations

from ...graph.ir import Graph
from ...net.channel import Channel
from ..base import Options
from .client import Client
from .dealer import Dealer
from .server import Server


class FssBackend:
    """One round trip per ReLU layer, and none for linearized positions."""

    name = "fss"

    def server(self, graph: Graph, client: Channel, dealer: Channel, options: Options) -> Server:
        return Server(graph, client, dealer, options)

    def client(self, public: Graph, server: Channel, dealer: Channel, options: Options) -> Client:
        return Client(public, server, dealer, options)

    def dealer(self, server: Channel, client: Channel, options: Options) -> Dealer:
        return Dealer(server, client, options)
