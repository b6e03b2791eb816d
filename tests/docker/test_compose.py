"""docker-compose.yml for real: what it answers, and what each container and network gets to see.

Needs a Docker engine with compose v2. Where none runs, ``PI_SYSTEM_TOOLS`` may name a folder with
``docker_engine.sh`` (which starts one; run by root) and ``wanem.py`` (which joins two network
namespaces by an emulated link).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi_system.graph import serialize
from pi_system.graph.execute import run
from pi_system.models import demo_images, normalise, resolve
from pi_system.net import certificates
from pi_system.net.listen import Listener

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(os.environ.get("PI_SYSTEM_TOOLS", "/nowhere"))
PROJECT = "pi-system-test"
ROLES = ("server", "client", "dealer")
NETWORKS = {
    "server": {"client_server", "server_dealer"},
    "client": {"client_server", "client_dealer"},
    "dealer": {"server_dealer", "client_dealer"},
}
CIPHERTEXT = b"\x17\x03\x03"
"""How a record of TLS begins: all there is to be read."""
ERROR = 0.15
"""Largest error of a logit, as the default plan of the bundled model states."""


def command(*words: str, timeout: float = 60, **options: Any) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def docker(*words: str, timeout: float = 60) -> str:
    return command("docker", *words, timeout=timeout)


def works(*words: str) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(words, capture_output=True, timeout=20).returncode == 0
    return False


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """A running engine; one started here is stopped, and the host's forwarding is as before."""
    if works("docker", "info") and works("docker", "compose", "version"):
        yield
        return
    script = TOOLS / "docker_engine.sh"
    if not script.is_file():
        pytest.skip("no Docker engine with compose v2 runs here")
    if os.getuid() != 0:
        pytest.skip("only root can start a Docker engine")
    switch = Path("/proc/sys/net/ipv4/ip_forward")
    forwards, policy = switch.read_text(), "ACCEPT"
    if shutil.which("iptables"):
        policy = command("iptables", "-S", "FORWARD").split()[2]
    started = subprocess.run([script, "up"], capture_output=True, text=True, timeout=400)
    if started.returncode != 0:
        pytest.skip(f"no Docker engine could be started: {started.stderr.splitlines()[-1:]}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in re.findall(r"(\w+)=(\S+)", started.stdout):
            patch.setenv(name, value)
        # Its stand-in for Python's image is made of Debian's packages.
        patch.setenv("BUILD_PACKAGES", "gcc libc6-dev python3-dev")
        patch.setenv("TORCH_INDEX", "")
        try:
            yield
        finally:
            command(str(script), "down")
            command("iptables", "-P", "FORWARD", policy)
            switch.write_text(forwards)


class Deployment:
    """The compose project, built from a copy of the sources."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def compose(self, *words: str, timeout: float = 120) -> str:
        base = ("docker", "compose", "--project-name", PROJECT)
        return command(*base, *words, timeout=timeout, cwd=self.folder)

    def container(self, service: str) -> str:
        return f"{PROJECT}-{service}-1"

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(docker("inspect", self.container(service)))[0]
        return found


@pytest.fixture(scope="module")
def deployment(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("Dockerfile", ".dockerignore", "docker-compose.yml", "compose.two-hosts.yml",
                 "pyproject.toml", "setup.py", "README.md", "LICENSE"):  # fmt: skip
        shutil.copy(ROOT / name, folder)
    for name in ("native", "pi_system", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    # With this model given, the build need not install torch to export it.
    (folder / "given" / "models").mkdir(parents=True)
    serialize.save(folder / "given" / "models" / "demo", resolve("demo"))
    deployed = Deployment(folder)
    began = time.monotonic()
    deployed.compose("--profile", "demo", "build", timeout=600)
    print(f"built in {time.monotonic() - began:.0f} s")
    try:
        yield deployed
    finally:
        deployed.compose("--profile", "*", "down", "--volumes", "--timeout", "5")


class Tap:
    """Every frame between two containers on a bridge: who spoke to whom, and what is readable."""

    def __init__(self, network: str, patterns: list[bytes]) -> None:
        bridge = "br-" + docker("network", "inspect", "-f", "{{.Id}}", network)[:12]
        self._patterns = patterns
        self.pairs: set[frozenset[str]] = set()
        self.bytes = 0
        self.found: set[bytes] = set()
        self._stopped = False
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 1 << 27)  # SO_RCVBUFFORCE
        self._socket.bind((bridge, 0))
        # A promiscuous bridge hears what passes between its ports.
        membership = struct.pack("iHH8s", socket.if_nametoindex(bridge), 1, 0, b"")
        self._socket.setsockopt(263, 1, membership)
        self._socket.settimeout(0.2)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stopped:
            with contextlib.suppress(TimeoutError):
                frame = self._socket.recv(1 << 17)
                if frame[12:14] == b"\x08\x00" and frame[23] == 6:  # TCP over IPv4
                    source, target = (socket.inet_ntoa(frame[i : i + 4]) for i in (26, 30))
                    self.pairs.add(frozenset((source, target)))
                    self.bytes += len(frame)
                    self.found.update(p for p in self._patterns if p in frame)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()
        self._socket.close()


@pytest.fixture(scope="module")
def taps(deployment: Deployment) -> Iterator[dict[str, Tap]]:
    """The demo, run to its end, with an ear on every network."""
    pixels, _ = demo_images()
    graph = resolve("demo")
    weights = next(v for k, v in graph.tensors.items() if v.ndim == 4)
    readable = [
        CIPHERTEXT, b"client_to_server", b'"session"', b'"plan"',
        pixels[0].reshape(-1)[:16].tobytes(), weights.reshape(-1)[:4].tobytes(),
    ]  # fmt: skip
    deployment.compose("--profile", "demo", "create")
    ears: dict[str, Tap] = {}
    try:
        for network in sorted(set.union(*NETWORKS.values())):
            ears[network] = Tap(f"{PROJECT}_{network}", readable)
        deployment.compose("--profile", "demo", "up", "--detach")
        assert docker("wait", deployment.container("client"), timeout=120) == "0\n"
        yield ears
    finally:
        for tap in ears.values():
            tap.stop()


def check(classes: list[int], logits: list[float], images: npt.NDArray[np.float32]) -> None:
    """Answers against plaintext: the logits, and every class that is not a near tie."""
    truth = run(resolve("demo"), images)
    assert len(classes) == len(images)
    for row, label, logit in zip(truth, classes, logits, strict=True):
        assert abs(row[label] - logit) <= ERROR
        best, second = np.sort(row)[:-3:-1]
        assert label == row.argmax() or best - second <= 2 * ERROR


def parsed(table: str) -> tuple[list[int], list[float]]:
    """Class and logit of every image, from what a person sees."""
    row = r"^│ +(\d+) │ +(\d+) │ \w+ +│ +([-.\d]+) │ +[.\d]+ │$"
    rows = re.findall(row, table, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    return [int(row[1]) for row in rows], [float(row[2]) for row in rows]


def demo(count: int | None = None) -> npt.NDArray[np.float32]:
    return normalise(demo_images()[0][:count], resolve("demo").metadata)


@pytest.mark.usefixtures("taps")
def test_the_demo_prints_the_right_answers(deployment: Deployment) -> None:
    log = docker("logs", deployment.container("client"))
    check(*parsed(log), demo())
    for service in ("server", "dealer"):
        state = deployment.inspect(service)["State"]
        assert state["Running"] and state["Health"]["Status"] == "healthy"
    assert deployment.inspect("certs")["State"]["ExitCode"] == 0


@pytest.mark.usefixtures("taps")
@pytest.mark.parametrize("role", ROLES)
def test_containers_are_confined(deployment: Deployment, role: str) -> None:
    found = deployment.inspect(role)
    host = found["HostConfig"]
    assert found["Config"]["User"] == "10001:10001"
    assert host["ReadonlyRootfs"] and not host["Privileged"]
    assert host["CapDrop"] == ["ALL"] and not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["PortBindings"]
    mounts = {(m["Name"], m["Destination"], m["RW"]) for m in found["Mounts"]}
    assert mounts == {(f"{PROJECT}_{role}-certs", "/run/secrets", False)}
    networks = set(found["NetworkSettings"]["Networks"])
    assert networks == {f"{PROJECT}_{name}" for name in NETWORKS[role]}


LOOK = """
import json, os
status = dict(l.split(":", 1) for l in open("/proc/self/status").read().splitlines())
def refuses(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
print(json.dumps({
    "uid": status["Uid"].split(), "gid": status["Gid"].split(), "groups": status["Groups"].split(),
    "capabilities": [int(status[n], 16) for n in ("CapEff", "CapPrm", "CapBnd")],
    "no_new": status["NoNewPrivs"].strip(),
    "writes": [refuses(p) for p in ("/x", "/venv/x", "/run/secrets/x", "/tmp/x")],
    "secrets": sorted(os.listdir("/run/secrets")),
}))
"""


@pytest.mark.usefixtures("taps")
@pytest.mark.parametrize("role", ["server", "dealer"])
def test_what_a_process_inside_may_do(deployment: Deployment, role: str) -> None:
    seen = json.loads(docker("exec", deployment.container(role), "python", "-c", LOOK))
    assert set(seen["uid"]) == set(seen["gid"]) == {"10001"} and seen["groups"] in ([], ["10001"])
    assert seen["capabilities"] == [0, 0, 0] and seen["no_new"] == "1"
    assert seen["writes"] == ["Read-only file system"] * 3 + [None]
    assert seen["secrets"] == ["authority.pem", f"{role}.key", f"{role}.pem"]


FILES = """
import os, sys
for folder, _, names in os.walk("/"):
    if not folder.startswith(("/proc", "/sys", "/dev")):
        for name in names:
            if name.endswith((".safetensors", ".npy", ".key", "authority.pem")):
                print(os.path.join(folder, name))
try:
    import torch
    print("torch")
except ImportError:
    pass
"""


@pytest.mark.usefixtures("taps")
def test_each_role_has_its_own_files_and_no_others(deployment: Deployment) -> None:
    found = {}
    for role in ROLES:
        image = deployment.inspect(role)["Config"]["Image"]
        volume = f"{PROJECT}_{role}-certs:/run/secrets:ro"
        confined = ("run", "--rm", "--network", "none", "--volume", volume)
        found[role] = set(
            docker(*confined, "--entrypoint", "python", image, "-c", FILES).splitlines()
        )
    for role in ROLES:
        found[role] -= {f"/run/secrets/{role}.key", "/run/secrets/authority.pem"}
        # pip's and numpy's own data are nobody's secret
        found[role] = {name for name in found[role] if "/site-packages/numpy/" not in name}
    assert found == {
        "server": {"/model/demo/tensors.safetensors"},
        "client": {"/images/demo.npy"},
        "dealer": set(),
    }


def test_each_network_joins_two_parties_and_shows_nothing(
    deployment: Deployment, taps: dict[str, Tap]
) -> None:
    addresses = {
        role: {
            name.removeprefix(f"{PROJECT}_"): network["IPAddress"]
            for name, network in deployment.inspect(role)["NetworkSettings"]["Networks"].items()
        }
        for role in ("server", "dealer")
    }
    for name, tap in taps.items():
        members = [role for role in ROLES if name in NETWORKS[role]]
        known = {addresses[role][name] for role in members if role != "client"}
        assert len(tap.pairs) == 1, tap.pairs
        (pair,) = tap.pairs
        assert known <= pair and tap.bytes > 100_000
        assert tap.found == {CIPHERTEXT}
        bridge = json.loads(docker("network", "inspect", f"{PROJECT}_{name}"))[0]
        assert bridge["Internal"]


def test_every_profile_is_a_valid_deployment(deployment: Deployment) -> None:
    for profile in ("demo", "bench", "wan", "gpu"):
        services = deployment.compose("--profile", profile, "config", "--services").split()
        assert {"server", "dealer", "certs"} < set(services)
    gpu = json.loads(deployment.compose("--profile", "gpu", "config", "--format", "json"))
    for name in ("server-gpu", "dealer-gpu"):
        reserved = gpu["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        assert reserved[0]["capabilities"] == ["gpu"]


def test_a_project_per_machine(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """compose.two-hosts.yml, the roles knowing of each other by published ports alone."""
    if os.getuid() != 0:
        pytest.skip("only root can hand the keys to the containers' user")
    for path in certificates.make(deployment.folder / "certs", folders=True):
        os.chown(path, 10001, 10001)
    gateway = "{{(index .IPAM.Config 0).Gateway}}"
    host = docker("network", "inspect", "--format", gateway, "bridge").strip()
    for variable, listener in (("PI_SERVER", Listener(host, 0)), ("PI_DEALER", Listener(host, 0))):
        monkeypatch.setenv(variable, f"{host}:{listener.port}")
        monkeypatch.setenv(f"{variable}_LISTEN", f"{host}:{listener.port}")
        listener.close()
    with contextlib.ExitStack() as stack:

        def compose(role: str, *words: str) -> str:
            project = ("--project-name", f"{PROJECT}-{role}", "--file", "compose.two-hosts.yml")
            return command("docker", "compose", *project, *words, cwd=deployment.folder)

        for role in ROLES:
            stack.callback(compose, role, "--profile", role, "down", "--timeout", "5")
        for role in ("dealer", "server"):
            compose(role, "--profile", role, "up", "--detach")
        table = compose("client", "run", "--rm", "--no-TTY", "client")
    check(*parsed(table), demo())


@pytest.mark.usefixtures("taps")
def test_across_an_emulated_wan(deployment: Deployment) -> None:
    """The client at one end of a link of 40 ms and 100 Mbit/s, server and dealer at the other."""
    emulator = TOOLS / "wanem.py"
    if not emulator.is_file() or os.getuid() != 0:
        pytest.skip("needs root and a link emulator")
    with contextlib.ExitStack() as stack:

        def start(role: str, network: str, *words: str, entrypoint: str = "pi-party") -> str:
            name = docker(
                *("run", "--detach", "--init", "--read-only", "--cap-drop", "ALL"),
                *("--network", network, "--volume", f"{PROJECT}_{role}-certs:/run/secrets:ro"),
                *("--entrypoint", entrypoint, deployment.inspect(role)["Config"]["Image"], *words),
            ).strip()
            stack.callback(docker, "rm", "--force", name)
            return name

        dealer = start("dealer", "none", "dealer", "--listen", "0.0.0.0:7001")
        serve = "server --model /model/demo --listen 0.0.0.0:7000 --dealer 127.0.0.1:7001"
        start("server", f"container:{dealer}", *serve.split())
        client = start("client", "none", "-c", "import time; time.sleep(600)", entrypoint="python")
        ends = [
            f"/proc/{docker('inspect', '-f', '{{.State.Pid}}', name).strip()}/ns/net"
            for name in (client, dealer)
        ]
        link = subprocess.Popen(
            [
                *("chrt", "-f", "50", "python3", str(emulator), *ends),
                *("10.77.0.1/30", "10.77.0.2/30", "100", "20"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(link.communicate)
        stack.callback(link.terminate)
        assert link.stdout is not None and link.stdout.readline() == "ready\n"
        images = BytesIO()
        np.save(images, demo_images()[0][:3])
        ask = "--server 10.77.0.2:7000 --dealer 10.77.0.2:7001 --images - --format json"
        done = subprocess.run(
            ["docker", "exec", "--interactive", client, "pi-party", "client", *ask.split()],
            input=images.getvalue(),
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    logits = [row for inference in report["inferences"] for row in inference["logits"]]
    classes = [int(np.argmax(row)) for row in logits]
    check(classes, [max(row) for row in logits], demo(3))
    assert min(report["round_trip_seconds"]) >= 0.04
    # Each of the dependent messages had to cross the link.
    assert all(0.4 < one["online_seconds"] < 8 for one in report["inferences"])
