"""examples/kubernetes.yml: confined, consistent, and of commands that exist.

No cluster runs here: what is checked is the manifest against itself, this package's command line,
the images of docker-compose.yml, and the secrets that its head says how to make.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pi_system.backends.base import Database
from pi_system.cli.party import cli
from pi_system.net.tls import AUTHORITY
from pi_system.parties.address import parse_address, parse_addresses

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "examples" / "kubernetes.yml").read_text()
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all(TEXT))
OURS = ("server", "dealer")


def of(kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in OBJECTS if o["kind"] == kind}


WORKLOADS = {**of("Deployment"), **of("StatefulSet")}
SERVICES = of("Service")


def pod(name: str) -> dict[str, Any]:
    found: dict[str, Any] = WORKLOADS[name]["spec"]["template"]["spec"]
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = pod(name)["containers"]
    assert isinstance(found, dict)
    return found


def options(name: str) -> dict[str, Any]:
    """A party's command line as the real command parses it."""
    role, *arguments = container(name)["args"]
    command = cli.get_command(click.Context(cli), role)
    assert command is not None and role == name
    with command.make_context(role, list(arguments)) as context:
        return context.params


def ports(name: str) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(name)["ports"]}


def created_secrets() -> dict[str, set[str]]:
    """Name and files of the secrets that the head of the file makes."""
    found: dict[str, set[str]] = {}
    for name, rest in re.findall(r"create secret generic (\S+)((?: --from-file=\S+)+)", TEXT):
        files: set[str] = set()
        for source in re.findall(r"--from-file=(\S+)", rest):
            role = Path(source).name
            folder = source.startswith("certs/")
            files |= {AUTHORITY, f"{role}.pem", f"{role}.key"} if folder else {source}
        found[name] = files
    return found


def mounted(name: str) -> dict[str, set[str]]:
    """Where a workload mounts secrets, and the files there."""
    secrets = {
        volume["name"]: volume["secret"]["secretName"]
        for volume in pod(name)["volumes"]
        if "secret" in volume
    }
    return {
        mount["mountPath"]: created_secrets()[secrets[mount["name"]]]
        for mount in container(name)["volumeMounts"]
        if mount["name"] in secrets
    }


def selected(selector: dict[str, str]) -> list[str]:
    return [
        name
        for name, workload in WORKLOADS.items()
        if selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]


