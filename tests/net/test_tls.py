"""Mutual TLS over real sockets: who gets in, and how everybody else is refused."""

from __future__ import annotations

import contextlib
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from pi_system.errors import PeerError, PeerTimeout, PiError, RefusedError, UsageError
from pi_system.net import certificates
from pi_system.net.link import Link
from pi_system.net.listen import Listener, connect
from pi_system.net.tls import Identity, require_loopback

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    certificates.make(directory)
    return directory


def _meet(accept: Callable[[Listener], Any], dial: Callable[[int], Any]) -> tuple[Any, Any]:
    """What each side ended with, a value or an exception."""
    results: list[Any] = [None, None]

    def run(index: int, action: Callable[[], Any]) -> None:
        try:
            results[index] = action()
        except (PiError, OSError) as error:
            results[index] = error

    with Listener(HOST, 0) as listener:
        threads = [
            threading.Thread(target=run, args=(0, lambda: accept(listener))),
            threading.Thread(target=run, args=(1, lambda: dial(listener.port))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    return results[0], results[1]


def _server(certs: Path, roles: tuple[str, ...] = ("client",)) -> Callable[[Listener], Any]:
    def accept(listener: Listener) -> Any:
        identity = Identity.of(certs, "server")
        with listener.accept(wait=5, timeout=2, identity=identity, roles=roles) as channel:
            received = channel.recv()
            channel.send(received[::-1])
            return received

    return accept


def _client(
    certs: Path, *, role: str = "client", peer: str = "server", link: Link | None = None
) -> Callable[[int], Any]:
    def dial(port: int) -> Any:
        identity = Identity.of(certs, role)
        with connect(HOST, port, timeout=2, peer=peer, identity=identity, link=link) as channel:
            channel.send(b"secret")
            return channel.recv()

    return dial


def test_two_parties_of_one_authority_talk(certs: Path) -> None:
    assert _meet(_server(certs), _client(certs)) == (b"secret", b"terces")


def test_large_frames_both_ways_at_once(certs: Path) -> None:
    data = bytes(range(256)) * 20_000

    def accept(listener: Listener) -> Any:
        with listener.accept(wait=5, identity=Identity.of(certs, "server")) as channel:
            return channel.exchange(data)

    def dial(port: int) -> Any:
        with connect(HOST, port, peer="server", identity=Identity.of(certs, "client")) as channel:
            return channel.exchange(data[::-1])

    assert _meet(accept, dial) == (data[::-1], data)


def test_spinning_and_reading_ahead_over_tls(certs: Path) -> None:
    """Both send more than the network holds, and one takes it in meanwhile; then both idle."""
    frames, size = 20, 1 << 18

    def talk(channel: Any, ahead: int) -> Any:
        with channel.spinning(0.02), channel.reading_ahead(ahead):
            for i in range(frames):
                channel.send(bytes([i]) * size)
            received = [channel.recv() for _ in range(frames)]
            channel.send(b"")
            assert channel.recv() == b""
            if ahead:
                time.sleep(0.1)
                channel.send(b"end")
                return received
            assert channel.recv() == b"end"
            return received

    def accept(listener: Listener) -> Any:
        with listener.accept(wait=5, identity=Identity.of(certs, "server")) as channel:
            return talk(channel, frames * (size + 4))

    def dial(port: int) -> Any:
        with connect(HOST, port, peer="server", identity=Identity.of(certs, "client")) as channel:
            return talk(channel, 0)

    expected = [bytes([i]) * size for i in range(frames)]
    assert _meet(accept, dial) == (expected, expected)


def test_an_emulated_link_carries_tls(certs: Path) -> None:
    link = Link("x", 20, 100)

    def accept(listener: Listener) -> Any:
        identity = Identity.of(certs, "server")
        with listener.accept(wait=5, identity=identity, link=link) as channel:
            channel.send(channel.recv())

    started = time.monotonic()
    assert _meet(accept, _client(certs, link=link))[1] == b"secret"
    assert time.monotonic() - started > 0.02


def test_nothing_readable_is_on_the_wire(certs: Path) -> None:
    seen = bytearray()

    def dial(port: int) -> Any:
        with socket.create_server((HOST, 0)) as proxy:
            thread = threading.Thread(target=_relay, args=(proxy, port, seen))
            thread.start()
            answer = _client(certs)(proxy.getsockname()[1])
            thread.join()
            return answer

    assert _meet(_server(certs), dial)[1] == b"terces"
    assert len(seen) > 1000 and b"secret" not in seen and b"terces" not in seen


def _relay(proxy: socket.socket, port: int, seen: bytearray) -> None:
    near, _ = proxy.accept()
    with near, socket.create_connection((HOST, port)) as far:
        threads = [
            threading.Thread(target=_pump, args=(a, b, seen)) for a, b in ((near, far), (far, near))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _pump(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    while data := source.recv(1 << 16):
        seen += data
        target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_another_authority_is_refused(certs: Path, tmp_path: Path) -> None:
    certificates.make(tmp_path)
    server, client = _meet(_server(certs), _client(tmp_path))
    assert isinstance(client, RefusedError)
    assert isinstance(server, RefusedError)
    assert server.exit_code == client.exit_code == 6


def test_a_stranger_to_the_server_alone_is_refused(certs: Path, tmp_path: Path) -> None:
    """The client trusts the server's authority, but its own certificate is another's."""
    certificates.make(tmp_path)
    (tmp_path / "authority.pem").write_bytes((certs / "authority.pem").read_bytes())
    server, client = _meet(_server(certs), _client(tmp_path))
    assert isinstance(server, RefusedError) and "certificate" in str(server)
    assert isinstance(client, RefusedError), client


def test_a_self_signed_certificate_is_refused(certs: Path, tmp_path: Path) -> None:
    for name in ("authority.pem", "client.pem"):
        (tmp_path / name).write_bytes((certs / name).read_bytes())
    certificates.make(tmp_path / "own")
    (tmp_path / "client.pem").write_bytes((tmp_path / "own" / "authority.pem").read_bytes())
    (tmp_path / "client.key").write_bytes((tmp_path / "own" / "authority.key").read_bytes())
    server, _ = _meet(_server(certs), _client(tmp_path))
    assert isinstance(server, RefusedError), server


@pytest.mark.parametrize("role", ["server", "dealer"])
def test_another_role_is_refused_by_the_listening_side(certs: Path, role: str) -> None:
    server, client = _meet(_server(certs), _client(certs, role=role))
    assert isinstance(server, RefusedError)
    assert str(server) == f"a client was expected, the certificate is for a {role}"
    assert isinstance(client, PeerError | RefusedError)


def test_another_role_is_refused_by_the_connecting_side(certs: Path) -> None:
    _, client = _meet(_server(certs), _client(certs, peer="dealer"))
    assert isinstance(client, RefusedError)
    assert str(client) == "a dealer was expected, the certificate is for a server"


@pytest.mark.parametrize(("days", "reason"), [(-3, "has expired"), (3, "is not yet valid")])
def test_a_certificate_of_another_time_is_refused_and_the_clock_named(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, reason: str
) -> None:
    for name in ("authority.pem", "authority.key"):
        (tmp_path / name).write_bytes((certs / name).read_bytes())

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(certificates, "datetime", Shifted)
    certificates.make(tmp_path, roles=["client"], days=1)
    server, client = _meet(_server(certs), _client(tmp_path))
    assert isinstance(server, RefusedError)
    assert f"certificate {reason} (or the clock of this machine is wrong)" in str(server)
    assert isinstance(client, RefusedError)


def test_a_plaintext_peer_is_refused(certs: Path) -> None:
    def dial(port: int) -> Any:
        with connect(HOST, port, timeout=2) as channel:
            channel.send(b"hello in clear")
            return channel.recv()

    server, client = _meet(_server(certs), dial)
    assert isinstance(server, RefusedError)
    assert isinstance(client, PiError)


def test_a_plaintext_server_is_refused(certs: Path) -> None:
    def accept(listener: Listener) -> Any:
        with listener.accept(wait=5, timeout=2) as channel:
            return channel.recv()

    server, client = _meet(accept, _client(certs))
    assert isinstance(server, PiError)
    assert isinstance(client, PiError)


def test_tls_1_2_is_refused(certs: Path) -> None:
    def dial(port: int) -> Any:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(certs / "authority.pem")
        context.load_cert_chain(certs / "client.pem", certs / "client.key")
        with socket.create_connection((HOST, port)) as sock, context.wrap_socket(sock):
            return "connected"

    server, client = _meet(_server(certs), dial)
    assert isinstance(server, RefusedError) and "protocol" in str(server)
    assert isinstance(client, ssl.SSLError)


def test_recorded_bytes_sent_again_are_refused(certs: Path) -> None:
    recorded = bytearray()

    def dial(port: int) -> Any:
        with socket.create_server((HOST, 0)) as proxy:
            thread = threading.Thread(target=_record, args=(proxy, port, recorded))
            thread.start()
            answer = _client(certs)(proxy.getsockname()[1])
            thread.join()
            return answer

    assert _meet(_server(certs), dial) == (b"secret", b"terces")

    def again(port: int) -> Any:
        with socket.create_connection((HOST, port)) as sock:
            sock.sendall(recorded)
            sock.settimeout(5)
            while sock.recv(1 << 16):
                pass

    server, _ = _meet(_server(certs), again)
    assert isinstance(server, RefusedError), server


def _record(proxy: socket.socket, port: int, recorded: bytearray) -> None:
    """As :func:`_relay`, keeping only what the client sends."""
    near, _ = proxy.accept()
    with near, socket.create_connection((HOST, port)) as far:
        back = threading.Thread(target=_pump, args=(far, near, bytearray()))
        back.start()
        _pump(near, far, recorded)
        back.join()


def test_a_silent_peer_holds_nobody_for_long(certs: Path) -> None:
    started = time.monotonic()

    def dial(port: int) -> Any:
        with socket.create_connection((HOST, port)) as sock:
            return sock.recv(1)

    server, _ = _meet(_server(certs), dial)
    assert isinstance(server, PeerTimeout) and time.monotonic() - started < 5


def test_keys_are_private_and_nothing_is_replaced(tmp_path: Path) -> None:
    written = certificates.make(tmp_path, roles=["server"])
    assert {path.name for path in written} == {
        "authority.pem", "authority.key", "server.pem", "server.key",
    }  # fmt: skip
    for path in written:
        private = path.suffix == ".key"
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o644)
    with pytest.raises(UsageError, match="exists already"):
        certificates.make(tmp_path, roles=["server"])
    assert [path.name for path in certificates.make(tmp_path, roles=["client"])] == [
        "client.pem", "client.key",
    ]  # fmt: skip


def test_missing_and_mixed_up_files_are_named(certs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no .*client\.pem; pi-party certs"):
        Identity.of(tmp_path, "client")
    mixed = Identity(certs / "client.pem", certs / "server.key", certs / "authority.pem")
    first, second = socket.socketpair()
    with first, second, pytest.raises(UsageError, match="cannot use the certificate"):
        mixed.connect(first, role="server", seconds=1)


def test_plaintext_stays_on_loopback() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        require_loopback(host)
    for host in ("0.0.0.0", "10.0.0.5", "example.org", ""):
        with pytest.raises(UsageError, match="loopback only"):
            require_loopback(host)
