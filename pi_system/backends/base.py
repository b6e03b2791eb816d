"""What a backend is: three session objects over channels, one per role.

A session is driven from the client: ``setup`` once, then ``offline(count)`` to have one-time
material for ``count`` inferences in memory, then ``online`` once per inference. The server's
methods are called when the client's are (``parties`` carries the commands); the dealer serves
until they end the session.

A :class:`Keeping` backend can hold material on disk: ``prepare(count)`` lays it in, and
``offline``, in this or a later session, takes from it first. A session on stock needs no dealer,
whose channel is ``None`` there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..graph.ir import Graph
from ..net.channel import Channel


@dataclass(frozen=True)
class Options:
    """Public parameters of a session, equal on all sides.

    ``threads`` is per party; ``device`` is a torch device name for server and dealer; ``plan``
    names the precision the server is to use, and only the server's counts; ``model`` is the hash
    of the model that the client was told, and only the client's counts. ``ahead`` is
    the number of inferences for which the client announces, and the dealer at most makes, material
    before it is asked for. ``grant`` is the dealer's: called with the number of inferences whose
    material the client asks for, it may refuse them.
    """

    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    plan: str = "default"
    model: str | None = None
    ahead: int = 0
    grant: Callable[[int], None] = field(default=lambda count: None, compare=False)


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
        """Serve until a party ends the session."""
        ...


class Backend(Protocol):
    name: str

    def server(
        self, graph: Graph, client: Channel, dealer: Channel | None, options: Options
    ) -> ServerSession: ...

    def client(
        self, public: Graph, server: Channel, dealer: Channel | None, options: Options
    ) -> ClientSession: ...

    def dealer(self, server: Channel, client: Channel, options: Options) -> DealerSession: ...


@dataclass(frozen=True)
class Database:
    """A PostgreSQL database for material that several processes share.

    Attributes:
        url: ``postgresql://user@host/name``, without a password.
        password_file: whose first line is the password; without it libpq's own ways count
            (``PGPASSWORD``, ``PGPASSFILE``).
    """

    url: str
    password_file: Path | None = None


@runtime_checkable
class Keeping(Protocol):
    """A backend whose material can outlive a session."""

    def open_store(self, where: Path | Database, role: str, limit: int | None = None) -> None:
        """Keep material of this party ("client" or "server") in a directory or database.

        Args:
            limit: items kept for one pair of client and server.

        Raises:
            RefusedError: the directory is in use by another process, or a copy.
            PeerError: the database cannot be reached.
            PiError: it cannot be used otherwise.
        """
        ...


@runtime_checkable
class KeepingSession(Protocol):
    """A client's or server's session of such a backend."""

    @property
    def stock(self) -> int:
        """For how many inferences there is material that is not claimed yet."""
        ...

    def prepare(self, count: int) -> int:
        """Lay in material for ``count`` inferences; how many are in stock then."""
        ...


@runtime_checkable
class Stocked(Protocol):
    """A backend that can count what it holds."""

    def stock(self) -> int | None:
        """Inferences whose one-time material is in stock here; ``None`` where none is kept."""
        ...


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


def open_store(
    backend: Backend, where: Path | Database, role: str, limit: int | None = None
) -> None:
    """See :meth:`Keeping.open_store`.

    Raises:
        UsageError: this backend keeps no material.
    """
    if not isinstance(backend, Keeping):
        option = "--store" if isinstance(where, Path) else "--ledger"
        raise UsageError(f"the backend {backend.name!r} keeps no one-time material: no {option}")
    backend.open_store(where, role, limit)


def _entry(name: str) -> str:
    entry = _REGISTRY.get(name, name if ":" in name else None)
    if entry is None:
        raise UsageError(f"unknown backend {name!r}; known: {', '.join(_REGISTRY)}")
    return entry