def test_every_object_is_named_once_and_in_one_namespace() -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in OBJECTS]
    assert len(set(names)) == len(names)
    assert all(o["metadata"]["namespace"] == "pi-system" and o["apiVersion"] for o in OBJECTS)
    assert set(WORKLOADS) == {"server", "dealer", "postgres"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_pod_is_confined(name: str) -> None:
    spec, one = pod(name), container(name)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 100
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in one["resources"]["limits"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for volume in spec["volumes"]:
        assert set(volume) - {"name"} < {"secret", "emptyDir"}
        if "secret" in volume:
            assert not volume["secret"]["defaultMode"] & 0o337
    known = {volume["name"] for volume in spec["volumes"]}
    known |= {
        c["metadata"]["name"] for c in WORKLOADS[name]["spec"].get("volumeClaimTemplates", [])
    }
    assert {mount["name"] for mount in one["volumeMounts"]} == known
    secret = {m["name"] for m in one["volumeMounts"] if m.get("readOnly")}
    assert secret == {volume["name"] for volume in spec["volumes"] if "secret" in volume}
    for variable in one.get("env", []):
        assert "PASSWORD" not in variable["name"] or variable["name"].endswith("_FILE")


@pytest.mark.parametrize("name", OURS)
def test_a_party_runs_the_image_of_its_target_and_a_command_that_exists(name: str) -> None:
    images = {
        service["image"]: service["build"]["target"]
        for service in yaml.safe_load((ROOT / "docker-compose.yml").read_text())[
            "services"
        ].values()
    }
    target = images[container(name)["image"]]
    assert f"--target {target} -t {container(name)['image']}" in TEXT
    given = options(name)
    assert (given["insecure"], given["log"], given["once"]) == (False, None, False)
    listen, metrics = parse_address(given["listen"]), parse_address(given["metrics"])
    assert ports(name) == {"pi": listen.port, "metrics": metrics.port}
    assert given["drain"] < pod(name)["terminationGracePeriodSeconds"]
    assert container(name)["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert WORKLOADS[name]["spec"]["replicas"] >= 2
    # The image says where the certificates are: all three files are mounted there.
    assert "PI_PARTY_CERTS=/run/secrets" in (ROOT / "Dockerfile").read_text()
    assert mounted(name)["/run/secrets"] == {AUTHORITY, f"{name}.pem", f"{name}.key"}


def test_the_servers_name_every_dealer() -> None:
    dealer = WORKLOADS["dealer"]["spec"]
    headless = SERVICES[dealer["serviceName"]]
    assert headless["spec"]["clusterIP"] == "None"
    assert [str(at) for at in parse_addresses(options("server")["dealer"])] == [
        f"dealer-{number}.dealer:{ports('dealer')['pi']}" for number in range(dealer["replicas"])
    ]
    for number in range(dealer["replicas"]):  # and each has an address of its own for clients
        selector = SERVICES[f"dealer-{number}"]["spec"]["selector"]
        assert selector == {
            "app": "dealer", "statefulset.kubernetes.io/pod-name": f"dealer-{number}",
        }  # fmt: skip


def test_the_ledger_is_the_database_that_runs_here() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed", exc_type=ImportError)
    from pi_system.backends.fss.database import parameters

    given = options("server")
    assert given["store"] is None and "password" not in given["ledger"]
    asked = parameters(Database(given["ledger"]))
    environment = {e["name"]: e["value"] for e in container("postgres")["env"]}
    assert asked["user"] == environment["POSTGRES_USER"]
    assert asked["dbname"] == environment["POSTGRES_DB"]
    assert asked["sslmode"] == "verify-full"
    assert SERVICES[asked["host"]]["spec"]["ports"][0]["port"] == int(asked.get("port", 5432))
    assert f"subjectAltName=DNS:{asked['host']}" in TEXT
    for name, paths in (
        ("server", [asked["sslrootcert"], str(given["ledger_password"])]),
        (
            "postgres",
            [environment["POSTGRES_PASSWORD_FILE"], *re.findall(r"_file=([^']+)'", str(
                container("postgres")["args"]))],
        ),
    ):  # fmt: skip
        for path in map(Path, paths):
            assert path.name in mounted(name)[str(path.parent)], path
    assert set(environment) & {"POSTGRES_PASSWORD"} == set()
    # The key of its certificate is the database's alone.
    holders = [n for n in WORKLOADS if any("tls.key" in files for files in mounted(n).values())]
    assert holders == ["postgres"]


def test_services_lead_to_one_workload_and_a_port_of_it() -> None:
    for service in SERVICES.values():
        selector = dict(service["spec"]["selector"])
        selector.pop("statefulset.kubernetes.io/pod-name", None)
        (name,) = selected(selector)
        for port in service["spec"]["ports"]:
            assert ports(name)[port["targetPort"]] == port["port"]
            assert port["targetPort"] != "metrics"
    for budget in of("PodDisruptionBudget").values():
        assert len(selected(budget["spec"]["selector"]["matchLabels"])) == 1
    for name, workload in WORKLOADS.items():
        assert selected(workload["spec"]["selector"]["matchLabels"]) == [name]


def allowed(direction: str) -> Iterator[tuple[str, int, list[Any] | None]]:
    """Workload, port and peers of every rule; ``None`` for anybody."""
    for policy in of("NetworkPolicy").values():
        for rule in policy["spec"].get(direction, []):
            for name in selected(policy["spec"]["podSelector"]["matchLabels"]):
                for port in rule["ports"]:
                    yield name, port["port"], rule.get("from" if direction == "ingress" else "to")


def test_the_network_carries_what_the_parties_need_and_no_more() -> None:
    nothing = of("NetworkPolicy")["nothing"]["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of("NetworkPolicy").values():
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    into = list(allowed("ingress"))
    assert {(name, port) for name, port, peers in into if peers is None} == {
        ("server", ports("server")["pi"]), ("dealer", ports("dealer")["pi"]),
    }  # fmt: skip
    (database,) = [peers for name, port, peers in into if name == "postgres"]
    assert database == [{"podSelector": {"matchLabels": {"app": "server"}}}]
    assert {port for name, port, _ in into if name == "postgres"} == {ports("postgres")["postgres"]}
    out = {
        (name, port, selected(peer["podSelector"]["matchLabels"])[0])
        for name, port, peers in allowed("egress")
        for peer in peers or []
        if "podSelector" in peer
    }
    assert out == {
        ("server", ports("dealer")["pi"], "dealer"),
        ("server", ports("postgres")["postgres"], "postgres"),
    }
    assert {name for name, _, _ in allowed("egress")} == {"server"}


def test_the_secrets_are_those_that_the_head_makes() -> None:
    used = {
        volume["secret"]["secretName"]
        for name in WORKLOADS
        for volume in pod(name)["volumes"]
        if "secret" in volume
    }
    assert used == set(created_secrets())
    assert not of("Secret"), "no secret belongs in a manifest"


def test_the_clients_command_in_the_head_exists() -> None:
    text = TEXT.replace("\\\n#", " ")
    (line,) = re.findall(r"pi-party client ([^#\n]*)", text)
    command = cli.get_command(click.Context(cli), "client")
    assert command is not None
    with command.make_context("client", line.split()) as context:
        given = context.params
    dealers = parse_addresses(given["dealer"])
    assert len(dealers) == WORKLOADS["dealer"]["spec"]["replicas"]
    assert {at.port for at in dealers} == {ports("dealer")["pi"]}
    assert parse_address(given["server"]).port == ports("server")["pi"]
