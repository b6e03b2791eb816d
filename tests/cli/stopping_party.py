"""``pi-party``, stopped by SIGSTOP at a point of its first session, as a host that hangs is.

    STOP_AT=setup|offline|idle python stopping_party.py ROLE ...

In setup and offline in the middle of the phase, idle after the first inference (the dealer: after
the first request for material). With COMPUTE=SECONDS a server computes for so long within offline.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pi_system.backends.fss import client, dealer, offline, server
from pi_system.cli.party import main
from pi_system.parties import client as party

_POINTS: dict[tuple[str, str], tuple[Any, str]] = {
    ("server", "setup"): (server.pairing, "meet_client"),
    ("server", "offline"): (offline, "receive"),
    ("server", "idle"): (server.Server, "online"),
    ("client", "setup"): (client.pairing, "meet_server"),
    ("client", "offline"): (offline, "make"),
    ("client", "idle"): (party.Client, "online"),
    ("dealer", "setup"): (dealer.Dealer, "_receive_weights"),
    ("dealer", "offline"): (offline, "deal"),
    ("dealer", "idle"): (dealer.Dealer, "_serve"),
}


def stop(place: Any, name: str, *, after: bool) -> None:
    """Before or after its first call of a function this process is stopped, once."""
    function: Callable[..., Any] = getattr(place, name)

    def stopping(*arguments: Any, **named: Any) -> Any:
        setattr(place, name, function)
        if not after:
            os.kill(os.getpid(), signal.SIGSTOP)
        result = function(*arguments, **named)
        if after:
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(place, name, stopping)


def compute(seconds: float) -> None:
    """Have the server's offline phase take so long, all of it in numpy."""
    function = offline.receive

    def slow(*arguments: Any) -> Any:
        offline.receive = function
        matrix = np.ones((600, 600))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            matrix = matrix @ matrix / 600
        return function(*arguments)

    offline.receive = slow


if __name__ == "__main__":
    if seconds := os.environ.get("COMPUTE"):
        compute(float(seconds))
    if point := os.environ.get("STOP_AT"):
        stop(*_POINTS[sys.argv[1], point], after=point == "idle")
    main()
