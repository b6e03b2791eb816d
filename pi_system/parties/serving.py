"""What the two listening roles, server and dealer, have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from ..backends.base import Backend
from ..errors import PiError
from ..net.link import Link
from ..net.tls import Identity
from .timeouts import Timeouts


@dataclass(frozen=True)
class ServingSettings:
    """How a listening role serves.

    Attributes:
        threads: of this party.
        device: torch device of the linear layers.
        link: the emulated network on every connection; None for none.
        identity: whom this party speaks for; ``None`` for plaintext.
        log_frames: keep the log of frames for :class:`Meter`'s readers.
    """

    backend: Backend
    backend_name: str
    threads: int = 1
    device: str = "cpu"
    timeouts: Timeouts = field(default_factory=Timeouts)
    link: Link | None = None
    identity: Identity | None = None
    log_frames: bool = False


def serve_forever(serve_once: Callable[[], object], report: Callable[[str], None]) -> NoReturn:
    """Serve sessions one after another; a failed one is reported in one line."""
    while True:
        try:
            serve_once()
        except PiError as error:
            report(f"session failed: {error}")
        except Exception as error:  # one session's bad luck is not the next one's
            report(f"session failed: unexpected {type(error).__name__}: {error}")
        else:
            report("session ended")
