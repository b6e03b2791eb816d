"""pi-party as a user runs it: three commands, several clients, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi_system.net.listen import Listener, connect

Start = Callable[..., subprocess.Popen[str]]
PARTY = [sys.executable, "-m", "pi_system.cli.party"]


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready: dict[str, Any] = json.loads(process.stdout.readline())
    assert ready["ready"] is True
    return f"{ready['host']}:{ready['port']}"


@pytest.fixture
def images(tmp_path: Path, toy_images: npt.NDArray[np.float32]) -> str:
    np.save(tmp_path / "images.npy", toy_images)
    return str(tmp_path / "images.npy")


TOY = ("--backend", "toy_backends:Plain", "--insecure")


def test_one_client_after_another_and_a_bad_one_between(
    start: Start, toy_model: Path, toys: ModuleType, images: str, tmp_path: Path
) -> None:
    dealer = start("dealer", "--listen", "127.0.0.1:0", *TOY)
    dealer_at = address(dealer)
    server = start(
        "server", "--model", str(toy_model), "--listen", "127.0.0.1:0", "--dealer", dealer_at, *TOY
    )
    server_at = address(server)

    def client(*more: str, file: str = images) -> tuple[int, str, str]:
        process = start(
            "client", "--server", server_at, "--dealer", dealer_at, "--images", file, *TOY, *more
        )
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    expected = toys.forward(toys.toy_graph(), np.load(images)).argmax(1).tolist()
    code, out, err = client("--format", "csv")
    assert (code, err) == (0, "")
    rows = [line.split(",") for line in out.splitlines()]
    assert rows[0] == ["image", "class", "name", "logit", "milliseconds"]
    assert [int(row[1]) for row in rows[1:]] == expected
    assert [row[2] for row in rows[1:]] == [f"class {index}" for index in expected]

    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((1, 3, 9, 9), np.float32))
    code, out, err = client(file=str(wrong))
    assert (code, out) == (2, "")
    assert err == "error: images of shape (1, 3, 9, 9); the model takes (N, 3, 8, 8)\n"

    host, port = server_at.split(":")
    with connect(host, int(port)) as nonsense:  # not one of us
        nonsense.send(b"GET / HTTP/1.1")
        with pytest.raises(Exception, match="no valid JSON"):
            nonsense.recv()

    code, out, err = client("--format", "json", "--output", str(tmp_path / "out.json"))
    assert (code, out, err) == (0, "", "")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["metadata"]["name"] == "toy" and len(report["inferences"]) == 3

    for process in (server, dealer):
        process.terminate()
        _, log = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in log
        if process is server:
            events = [json.loads(line) for line in log.splitlines()]
            ends = [e for e in events if e["event"] in ("ended", "failed", "refused")]
            assert [e["event"] for e in ends] == ["ended", "failed", "refused", "ended"]
            assert [e["inferences"] for e in ends] == [3, 0, 0, 3]
            assert all(e["error"].startswith("the client ") for e in ends[1:3])


def test_dealers_are_found_in_any_order_and_lists_that_leave_it_open_are_refused(
    start: Start, toy_model: Path, images: str
) -> None:
    dealers = [address(start("dealer", "--listen", "127.0.0.1:0", *TOY)) for _ in range(2)]
    one, other = dealers
    server = start(
        *("server", "--model", str(toy_model), "--listen", "127.0.0.1:0", *TOY),
        *("--dealer", f"{one},{other}"),
    )
    at = address(server)

    def client(dealers: str) -> subprocess.Popen[str]:
        known = ("--server", at, "--dealer", dealers)
        return start("client", *known, "--images", images, "--format", "csv", *TOY)

    unknown = f"localhost:{one.split(':')[1]}"
    good = [client(f"{other},{one}"), client(other), client(f"{unknown},{other}")]
    bad = client(unknown)
    for process in good:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    _, err = bad.communicate(timeout=60)
    assert bad.returncode == 6 and f"dealers {one},{other} here, {unknown} at the client" in err
    assert err.count("\n") == 1


def npy(tmp_path: Path, array: npt.NDArray[Any]) -> str:
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    return str(path)


@pytest.mark.parametrize(
    ("make", "code", "text"),
    [
        (lambda path: str(path / "none.npy"), 2, "cannot read"),
        (lambda path: npy(path, np.zeros((1, 3, 8, 8))), 2, "holds float64; wanted are"),
        (lambda path: npy(path, np.array([{}])), 6, "not a whole .npy file"),
        (lambda path: __file__, 6, "not a whole .npy file"),
    ],
)
def test_files_that_are_no_images(
    start: Start, tmp_path: Path, make: Callable[[Path], str], code: int, text: str
) -> None:
    at = ("--server", "127.0.0.1:1", "--dealer", "127.0.0.1:1")
    process = start("client", *at, "--images", make(tmp_path), *TOY)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code and out == ""
    assert text in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_port_in_use_a_bad_address_and_an_unknown_backend(start: Start, toy_model: Path) -> None:
    with Listener("127.0.0.1", 0) as listener:
        taken = f"127.0.0.1:{listener.port}"
        model = ("--model", str(toy_model), "--dealer", taken)
        cases = [
            (start("server", *model, "--listen", taken, *TOY), "the port is in use"),
            (start("dealer", "--listen", taken, *TOY), "the port is in use"),
            (start("dealer", "--listen", "7000", *TOY), "'7000' is no address"),
            (
                start("dealer", "--listen", "127.0.0.1:0", "--backend", "x", "--insecure"),
                "unknown backend 'x'",
            ),
            (start("dealer"), "Missing option '--listen'"),
        ]
        for process, text in cases:
            out, err = process.communicate(timeout=30)
            assert process.returncode == 2 and out == "" and text in err


def test_parties_that_never_come(start: Start, images: str, toy_model: Path) -> None:
    """A client without a server, and a server whose dealer is absent: code 5 in time."""
    with Listener("127.0.0.1", 0) as reserved:
        nobody = f"127.0.0.1:{reserved.port}"
    started = time.monotonic()
    lonely = start(
        *("client", "--server", nobody, "--dealer", nobody, "--images", images),
        *("--timeout", "1", *TOY),
    )
    _, err = lonely.communicate(timeout=30)
    assert lonely.returncode == 5 and "cannot reach the dealer" in err
    assert time.monotonic() - started < 10

    with Listener("127.0.0.1", 0) as silent:  # a dealer that accepts and says nothing
        server = start(
            *("server", "--model", str(toy_model), "--listen", "127.0.0.1:0", "--once"),
            *("--dealer", nobody, "--timeout", "2", *TOY),
        )
        client = start(
            *("client", "--server", address(server), "--images", images, "--timeout", "2"),
            *("--dealer", f"127.0.0.1:{silent.port}", *TOY),
        )
        _, err = client.communicate(timeout=30)
        assert client.returncode == 5
        assert "the server gave up: cannot reach the dealer" in err
        _, err = server.communicate(timeout=30)
        assert server.returncode == 5 and err.startswith("error: cannot reach the dealer")


@pytest.mark.usefixtures("parties")
def test_without_crypten_its_backend_says_how_to_get_it() -> None:
    program = (
        "import sys\nsys.modules['crypten'] = None\n"
        "from pi_system.cli import common, party\n"
        "sys.exit(common.run(party.cli, ['dealer', '--backend', 'crypten',"
        " '--listen', '127.0.0.1:0', '--insecure']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "pip install --no-deps crypten" in done.stderr
