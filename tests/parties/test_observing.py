"""What operators see: /metrics, /healthz, pi-party status, and how options are configured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from pi_system.cli.party import cli
from pi_system.errors import BusyError, PeerError, UsageError
from pi_system.parties import commands
from pi_system.parties.classify import classify, prepare
from pi_system.parties.client import Client
from pi_system.parties.commands import Command

Images = npt.NDArray[np.float32]
Deploy = Callable[..., Any]
PATIENCE = 30.0
"""Seconds that a busy machine may take; nothing waits for them otherwise."""
PARTY = [sys.executable, "-m", "pi_system.cli.party"]


def get(at: str, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{at}{page}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def samples(at: str) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels."""
    code, text = get(at, "/metrics")
    assert code == 200
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def wait_for(at: str, total: float, *counter: str) -> None:
    """Until a counter says so: a party writes down what ends after its peer has heard of it."""
    until = time.monotonic() + PATIENCE
    while samples(at).get(counter, 0) < total and time.monotonic() < until:
        time.sleep(0.02)


def test_what_happened_is_counted_and_shown(
    deploy: Deploy, toy_images: Images, tmp_path: Path
) -> None:
    from pi_system.backends import base

    watched = ("--metrics", "0")
    store = ("--store", str(tmp_path / "server"))
    made = deploy("--per-client", "1", *store, *watched, dealer=watched, backend="fss")
    at, dealer_at = made.server.metrics, made.dealer.metrics
    assert at.startswith("127.0.0.1:") and get(at, "/healthz") == (200, "serving\n")
    assert get(at, "/secrets")[0] == 404
    assert samples(at)["pi_inferences_total",] == samples(at)["pi_material_left",] == 0

    backend = base.get("fss")
    base.open_store(backend, tmp_path / "client", "client")
    assert prepare(made.client(backend=backend), 3) == 3
    report = classify(made.client(backend=backend), toy_images[:1])
    with Client(made.client()) as client, pytest.raises(BusyError):
        client.setup()
        Client(made.client())
    wait_for(at, 1, "pi_refusals_total", "BusyError")
    wait_for(at, 3, "pi_sessions_total", "ended")
    with pytest.raises(PeerError), Client(made.client()) as client:
        commands.send(client._server, Command("online", 0))  # out of turn
        client.ping()

    wait_for(at, 1, "pi_sessions_total", "failed")
    wait_for(dealer_at, 3, "pi_material_total")
    found = samples(at)
    assert found["pi_inferences_total",] == 1 and found["pi_material_left",] == 2
    assert found["pi_sessions_total", "ended"] == 3 and found["pi_sessions_total", "failed"] == 1
    assert found["pi_refusals_total", "BusyError"] == 1
    assert found["pi_request_seconds_count", "online"] == 1
    online = [event for event in report.meter["events"] if event[0] == "online"]
    sent = sum(event[5] for event in online if event[4] == "sent")
    received = sum(event[5] for event in online if event[4] == "received")
    assert found["pi_bytes_total", "online", "sent"] == received
    assert 0 <= sent - found["pi_bytes_total", "online", "received"] < 20  # the command itself
    assert samples(dealer_at)["pi_material_total",] == 3

    shown = status("--at", at, "--at", dealer_at, "--format", "json")
    assert shown.returncode == 0
    server, dealer = json.loads(shown.stdout)
    assert (server["role"], server["stock"], dealer["stock"]) == ("server", 2, None)
    assert server["totals"]["refused"] == 1 and server["totals"]["inferences"] == 1
    kinds = [error["kind"] for error in server["errors"] if "kind" in error]
    assert kinds == ["BusyError", "ProtocolError"]
    with Client(made.client()):
        shown = status("--at", at)
    assert "1 of 8 run" in shown.stdout and "host:127.0.0.1" in shown.stdout
    assert "Last errors" in shown.stdout and "failed" in shown.stdout

    made.dealer.process.kill()
    made.dealer.process.wait()
    shown = status("--at", dealer_at, "--timeout", "2")
    assert shown.returncode == 5 and shown.stdout == ""
    assert f"error: cannot reach {dealer_at}" in shown.stderr


def status(*arguments: str) -> subprocess.CompletedProcess[str]:
    patience = () if "--timeout" in arguments else ("--timeout", str(PATIENCE))
    command = [*PARTY, "status", *arguments, *patience]
    return subprocess.run(command, capture_output=True, text=True)


def test_health_says_when_a_server_stops(deploy: Deploy) -> None:
    made = deploy("--metrics", "0")
    with Client(made.client()) as client:
        client.setup()
        client.offline(1)
        commands.send(client._server, Command("online", 0))
        time.sleep(0.3)  # the server has taken it and waits for the image
        made.server.process.terminate()
        until = time.monotonic() + PATIENCE
        while (code := get(made.server.metrics, "/healthz")[0]) == 200 and time.monotonic() < until:
            time.sleep(0.01)
        assert code == 503
        client._session.online(np.zeros((1, 3, 8, 8), np.float32))


CONFIGURED = """
listen = "127.0.0.1:0"
insecure = true
backend = "toy_backends:Plain"
sessions = 3
queue = 2
log = "none"
"""


@pytest.mark.usefixtures("toy_path")
def test_options_from_a_file_the_environment_and_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "pi_system.cli.party.options.serve", lambda host, *rest: seen.update(limits=host.admission)
    )
    path = tmp_path / "dealer.toml"
    path.write_text(CONFIGURED)

    def limits(*more: str, **environment: str) -> tuple[int, int]:
        result = CliRunner().invoke(
            cli, ["dealer", "--config", str(path), *more], env=environment, catch_exceptions=False
        )
        assert result.exit_code == 0
        found = seen["limits"].limits
        return found.sessions, found.queue

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    assert limits() == (3, 2)
    assert limits(PI_PARTY_DEALER_SESSIONS="5") == (5, 2)
    assert limits("--sessions", "7", PI_PARTY_DEALER_SESSIONS="5") == (7, 2)
    for text, reason in (
        ("session = 3", "unknown key 'session'; known keys are ahead, backend, "),
        ("sessions = [3]", "sessions: expected a text, a number"),
        ("sessions =", "is not valid TOML"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=reason):
            limits()
    path.write_text(CONFIGURED + "per-client = 0")
    result = CliRunner().invoke(cli, ["dealer", "--config", str(path)])
    assert result.exit_code == 2 and "Invalid value for '--per-client'" in result.output


def test_a_client_needs_no_metrics() -> None:
    program = (
        "import sys\nfrom pi_system.parties import classify, server, dealer\n"
        "assert 'prometheus_client' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
