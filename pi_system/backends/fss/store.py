"""One-time material: claimed, and so burnt, before the first byte that depends on it.

Used twice, an item gives the server the difference of two images and the client the difference
of two activations at every layer, from which a first layer's weights follow. So an item leaves
the store when it is claimed, ids only increase, and whatever happens afterwards the id is spent.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from ...errors import RefusedError

Item = TypeVar("Item")


class Store(Generic[Item]):
    """Material of one party in one session, in memory, by inference id."""

    def __init__(self) -> None:
        self._items: dict[int, Item] = {}
        self._next = 0
        self._spent = -1

    @property
    def next_id(self) -> int:
        """The id the next item to be laid in will have."""
        return self._next

    def __len__(self) -> int:
        return len(self._items)

    def reserve(self, first: int, count: int) -> range:
        """Take ``count`` new ids, given out once whether or not material is ever made for them.

        Raises:
            RefusedError: ``first`` was given out already, so a peer's count is behind this one's.
        """
        if first < self._next or count < 0:
            raise RefusedError(
                f"inference ids from {first} were asked for, but ids below {self._next} are taken"
            )
        self._next = first + count
        return range(first, first + count)

    def add(self, inference: int, item: Item) -> None:
        """Lay in the material of a reserved id that is neither filled nor spent."""
        if not self._spent < inference < self._next or inference in self._items:
            raise RefusedError(f"inference {inference} cannot be filled: spent, full or unknown")
        self._items[inference] = item

    def claim_next(self) -> tuple[int, Item]:
        """Burn the lowest id in stock and return its material.

        Raises:
            RefusedError: the stock is empty.
        """
        if not self._items:
            raise RefusedError("no one-time material is left; run the offline phase first")
        inference = min(self._items)
        return inference, self.claim(inference)

    def claim(self, inference: int) -> Item:
        """Burn ``inference`` and every id below it; return the material of ``inference``.

        Raises:
            RefusedError: the id was spent before, or no material was made for it.
        """
        if inference <= self._spent:
            raise RefusedError(
                f"inference {inference} is spent (ids up to {self._spent} are); "
                "one-time material is never used twice"
            )
        if inference not in self._items:
            raise RefusedError(f"there is no one-time material for inference {inference}")
        self._spent = inference
        item = self._items.pop(inference)
        for skipped in [key for key in self._items if key < inference]:
            del self._items[skipped]
        return item
