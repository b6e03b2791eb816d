"""pi-party between strangers: every party proves its role, and who cannot is refused in time."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from pi_system.cli.party import cli
from pi_system.errors import RefusedError
from pi_system.net import certificates
from pi_system.net.listen import Listener, connect
from pi_system.net.tls import Identity
from pi_system.parties import handshake
from pi_system.parties.handshake import Hello

Start = Callable[..., subprocess.Popen[str]]
TOY = ("--backend", "toy_backends:Plain")
HERE = ("--listen", "127.0.0.1:0")


@pytest.fixture
def start(start: Start) -> Start:
    """Every party here with a toy backend."""
    return lambda *arguments: start(*arguments, *TOY)


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready: dict[str, Any] = json.loads(process.stdout.readline())
    return f"{ready['host']}:{ready['port']}"


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and the one line on stderr of a party that ends by itself."""
    _, err = process.communicate(timeout=20)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return process.returncode, err[len("error: ") : -1]


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deployment's: a folder per role."""
    directory = tmp_path_factory.mktemp("certs")
    certificates.make(directory, folders=True)
    return directory


@pytest.fixture
def images(tmp_path: Path, toy_images: npt.NDArray[np.float32]) -> str:
    np.save(tmp_path / "images.npy", toy_images)
    return str(tmp_path / "images.npy")


class _DaysAgo(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) - timedelta(days=3)


def forge(kind: str, role: str, certs: Path, folder: Path) -> Path:
    """A folder that claims to be ``role`` and must not be believed; it trusts the authority."""
    if kind == "expired":
        for name in ("authority.pem", "authority.key"):
            shutil.copy(certs / name, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certificates, "datetime", _DaysAgo)
            certificates.make(folder, roles=[role], days=1)
        return folder
    shutil.copy(certs / "authority.pem", folder)
    if kind == "another authority":
        certificates.make(folder / "other", roles=[role])
        source, name = folder / "other", role
    elif kind == "self-signed":
        certificates.make(folder / "other", roles=[])
        source, name = folder / "other", "authority"
    else:  # the name of another role
        source, name = certs / kind, kind
    for end in ("pem", "key"):
        shutil.copy(source / f"{name}.{end}", folder / f"{role}.{end}")
    return folder


@pytest.mark.parametrize(
    ("kind", "at_dealer", "at_client"),
    [
        ("another authority", "certificate", "alert unknown ca"),
        ("self-signed", "certificate", "alert"),
        ("expired", "certificate has expired", "alert certificate expired"),
        ("dealer", "a server or client was expected, the certificate is for a dealer", "refused"),
        ("server", "role 'client' in the hello, 'server' in the certificate", "refused: "),
    ],
)
def test_a_client_that_is_none(
    start: Start, certs: Path, tmp_path: Path, images: str, kind: str, at_dealer: str,
    at_client: str,
) -> None:  # fmt: skip
    dealer = start("dealer", *HERE, "--once", "--certs", str(certs / "dealer"))
    dealer_at, began = address(dealer), time.monotonic()
    forged = forge(kind, "client", certs, tmp_path)
    with Listener("127.0.0.1", 0) as server:
        client = start(
            *("client", "--server", f"127.0.0.1:{server.port}", "--dealer", dealer_at),
            *("--images", images, "--certs", str(forged)),
        )
        with pytest.raises(RefusedError):  # the server too
            server.accept(
                wait=8, identity=Identity.of(certs / "server", "server"), roles=("client",)
            )
        for process, expected in ((client, at_client), (dealer, at_dealer)):
            code, line = end(process)
            assert code == 6 and expected in line, (code, line)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("kind", "at_client"),
    [
        ("another authority", "the dealer's certificate: unable to get local issuer"),
        ("self-signed", "the dealer's certificate: self-signed certificate"),
        ("expired", "the dealer's certificate: certificate has expired"),
        ("server", "a dealer was expected, the certificate is for a server"),
    ],
)
def test_a_dealer_that_is_none(
    start: Start, certs: Path, tmp_path: Path, images: str, kind: str, at_client: str
) -> None:
    forged = forge(kind, "dealer", certs, tmp_path)
    dealer = start("dealer", *HERE, "--once", "--certs", str(forged))
    at, began = address(dealer), time.monotonic()
    client = start(
        *("client", "--server", at, "--dealer", at, "--images", images),
        *("--certs", str(certs / "client")),
    )
    code, line = end(client)
    assert code == 6 and at_client in line
    code, line = end(dealer)
    assert code == 6
    assert time.monotonic() - began < 10


