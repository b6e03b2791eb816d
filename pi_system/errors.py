"""The exception tree of pi_system; every class carries the exit code of its command.

::

    PiError                 1  failure
    +-- UsageError          2  a wrong argument, file name, shape or configuration
    +-- UnsupportedLayer    2  a network that cannot be linearized or exported
    +-- BudgetError         3  a budget or a regression limit is broken
    +-- ParityError         4  the private answer differs from plaintext's
    +-- PeerError           5  a peer was lost, refused the connection or timed out
    |   +-- BusyError       5  a peer has no place for one more session now; try again later
    |   +-- PeerTimeout     5
    |   +-- ProtocolError   5  the peer sent something the protocol does not allow
    +-- RefusedError        6  identity, integrity or reuse of one-time material
        +-- IntegrityError  6  a corrupt, truncated or mismatched file
"""

from __future__ import annotations

import errno
from typing import Final

MAX_MESSAGE = 2000
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, over the quota, over the limit on a file's size."""


class PiError(Exception):
    """Base of everything this package raises on purpose. One line: what, where, what to do.

    A message may quote what a peer or a file said; whatever that was, its text is one printable
    line, so that it can neither break a log nor steer a terminal.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()[:MAX_MESSAGE]
        return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


class UsageError(PiError, ValueError):
    """A wrong argument, path, shape or configuration value."""

    exit_code = 2


class UnsupportedLayer(UsageError):
    """A layer that cannot be linearized or exported; the message names it and a way out."""


class BudgetError(PiError):
    """A measured or counted quantity is over its limit."""

    exit_code = 3


class ParityError(PiError):
    """A private or fixed-point answer is further from plaintext than allowed."""

    exit_code = 4


class PeerError(PiError):
    """A peer was lost, refused the connection or closed it early."""

    exit_code = 5


class BusyError(PeerError):
    """A peer has no place for one more session now; the same request may succeed later."""


class PeerTimeout(PeerError):
    """A peer did not answer within the time limit."""


class ProtocolError(PeerError):
    """A peer sent a message that the protocol does not allow at this point."""


class RefusedError(PiError):
    """Refused for identity, integrity or reuse of one-time material."""

    exit_code = 6


class IntegrityError(RefusedError):
    """A corrupt, truncated or mismatched file."""


def reason(error: OSError) -> str:
    """What is wrong and, where the disk is, what to do about it."""
    text = error.strerror or str(error)
    if error.errno in FULL:
        return f"{text}; make space and try again"
    if error.errno == errno.EROFS:
        return f"{text}; it must be writable"
    return text
