"""The mask search of the recipe: SENet's or a rival's."""

from __future__ import annotations

import torch
from safetensors.torch import save as dump_tensors
from torch import fx

from pi_system.checkpoint import write_atomic
from pi_system.nn import count_relus, relu_sites

from . import polish
from .allocate import Rule
from .gates import GateStage
from .loop import Run, derive_seed
from .masks import MaskStage, random_positions, student_of
from .snl import SnlStage
from .taylor import TaylorStage

OUTPUT = "masks.json"
MASKS = "masks.safetensors"


def run_stage(run: Run, teacher: fx.GraphModule, rule: Rule) -> fx.GraphModule:
    """Find the masks and return the network they were found with.

    Writes ``masks.json`` and the masks themselves, boolean (C, H, W) by site, in
    ``masks.safetensors``.
    """
    settings, recipe = run.recipe.masks, run.recipe
    hamming: list[float | None] = []
    if settings.method == "random":
        found = student_of(run, teacher)
        budgets = rule(recipe.relu_budget)
        assert budgets is not None
        seed = derive_seed(recipe.seed_of("masks"), "masks/random", 0)
        generator = torch.Generator().manual_seed(seed)
        for name, site in relu_sites(found).items():
            shape = tuple(site.mask.shape)
            site.set_mask(random_positions(shape, budgets[name], settings.granularity, generator))
    elif settings.method == "senet":
        budgets = rule(recipe.searched(rule.count.total))
        assert budgets is not None
        search = MaskStage(run, teacher, budgets)
        search.fit()
        assert isinstance(search.model, fx.GraphModule)
        found, hamming = search.model, [row.hamming for row in search.rows]
    else:
        kind: type[GateStage] = SnlStage if settings.method == "snl" else TaylorStage
        gates = kind(run, teacher, rule)
        gates.fit()
        found, hamming = gates.result(), [row.hamming for row in gates.rows]
    polished = None if settings.polish is None else polish.run_stage(run, found)
    count = count_relus(found)
    found_masks = {name: site.mask.contiguous() for name, site in relu_sites(found).items()}
    with run.writing() as mine:
        if mine:
            run.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(run.directory / MASKS, dump_tensors(found_masks))
    run.write_json(
        OUTPUT,
        "masks",
        {
            "method": settings.method,
            "granularity": settings.granularity,
            "relu_kept": count.kept,
            "hamming": hamming,
            "layers": [
                {"site": layer.name, "total": layer.total, "relus": layer.kept}
                for layer in count.layers
            ],
        }
        | ({} if polished is None else {"polish": polished}),
    )
    return found
