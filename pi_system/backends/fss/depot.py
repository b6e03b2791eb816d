"""Where the items of a store are, beside its ledger: in memory or in a directory.

A :class:`Depot` has a ledger and a shelf per pair. The third one, in a database that several
processes share, is :mod:`.postgres`. An item's bytes are :class:`.material.Codec`'s.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from ... import files
from ...errors import IntegrityError, PiError, RefusedError, UsageError, reason
from . import ledger as ledgers
from .ledger import Entry, Ledger, SqliteLedger
from .material import Codec

Item = TypeVar("Item")

_SUFFIX: Final = ".item"


class Shelf(Protocol[Item]):
    """Items of one pair by inference id, as one session uses them."""

    def ids(self) -> list[int]:
        """In increasing order."""
        ...

    def advance(self, before: Entry, after: Entry, claimed: tuple[int, ...]) -> None:
        """Change the pair's entry as :meth:`.ledger.Ledger.advance` does.

        Args:
            claimed: ids that are burnt by it and will be taken.
        """
        ...

    def put(self, inference: int, item: Item) -> None:
        """Lay in an item.

        Raises:
            RefusedError: its id was burnt meanwhile.
            PiError: it cannot be written.
        """
        ...

    def take(self, inference: int) -> Item:
        """Remove and return an item that was claimed.

        Raises:
            RefusedError: it is missing, damaged or not this pair's.
        """
        ...

    def drop(self, inferences: Iterable[int]) -> None: ...


class Depot(Protocol):
    """A ledger and the items of its pairs."""

    @property
    def ledger(self) -> Ledger: ...
    def shelf(self, pair: str, codec: Codec[Item]) -> Shelf[Item]: ...
    def count(self) -> int:
        """Items of all pairs."""
        ...

    def close(self) -> None: ...


class _Ledgered:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def advance(self, before: Entry, after: Entry, claimed: tuple[int, ...]) -> None:
        self._ledger.advance(before, after)


class MemoryShelf(_Ledgered, Generic[Item]):
    """Items in this process."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._items: dict[int, Item] = {}

    def ids(self) -> list[int]:
        return sorted(self._items)

    def put(self, inference: int, item: Item) -> None:
        self._items[inference] = item

    def take(self, inference: int) -> Item:
        if inference not in self._items:
            raise RefusedError(f"the material of inference {inference} is missing")
        return self._items.pop(inference)

    def drop(self, inferences: Iterable[int]) -> None:
        for inference in inferences:
            self._items.pop(inference, None)


class Memory:
    """A depot that ends with the process."""

    def __init__(self, role: str) -> None:
        self.ledger: Ledger = SqliteLedger(None, role)
        self._shelves: dict[str, MemoryShelf[Any]] = {}

    def shelf(self, pair: str, codec: Codec[Item]) -> Shelf[Item]:
        return self._shelves.setdefault(pair, MemoryShelf(self.ledger))

    def count(self) -> int:
        return sum(len(shelf.ids()) for shelf in list(self._shelves.values()))

    def close(self) -> None:
        self.ledger.close()


class DiskShelf(_Ledgered, Generic[Item]):
    """Items as files of a directory, which is made if need be."""

    def __init__(self, ledger: Ledger, directory: Path, codec: Codec[Item]) -> None:
        super().__init__(ledger)
        self._directory = directory
        self._codec = codec
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            for path in directory.iterdir():
                if path.suffix != _SUFFIX:
                    path.unlink()  # a file half written when its process was killed
        except OSError as error:
            raise PiError(f"cannot use {directory}: {reason(error)}") from error

    def _path(self, inference: int) -> Path:
        return self._directory / f"{inference:010d}{_SUFFIX}"

    def ids(self) -> list[int]:
        names = (path.stem for path in self._directory.iterdir() if path.suffix == _SUFFIX)
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def put(self, inference: int, item: Item) -> None:
        path = self._path(inference)
        try:
            files.write_atomic(path, self._codec.encode(inference, item), mode=0o600)
        except OSError as error:
            raise PiError(f"cannot write {path}: {reason(error)}") from error

    def take(self, inference: int) -> Item:
        path = self._path(inference)
        try:
            with open(path, "rb", buffering=0) as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                if file.readinto(data) != len(data):
                    raise IntegrityError(f"{path} ended while it was read")
            path.unlink()
        except FileNotFoundError as error:
            raise RefusedError(f"{path}: the material of inference {inference} is gone") from error
        except OSError as error:
            raise PiError(f"cannot take {path}: {reason(error)}") from error
        return decode(self._codec, inference, data, str(path))

    def drop(self, inferences: Iterable[int]) -> None:
        for inference in inferences:
            path = self._path(inference)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise PiError(f"cannot remove {path}: {reason(error)}") from error


class Directory:
    """A depot of one process: a ledger in SQLite and a file per item.

    Args:
        directory: made if need be, 0700.

    Raises:
        RefusedError: the directory is in use, open to others, a copy, or of the other role.
        UsageError: the directory holds other things.
        PiError: it cannot be written.
    """

    def __init__(self, directory: Path, role: str) -> None:
        self._directory = directory.absolute()
        _prepare(self._directory)
        self.ledger: Ledger = SqliteLedger(self._directory, role)
        _sweep(self._directory, self.ledger.pairs())

    def shelf(self, pair: str, codec: Codec[Item]) -> Shelf[Item]:
        return DiskShelf(self.ledger, self._directory / pair, codec)

    def count(self) -> int:
        return sum(1 for _ in self._directory.glob(f"*/*{_SUFFIX}"))

    def close(self) -> None:
        self.ledger.close()


def decode(codec: Codec[Item], inference: int, data: bytearray, where: str) -> Item:
    """An item from bytes that are deleted already.

    Raises:
        RefusedError: they are damaged or of something else; the message says that it is burnt.
    """
    burnt = "it is burnt, the next one can be used"
    try:
        return codec.decode(inference, data)
    except IntegrityError as error:
        raise IntegrityError(f"{where}: {error}; {burnt}") from error
    except RefusedError as error:
        raise RefusedError(f"{where}: {error}; {burnt}") from error


def is_name(value: object) -> bool:
    """Whether a peer's word is something that :func:`.ledger.new_id` can make."""
    return isinstance(value, str) and len(value) == 32 and not set(value) - set("0123456789abcdef")


def _prepare(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = set(os.listdir(directory))
        if ledgers.FILE not in found:
            if found - {"lost+found"}:
                raise UsageError(f"{directory} is neither empty nor a store of material")
            directory.chmod(0o700)
        if stat.S_IMODE(directory.stat().st_mode) & 0o077:
            raise RefusedError(f"{directory} is open to other users; chmod 700 it, or begin anew")
    except OSError as error:
        raise PiError(f"cannot use {directory} as a store: {reason(error)}") from error


def _sweep(directory: Path, pairs: set[str]) -> None:
    """Remove the material of pairs that the ledger does not know."""
    for path in directory.iterdir():
        if is_name(path.name) and path.name not in pairs:
            shutil.rmtree(path, ignore_errors=True)
