"""A client that stops after an inference, still connected, for tests that look into memory."""

from __future__ import annotations

import json
import sys

import numpy as np

from pi_system.backends import base
from pi_system.parties.address import parse_address
from pi_system.parties.client import Client, ClientSettings


def main(backend: str, server: str, dealer: str, images: str) -> None:
    settings = ClientSettings(
        parse_address(server), (parse_address(dealer),), base.get(backend), backend
    )
    array = np.load(images)
    with Client(settings) as client:
        client.setup()
        client.offline(1)
        logits = client.online(array)
        print(json.dumps(logits.tolist()), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
