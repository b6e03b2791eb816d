"""Layer budgets: SENet's water-filling by sensitivity (section 3, stage 1) and its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pi_system.errors import UsageError
from pi_system.nn import ReLUCount
from pi_system.nn.budget import allocate as share

from .loop import Run
from .recipe import Recipe

OUTPUT = "allocation.json"


def fill(total: int, caps: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Share ``total`` out under the stage 1 rule, for weights of zero too.

    Layers of weight 0 get something only when all others are full, and then in proportion to
    their caps.

    Raises:
        UsageError: ``total`` is negative or over the sum of the caps, or a weight is negative.
    """
    if not 0 <= total <= sum(caps):
        raise UsageError(f"cannot place {total} in layers that hold {sum(caps)}")
    if any(not weight >= 0 for weight in weights) or len(weights) != len(caps):
        raise UsageError("there must be one weight per layer, none of them negative")
    result = [0] * len(caps)
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    zero = [
        i for i, (cap, weight) in enumerate(zip(caps, weights, strict=True)) if cap > weight == 0
    ]
    for group, shares in ((positive, weights), (zero, caps)):
        part = min(total, sum(caps[i] for i in group))
        total -= part
        if group:
            parts = share([caps[i] for i in group], [shares[i] for i in group], part)
            for i, value in zip(group, parts, strict=True):
                result[i] = value
    return result


def whole_channels(budgets: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Round position budgets to whole channels without exceeding their sum.

    Each layer is rounded down; what is left over buys one more channel for the layers of the
    largest remainders, as far as it reaches.

    Args:
        shapes: (C, H, W) or (C,) per layer.
    """
    areas = [_area(shape) for shape in shapes]
    result = [budget // area * area for budget, area in zip(budgets, areas, strict=True)]
    left = sum(budgets) - sum(result)
    order = sorted(range(len(budgets)), key=lambda i: (-(budgets[i] - result[i]) / areas[i], i))
    for i in order:
        if budgets[i] > result[i] and areas[i] <= left:
            result[i] += areas[i]
            left -= areas[i]
    return result


def allocate(
    count: ReLUCount, sensitivity: Mapping[str, float], budget: int, minimum: int = 0
) -> dict[str, int]:
    """The ReLUs each site may keep, by site name, summing to ``budget`` exactly.

    Args:
        count: the sites of the all-ReLU network.
        sensitivity: ``eta_alpha`` per site, in [0, 1].
        minimum: a site whose share is smaller keeps none, which saves its round trip in private
            inference; the others share what it leaves, as long as they have room.

    Raises:
        UsageError: the budget is negative or over the network's total.
    """
    if not 0 <= budget <= count.total:
        raise UsageError(f"the ReLU budget must be between 0 and {count.total}, got {budget}")
    caps = [layer.total for layer in count.layers]
    weights = [sensitivity[layer.name] for layer in count.layers]
    shares = fill(budget, caps, weights)
    while small := [i for i, value in enumerate(shares) if 0 < value < minimum]:
        smallest = min(small, key=lambda i: (shares[i], i))
        caps[smallest] = 0
        if sum(caps) < budget:
            break
        shares = fill(budget, caps, weights)
    return {layer.name: value for layer, value in zip(count.layers, shares, strict=True)}


def whole_layers(caps: Sequence[int], values: Sequence[float], budget: int) -> list[int]:
    """Keep layers whole: the set of greatest total value that fits ``budget``.

    DeepReDuce (ICML 2021) drops whole layers by a criticality measured with one training per
    layer; here the value of a layer is given. Among sets of equal value the larger one wins.

    Returns:
        ``caps[i]`` or 0 per layer; their sum is at most ``budget``.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for i, (cap, value) in enumerate(zip(caps, values, strict=True)):
        for size, (total, chosen) in list(best.items()):
            new = size + cap
            if new <= budget and (new not in best or best[new][0] < total + value):
                best[new] = (total + value, (*chosen, i))
    _, chosen = max(best.items(), key=lambda item: (item[1][0], item[0]))[1]
    return [cap if i in chosen else 0 for i, cap in enumerate(caps)]


class Rule:
    """The recipe's rule for one network: from any budget to layer budgets.

    Args:
        count: the sites of the all-ReLU network.
        sensitivity: ``eta_alpha`` per site.
    """

    def __init__(self, recipe: Recipe, count: ReLUCount, sensitivity: Mapping[str, float]) -> None:
        self._recipe, self.count, self.sensitivity = recipe, count, sensitivity

    def __call__(self, budget: int) -> dict[str, int] | None:
        """ReLUs per site, summing to at most ``budget``; ``None``: the search compares all sites.

        Raises:
            UsageError: the budget is negative or over the network's total.
        """
        rule, layers = self._recipe.allocate.rule, self.count.layers
        if rule == "search":
            return None
        if rule == "given":
            return self._given(budget)
        if rule == "whole-layers":
            caps = [layer.total for layer in layers]
            values = [self.sensitivity[layer.name] for layer in layers]
            kept = whole_layers(caps, values, budget)
            return {layer.name: value for layer, value in zip(layers, kept, strict=True)}
        weights = self.sensitivity
        if rule == "uniform":
            weights = {layer.name: float(layer.total) for layer in layers}
        budgets = allocate(self.count, weights, budget, self._recipe.allocate.min_relus)
        if self._recipe.masks.granularity == "channel":
            rounded = whole_channels(list(budgets.values()), [layer.shape for layer in layers])
            budgets = dict(zip(budgets, rounded, strict=True))
        return budgets

    def _given(self, budget: int) -> dict[str, int]:
        layers, given = self.count.layers, self._recipe.allocate.relus
        if len(given) != len(layers) or any(
            kept > layer.total for kept, layer in zip(given, layers, strict=False)
        ):
            totals = ", ".join(str(layer.total) for layer in layers)
            raise UsageError(f"allocate.relus does not fit layers of {totals}")
        if sum(given) > self._recipe.relu_budget:
            raise UsageError(
                f"allocate.relus keeps {sum(given)} ReLUs, "
                f"over the relu_budget of {self._recipe.relu_budget}"
            )
        # A search that starts from more ReLUs shrinks towards the given numbers.
        more = fill(
            max(budget - sum(given), 0),
            [layer.total - kept for layer, kept in zip(layers, given, strict=True)],
            [float(layer.total) for layer in layers],
        )
        return {
            layer.name: kept + extra for layer, kept, extra in zip(layers, given, more, strict=True)
        }


def run_stage(run: Run, count: ReLUCount, sensitivity: Mapping[str, float]) -> Rule:
    """Write what the recipe's rule makes of its budget in ``allocation.json``."""
    recipe = run.recipe
    rule = Rule(recipe, count, sensitivity)
    budgets = rule(recipe.relu_budget)
    run.write_json(
        OUTPUT,
        "masks",
        {
            "rule": recipe.allocate.rule,
            "relu_budget": recipe.relu_budget,
            "relu_total": count.total,
            "layers": [
                {
                    "site": layer.name,
                    "total": layer.total,
                    "eta_alpha": sensitivity[layer.name],
                    "relus": None if budgets is None else budgets[layer.name],
                }
                for layer in count.layers
            ],
        },
    )
    return rule


def _area(shape: tuple[int, ...]) -> int:
    area = 1
    for side in shape[1:]:
        area *= side
    return area
