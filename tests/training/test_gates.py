"""Gates against the masked ReLU, the Taylor score and SNL's penalty against their definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_system import nn
from training import data, methods, recipe, teacher
from training.allocate import Rule, whole_layers
from training.gates import Gate, due, top_together
from training.loop import Run
from training.snl import SnlStage
from training.taylor import TaylorStage


@pytest.fixture(scope="module")
def run(cifar10: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    chosen = recipe.load(str(recipe_path))
    return Run(tmp_path_factory.mktemp("gates"), chosen, data.load("cifar10", cifar10))


def stage(run: Run, kind: type, method: str, budget: int = 3000) -> TaylorStage | SnlStage:
    """A search from a random teacher, with equal sensitivities."""
    run = dataclasses.replace(run, recipe=methods.apply(run.recipe, method, budget, seed=5))
    full = teacher.masked(run, teacher.fresh(run, "teacher")).eval()
    count = nn.count_relus(full)
    rule = Rule(run.recipe, count, {layer.name: 1.0 for layer in count.layers})
    result: TaylorStage | SnlStage = kind(run, full, rule)
    return result


def test_a_gate_of_0_or_1_is_a_masked_relu() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 5, 5, generator=generator) < 0.5
    site = nn.MaskedReLU((4, 5, 5))
    site.set_mask(mask)
    images = torch.randn(3, 4, 5, 5, generator=generator)
    assert torch.equal(Gate(mask)(images), site(images))


def test_the_score_is_the_squared_gradient_of_each_gate(run: Run) -> None:
    search = stage(run, TaylorStage, "senet+")
    assert isinstance(search, TaylorStage)
    search.model.train()
    train, _ = run.split()
    expected = {name: torch.zeros_like(score) for name, score in search.scores.items()}
    for first in (0, 20):
        part = train.subset(torch.arange(first, first + 20))
        pixels = data.normalise(part.pixels, run.dataset.mean, run.dataset.std)
        loss, _ = search.loss(pixels, part.labels)
        gates = [gate.gate for gate in search.gates.values()]
        gradients = torch.autograd.grad(loss, gates, retain_graph=True)
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient.square()
        loss.backward()  # type: ignore[no-untyped-call]
        search.before_step()
    for name, score in search.scores.items():
        assert torch.allclose(score, expected[name])
        assert bool(score.any())


def test_the_budget_falls_from_all_to_the_recipes(run: Run) -> None:
    search = stage(run, TaylorStage, "senet+")
    assert isinstance(search, TaylorStage)
    budgets = [search.budget(done / 20) for done in range(21)]
    assert budgets[0] == search.rule.count.total and budgets[-1] == budgets[15] == 3000
    assert budgets == sorted(budgets, reverse=True)
    oneshot = stage(run, TaylorStage, "taylor-oneshot")
    assert isinstance(oneshot, TaylorStage)
    assert oneshot.budget(0.0) == 3000


@pytest.mark.parametrize("method", ["senet+", "taylor-oneshot"])
def test_the_best_scores_are_chosen(run: Run, method: str) -> None:
    search = stage(run, TaylorStage, method)
    assert isinstance(search, TaylorStage)
    generator = torch.Generator().manual_seed(1)
    for score in search.scores.values():
        score.copy_(torch.rand(score.shape, generator=generator))
    search.choose(1.0)
    masks = search.masks()
    assert sum(int(mask.sum()) for mask in masks.values()) == 3000
    scores = torch.cat([score[masks[name]] for name, score in search.scores.items()])
    if method == "senet+":
        others = torch.cat([score[~masks[name]] for name, score in search.scores.items()])
        assert scores.min() >= others.max()
    else:
        quota = search.rule(3000)
        assert quota == {name: int(mask.sum()) for name, mask in masks.items()}


def test_snl_gates_pay_the_penalty_and_stay_in_range(run: Run) -> None:
    search = stage(run, SnlStage, "snl")
    assert isinstance(search, SnlStage)
    gates = [gate.gate for gate in search.gates.values()]
    for gate in gates:
        gate.grad = torch.zeros_like(gate)
    search.before_step()
    assert all(torch.allclose(g.grad, torch.tensor(run.recipe.masks.snl.l1)) for g in gates)  # type: ignore[arg-type]
    with torch.no_grad():
        gates[0].fill_(1.5)
        gates[1].fill_(-0.5)
    search.after_step(0, 1000, 0)
    assert gates[0].max() == 1 and gates[1].max() == 0


def test_the_penalty_follows_the_gates(run: Run) -> None:
    search = stage(run, SnlStage, "snl")
    assert isinstance(search, SnlStage)
    before = float(search.extra()["penalty"])
    search.after_step(3, 4, 0)
    assert float(search.extra()["penalty"]) == 2 * before, "nothing fell, so it grows"
    with torch.no_grad():
        for gate in search.gates.values():
            gate.gate.fill_(0.5)
    search.after_step(3, 4, 0)
    assert float(search.extra()["penalty"]) == before, "they fell too fast"


def test_weights_and_gates_are_other_groups(run: Run) -> None:
    for kind, method, groups in ((TaylorStage, "senet+", 1), (SnlStage, "snl", 2)):
        search = stage(run, kind, method)
        found = search.optimizer.param_groups
        gates = {id(gate.gate) for gate in search.gates.values()}
        assert len(found) == groups
        assert not gates & {id(p) for p in found[0]["params"]}
        if groups == 2:
            assert gates == {id(p) for p in found[1]["params"]}
            assert found[1]["weight_decay"] == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1), st.data())
def test_top_together_keeps_exactly_k(values: list[list[int]], draw: st.DataObject) -> None:
    scores = {str(i): torch.tensor(part, dtype=torch.float32) for i, part in enumerate(values)}
    count = draw.draw(st.integers(0, sum(len(part) for part in values)))
    masks = top_together(scores, count)
    assert sum(int(mask.sum()) for mask in masks.values()) == count
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    left = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    if len(kept) and len(left):
        assert kept.min() >= left.max()


def test_a_small_site_goes_though_the_smallest_must_stay() -> None:
    parts = {"large": [9.0] + 8 * [0.0], "small": 2 * [8.0], "middle": 3 * [7.0]}
    masks = top_together({name: torch.tensor(part) for name, part in parts.items()}, 6, 3)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "large": 3, "small": 0, "middle": 3,
    }  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 9),
    st.data(),
)
def test_top_together_empties_small_sites(
    values: list[list[int]], minimum: int, draw: st.DataObject
) -> None:
    scores = {str(i): torch.tensor(part, dtype=torch.float32) for i, part in enumerate(values)}
    count = draw.draw(st.integers(0, sum(len(part) for part in values)))
    sizes = {n: int(m.sum()) for n, m in top_together(scores, count, minimum).items()}
    assert sum(sizes.values()) == count
    used = [name for name, size in sizes.items() if size]
    for name in used:
        others = sum(len(scores[other]) for other in used if other != name)
        assert sizes[name] >= minimum or others < count
    alone = {name: scores[name] for name in used}
    if used:
        without = {n: int(m.sum()) for n, m in top_together(alone, count).items()}
        assert without == {name: sizes[name] for name in used}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 200),
)
def test_whole_layers_are_the_best_set(layers: list[tuple[int, int]], budget: int) -> None:
    caps, values = [c for c, _ in layers], [float(v) for _, v in layers]
    kept = whole_layers(caps, values, budget)
    assert sum(kept) <= budget
    assert all(k in (0, cap) for k, cap in zip(kept, caps, strict=True))
    best = max(
        sum(v for i, v in enumerate(values) if chosen >> i & 1)
        for chosen in range(1 << len(caps))
        if sum(c for i, c in enumerate(caps) if chosen >> i & 1) <= budget
    )
    assert sum(v for v, k in zip(values, kept, strict=True) if k) == best


@given(st.integers(1, 60), st.integers(1, 60))
def test_updates_are_evenly_spaced(steps: int, updates: int) -> None:
    assert sum(due(step, steps, updates) for step in range(steps)) == min(steps, updates)
    assert due(steps - 1, steps, updates)
