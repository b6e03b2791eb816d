"""SENet, its rivals and their variants, as changes to a recipe.

Every method trains for the recipe's epochs of search and fine-tuning together, with the same
optimiser, losses, batches and seeds; one without a search fine-tunes for all of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pi_system.errors import UsageError

from .recipe import Polish, Recipe


@dataclass(frozen=True)
class Method:
    """Changes of the recipe's ``allocate``, ``masks`` and ``masks.taylor`` settings."""

    title: str
    rule: str
    search: str
    masks: dict[str, Any] = field(default_factory=dict)
    taylor: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "uniform-random": Method("uniform budgets, random positions", "uniform", "random"),
    "senet-random": Method("SENet's budgets, random positions", "senet", "random"),
    "whole-layers": Method("whole layers, after DeepReDuce", "whole-layers", "random"),
    "snl": Method("SNL: relaxed masks under L1", "search", "snl"),
    "senet": Method("SENet", "senet", "senet"),
    "senet+": Method("SENet+", "search", "taylor"),
    # Such as pi-train allocate --target-latency finds.
    "senet-given": Method("SENet, layer budgets given", "given", "senet"),
    # What each part of senet+ gives, and SENet's search to the letter.
    "senet-mismatch": Method(
        "SENet, scored by |a_AR - a_PR| from random masks",
        "senet",
        "senet",
        masks={"score": "mismatch", "start": "random"},
    ),
    "taylor-oneshot": Method(
        "Taylor score, SENet's budgets", "senet", "taylor", taylor={"progressive": False}
    ),
    "taylor-progressive": Method("Taylor score, SENet's budgets, progressive", "senet", "taylor"),
    "taylor-search-oneshot": Method(
        "Taylor score over all layers", "search", "taylor", taylor={"progressive": False}
    ),
    "senet+polish": Method(
        "SENet+ and a block-coordinate polish", "search", "taylor", masks={"polish": Polish()}
    ),
}


def apply(
    recipe: Recipe, method: str, budget: int, seed: int, relus: tuple[int, ...] = ()
) -> Recipe:
    """The recipe of one student.

    Args:
        seed: of the student alone; teacher, sensitivities and validation split stay.
        relus: the layer budgets of a method that has them given.

    Raises:
        UsageError: an unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    chosen = METHODS[method]
    epochs = recipe.masks.epochs + recipe.finetune.epochs
    search = 0 if chosen.search == "random" else recipe.masks.epochs
    taylor = dataclasses.replace(recipe.masks.taylor, **chosen.taylor)
    changes: dict[str, Any] = {"method": chosen.search, "epochs": search, "taylor": taylor}
    return dataclasses.replace(
        recipe,
        relu_budget=budget,
        student_seed=seed,
        allocate=dataclasses.replace(
            recipe.allocate, rule=chosen.rule, relus=relus if chosen.rule == "given" else ()
        ),
        masks=dataclasses.replace(recipe.masks, **changes | chosen.masks),
        finetune=dataclasses.replace(recipe.finetune, epochs=epochs - search),
    )
