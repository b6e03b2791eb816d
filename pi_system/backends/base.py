"""What a backend is: three session objects over channels, one per role.

A session is driven from the client: ``setup`` once, then ``offline(count)`` to lay one-time
material for ``count`` inferences in memory, then ``online`` once per inference. The server's
methods are called when the client's are (``parties`` carries the commands); the dealer serves
until both channels close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..graph.ir import Graph
from ..net.channel import Channel


@dataclass(frozen=True)
class Options:
    """Public parameters of a session, equal on all sides.

    ``threads`` is per party; ``device`` is a torch device name for server and dealer; ``plan``
    names the precision the server is to use, and only the server's counts.
    """

    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    plan: str = "default"


class ServerSession(Protocol):
    def setup(self) -> None: ...
    def offline(self, count: int) -> None: ...
    def online(self) -> None: ...


class ClientSession(Protocol):
    def setup(self) -> None: ...
    def offline(self, count: int) -> None: ...
    def online(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Normalised images (N, C, H, W) to logits (N, classes)."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the backend adds to a result, JSON-able: fss its plan and its retries."""
        ...


class DealerSession(Protocol):
    def run(self) -> None:
        """Serve until both channels are closed."""
        ...


class Backend(Protocol):
    name: str

    def server(
        self, graph: Graph, client: Channel, dealer: Channel, options: Options
    ) -> ServerSession: ...

    def client(
        self, public: Graph, server: Channel, dealer: Channel, options: Options
    ) -> ClientSession: ...

    def dealer(self, server: Channel, client: Channel, options: Options) -> DealerSession: ...


_REGISTRY: Final = {
    "crypten": "pi_system.backends.crypten.party:CrypTenBackend",
    "fss": "pi_system.backends.fss.party:FssBackend",
}


def names() -> tuple[str, ...]:
    """The backends of this package."""
    return tuple(_REGISTRY)


def check(name: str) -> None:
    """Refuse a name that :func:`get` would not know, importing nothing.

    Raises:
        UsageError: an unknown backend.
    """
    _entry(name)


def get(name: str) -> Backend:
    """The backend ``name``, imported only now.

    Args:
        name: one of :func:`names`, or ``module:Class`` for a backend outside this package
            (a class without arguments that satisfies :class:`Backend`). Only ever from a
            party's own command line: a peer's backend is compared by name, never imported.

    Raises:
        UsageError: an unknown name, or a backend whose packages are not installed.
    """
    entry = _entry(name)
    module, _, attribute = entry.partition(":")
    try:
        factory: Callable[[], Backend] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"backend {name!r} needs the package {error.name!r}, not installed"
        ) from error
    except (AttributeError, ValueError) as error:
        raise UsageError(f"backend {name!r}: there is no {attribute!r} in {module!r}") from error
    return factory()


def _entry(name: str) -> str:
    entry = _REGISTRY.get(name, name if ":" in name else None)
    if entry is None:
        raise UsageError(f"unknown backend {name!r}; known: {', '.join(_REGISTRY)}")
    return entry
