"""Where one-time randomness comes from: seeds from the operating system, and streams from seeds.

The parties draw through a :class:`Source` so that an audit can give its own parties a bad one and
show that it is noticed. The backend of the registry always has this one.
"""

from __future__ import annotations

from typing import Final

from . import prg
from .masks import Bundle
from .prg import Stream
from .public import Public


class Source:
    """The only source of a party that serves."""

    def seed(self) -> bytes:
        """A seed that nobody has seen."""
        return prg.fresh_seed()

    def bundle(self, public: Public, seed: bytes, inference: int) -> Bundle:
        """The masks of one inference, which client and dealer expand alike."""
        return Bundle(seed, public.model, inference)

    def private(self, seed: bytes, inference: int, tensor: str) -> Stream:
        """The dealer's own randomness for one batch of gates."""
        return Stream(seed, inference, tensor, "dealer")


SYSTEM: Final = Source()