def test_a_plaintext_client(start: Start, certs: Path, images: str) -> None:
    dealer = start("dealer", *HERE, "--once", "--certs", str(certs / "dealer"))
    dealer_at, began = address(dealer), time.monotonic()
    with Listener("127.0.0.1", 0) as server:
        client = start(
            *("client", "--server", f"127.0.0.1:{server.port}", "--dealer", dealer_at),
            *("--images", images, "--insecure"),
        )
        with pytest.raises(RefusedError):  # the server too
            server.accept(wait=8, identity=Identity.of(certs / "server", "server"))
        code, line = end(client)
        assert code in (5, 6), line
        code, line = end(dealer)
        assert code == 6 and "no TLS with the server or client: " in line
    assert time.monotonic() - began < 10


def test_a_plaintext_dealer(start: Start, certs: Path, images: str) -> None:
    dealer = start("dealer", *HERE, "--once", "--insecure")
    at, began = address(dealer), time.monotonic()
    client = start(
        *("client", "--server", at, "--dealer", at, "--images", images),
        *("--certs", str(certs / "client")),
    )
    code, line = end(client)
    assert code == 6 and "no TLS with the dealer: wrong version number" in line
    code, line = end(dealer)
    assert code == 6 and "speaks TLS and this side does not" in line
    assert time.monotonic() - began < 10


