"""Allocations for a latency: the target is met, emptied layers buy ReLUs, given ones are kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system.bench.cost import Cost
from pi_system.errors import UsageError
from pi_system.net.link import Link
from training import data, network, recipe, senet
from training.allocate import fill
from training.cli import cli
from training.loop import Run

WAN = Link("wan", 40.0, 100.0)
COST = Cost(3.0, 1e-3, 700.0, 9.0)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1000, 20_000), st.floats(0.01, 1)), min_size=1, max_size=5),
    st.floats(50, 400),
)
def test_the_target_is_met_at_nearly_the_greatest_value(
    layers: list[tuple[int, float]], target: float
) -> None:
    caps, eta = [c for c, _ in layers], [e for _, e in layers]
    found = network.budgets(caps, eta, COST, WAN, target)
    assert COST.latency_ms(found, WAN) <= target + 1e-6
    assert all(0 <= r <= cap for r, cap in zip(found, caps, strict=True))
    best = 0.0
    for chosen in itertools.product((False, True), repeat=len(caps)):
        budget = COST.affordable(sum(chosen), target, WAN)
        if budget >= sum(chosen):
            inside = [cap if keep else 0 for cap, keep in zip(caps, chosen, strict=True)]
            best = max(best, network.value(fill(min(budget, sum(inside)), inside, eta), eta))
    assert network.value(found, eta) >= 0.8 * best


def test_a_round_trip_is_worth_many_relus() -> None:
    caps, eta = [16384, 8192, 4096], [0.05, 0.5, 1.0]
    tight = network.budgets(caps, eta, COST, WAN, 130.0)
    assert tight[0] == 0 and all(tight[1:])
    assert network.budgets(caps, eta, COST, WAN, 1000.0) == caps
    with pytest.raises(UsageError, match="without any ReLU it takes"):
        network.budgets(caps, eta, COST, WAN, 20.0)


def test_on_a_fast_network_no_layer_is_emptied() -> None:
    fast = Link("lan", 0.3, 1000.0)
    caps, eta = [16384, 8192, 4096], [0.2, 0.5, 1.0]
    assert all(network.budgets(caps, eta, COST, fast, 10.0))


def test_the_command_and_a_recipe_of_what_it_found(
    cifar10: Path, recipe_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    results = []
    for name, relus in (("few", [0] * 8 + [500]), ("all", [30_000] * 9)):
        total = sum(relus)
        document = {
            "backend": "fss", "batch_size": 1, "threads_per_party": 1,
            "model": {"relu_total": 38912, "relu_kept": total},
            "network": {"name": "loopback"},
            "online": {
                "latency_ms": {"median": 3 + 1e-3 * total}, "bytes": {"up": 700 + 9 * total},
                "round_trips": 1 + sum(count > 0 for count in relus),
                "layers": [{"relus_kept": count} for count in relus],
            },
        }  # fmt: skip
        results += ["--measured", str(tmp_path / name)]
        (tmp_path / name).write_text(json.dumps(document))
    command = ["allocate", "--recipe", str(recipe_path), "--data", str(cifar10)]
    command += ["--run", str(folder), "--network", "wan", *results]
    done = CliRunner().invoke(cli, [*command, "--target-latency", "250ms", "--pictures"])
    assert done.exit_code == 0, done.stderr
    document = json.loads((folder / "network.json").read_text())
    relus = document["relus"]
    assert 0 < document["predicted_ms"] <= 250 and sum(r > 0 for r in relus) <= 5
    assert (folder / "network.png").exists()

    chosen = recipe.load(str(recipe_path))
    allocate = recipe.Allocate(rule="given", relus=tuple(relus))
    chosen = dataclasses.replace(chosen, allocate=allocate, relu_budget=sum(relus))
    run = Run(folder, chosen, data.load("cifar10", cifar10))
    rule = senet.measure(run)
    assert list((rule(sum(relus)) or {}).values()) == relus
    more = rule(sum(relus) + 1000)
    assert more is not None and sum(more.values()) == sum(relus) + 1000
    short = dataclasses.replace(chosen, relu_budget=sum(relus) - 1)
    with pytest.raises(UsageError, match="over the relu_budget"):
        senet.measure(dataclasses.replace(run, recipe=short))
    wrong = dataclasses.replace(allocate, relus=(1, 2))
    with pytest.raises(UsageError, match="does not fit"):
        senet.measure(dataclasses.replace(run, recipe=dataclasses.replace(chosen, allocate=wrong)))

    for target, network_name, code, word in [
        ("10ms", "wan", 2, "without any ReLU"),
        ("soon", "wan", 2, "400ms"),
        ("1s", "loopback", 2, "no round trips"),
    ]:
        command[command.index("--network") + 1] = network_name
        done = CliRunner().invoke(cli, [*command, "--target-latency", target])
        assert done.exit_code == code and word in done.stderr
