"""One-time material of one inference, as each party that keeps some holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import relu
from .masks import Ends
from .ring import Words


@dataclass
class ServerMaterial:
    """Of one inference: h = W r' - u plus bias per linear operation, and the gates' shares."""

    h: dict[str, Words] = field(default_factory=dict)
    gates: dict[str, tuple[Words, relu.Share]] = field(default_factory=dict)


@dataclass
class ClientMaterial:
    """Of one inference: the masks of image and logits, and per gate batch a share and r'."""

    ends: Ends
    gates: dict[str, tuple[relu.Share, Words]] = field(default_factory=dict)