def tls_1_2(protocol: int, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(identity.authority)
    context.load_cert_chain(identity.certificate, identity.key)
    return context


def test_tls_1_2_on_either_side(start: Start, certs: Path, images: str) -> None:
    dealer = start("dealer", *HERE, "--once", "--certs", str(certs / "dealer"))
    host, port = address(dealer).split(":")
    began = time.monotonic()
    old = tls_1_2(ssl.PROTOCOL_TLS_CLIENT, Identity.of(certs / "client", "client"))
    with (
        socket.create_connection((host, int(port))) as sock,
        pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
    ):
        old.wrap_socket(sock)
    code, line = end(dealer)
    assert code == 6 and "unsupported protocol" in line

    old = tls_1_2(ssl.PROTOCOL_TLS_SERVER, Identity.of(certs / "dealer", "dealer"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        at = f"127.0.0.1:{listener.getsockname()[1]}"
        client = start(
            *("client", "--server", at, "--dealer", at, "--images", images),
            *("--certs", str(certs / "client")),
        )
        accepted, _ = listener.accept()
        with accepted, pytest.raises(ssl.SSLError):
            old.wrap_socket(accepted, server_side=True)
        code, line = end(client)
    assert code == 6 and "no TLS with the dealer" in line
    assert time.monotonic() - began < 10


class Recorder:
    """A relay to ``target`` that keeps what the connecting side sends."""

    def __init__(self, target: str) -> None:
        host, port = target.split(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.at = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = bytearray()
        self._thread = threading.Thread(target=self._relay)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)
        self._listener.close()

    def _relay(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(self._target) as far:
            back = threading.Thread(target=_pump, args=(far, near, bytearray()))
            back.start()
            _pump(near, far, self.sent)
            back.join()

    def replay(self) -> bytes:
        """Send it all again; returns what comes back."""
        answer = bytearray()
        with socket.create_connection(self._target) as sock, contextlib.suppress(OSError):
            sock.settimeout(8)
            sock.sendall(self.sent)
            while data := sock.recv(1 << 16):
                answer += data
        return bytes(answer)


def _pump(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            seen += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_a_whole_session_its_replay_and_a_server_that_stays_up(
    start: Start, certs: Path, toys: ModuleType, toy_model: Path, images: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dealer = start("dealer", *HERE, "--certs", str(certs / "dealer"))
    dealer_at = address(dealer)
    server = start(
        *("server", *HERE, "--model", str(toy_model), "--dealer", dealer_at),
        *("--certs", str(certs / "server")),
    )
    server_at = address(server)
    monkeypatch.setenv("PI_PARTY_CERTS", str(certs / "client"))

    def classify(server_at: str, dealer_at: str, *more: str) -> subprocess.Popen[str]:
        at = ("--server", server_at, "--dealer", dealer_at)
        return start("client", *at, "--images", images, "--format", "json", *more)

    graph = toys.toy_graph()
    expected = toys.forward(graph, np.load(images)).argmax(1).tolist()
    with Recorder(server_at) as to_server, Recorder(dealer_at) as to_dealer:
        client = classify(to_server.at, to_dealer.at, "--expect-model", graph.sha256())
        out, err = client.communicate(timeout=20)
        assert (client.returncode, err) == (0, "")
    logits = [one["logits"][0] for one in json.loads(out)["inferences"]]
    assert np.argmax(logits, 1).tolist() == expected

    for recorder, process in ((to_server, server), (to_dealer, dealer)):
        assert len(recorder.sent) > 1000  # a certificate and more
        began = time.monotonic()
        answer = recorder.replay()
        assert b"done" not in answer and time.monotonic() - began < 10
        assert process.poll() is None

    code, line = end(classify(server_at, dealer_at, "--expect-model", "0" * 64))
    assert code == 6 and line == f"model {'0' * 64} expected, {graph.sha256()} at the server"
    code, line = end(classify(dealer_at, dealer_at))  # what listens there is no server
    assert code == 6 and line == "a server was expected, the certificate is for a dealer"
    monkeypatch.setenv("PI_PARTY_CERTS", str(forge("dealer", "client", certs, tmp_path)))
    code, line = end(classify(server_at, server_at))
    assert code == 6 and line == "a dealer was expected, the certificate is for a server"

    monkeypatch.setenv("PI_PARTY_CERTS", str(certs / "client"))
    client = classify(server_at, dealer_at)  # after all of this, a good client is served
    assert client.communicate(timeout=20)[1] == "" and client.returncode == 0
    logs = {}
    for name, process in (("server", server), ("dealer", dealer)):
        process.terminate()
        logs[name] = process.communicate(timeout=10)[1]
        assert "Traceback" not in logs[name]
        assert "no TLS with the" in logs[name], "the replay was not refused"
    assert "a client was expected, the certificate is for a dealer" in logs["server"]


def test_a_certified_client_cannot_speak_as_the_server(start: Start, certs: Path) -> None:
    dealer = start("dealer", *HERE, "--once", "--certs", str(certs / "dealer"))
    host, port = address(dealer).split(":")
    identity = Identity.of(certs / "client", "client")
    with connect(host, int(port), peer="dealer", identity=identity) as channel:
        handshake.say(channel, Hello("server", handshake.new_session(), TOY[1], 1))
        with pytest.raises(Exception, match="'server' in the hello, 'client' in the certificate"):
            channel.recv()
    assert end(dealer)[0] == 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["dealer", *HERE], "give --certs DIR (pi-party certs makes them) or"),
        (["dealer", "--listen", "0.0.0.0:0", "--insecure"], "for loopback only, not for 0.0.0.0"),
        (
            ["client", "--server", "127.0.0.1:1", "--dealer", "10.0.0.9:1", "--insecure",
             "--images", "x.npy"],
            "for loopback only, not for 10.0.0.9",
        ),
        (
            ["server", *HERE, "--model", "demo", "--dealer", "example.org:1", "--insecure"],
            "for loopback only, not for example.org",
        ),
        (["dealer", *HERE, "--certs", "nowhere"], "no nowhere/dealer.pem; pi-party certs makes"),
        (["dealer", *HERE, "--certs", "nowhere", "--insecure"], "not both"),
    ],
)  # fmt: skip
def test_how_links_are_protected_must_be_said(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert getattr(result.exception, "exit_code", None) == 2
    assert text in str(result.exception)


def test_certs_makes_what_is_missing_once(tmp_path: Path) -> None:
    run = CliRunner().invoke
    result = run(cli, ["certs", str(tmp_path), "--folders", "--days", "2"])
    assert result.exit_code == 0
    made = {str(Path(line).relative_to(tmp_path)) for line in result.stdout.split()}
    assert made == {"authority.pem", "authority.key"} | {
        f"{role}/{name}"
        for role in ("server", "client", "dealer")
        for name in ("authority.pem", f"{role}.pem", f"{role}.key")
    }
    before = (tmp_path / "client" / "client.key").read_bytes()
    result = run(cli, ["certs", str(tmp_path), "--folders", "--missing"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "client" / "client.key").read_bytes() == before
    result = run(cli, ["certs", str(tmp_path), "--folders"])
    assert getattr(result.exception, "exit_code", None) == 2
    assert "it is not replaced" in str(result.exception)
    result = run(cli, ["certs", str(tmp_path / "one"), "--role", "dealer"])
    assert result.stdout.count("\n") == 4
