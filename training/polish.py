"""Block-coordinate polish: the last ReLUs go by what their loss does to the network itself.

The search ends with some ReLUs too many. Random blocks of those left are dropped one after
another: a block goes if the accuracy on training images falls by less than a tolerance; where none
of several blocks does, the one that costs least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pi_system.nn import MaskedReLU, relu_sites

from .data import Source
from .loop import Run, accuracy, derive_seed, threads
from .masks import top
from .recipe import Polish


def run_stage(run: Run, model: nn.Module) -> list[dict[str, Any]]:
    """Drop ReLUs of ``model``, in place, until it keeps the recipe's budget.

    Returns:
        Per block: ``relus`` dropped, blocks tried, training accuracy before and after.
    """
    settings = run.recipe.masks.polish
    assert settings is not None
    train, _ = run.split()
    images = train.subset(torch.arange(min(settings.images, len(train))))
    seed = derive_seed(run.recipe.seed_of("masks"), "masks/polish", 0)
    with threads(run.threads):
        return polish(run, model, images, settings, torch.Generator().manual_seed(seed))


def polish(
    run: Run, model: nn.Module, images: Source, settings: Polish, generator: torch.Generator
) -> list[dict[str, Any]]:
    """As :func:`run_stage`, with the accuracy measured on ``images``."""
    sites = list(relu_sites(model).values())
    before = accuracy(model, images, run.dataset)
    blocks = []
    while (excess := sum(site.kept for site in sites) - run.recipe.relu_budget) > 0:
        size = min(settings.block, excess)
        masks = [site.mask.clone() for site in sites]
        best: tuple[float, list[Tensor]] | None = None
        for tried in range(1, settings.trials + 1):  # noqa: B007
            fewer = without(masks, size, generator)
            _set(sites, fewer)
            after = accuracy(model, images, run.dataset)
            if best is None or after > best[0]:
                best = after, fewer
            if before - after < settings.tolerance:
                break
        assert best is not None
        after, fewer = best
        _set(sites, fewer)
        blocks.append({"relus": size, "tried": tried, "before": before, "after": after})
        before = after
    return blocks


def without(masks: list[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """The masks without ``count`` of their positions, each set of positions as likely."""
    flat = torch.cat([mask.reshape(-1) for mask in masks])
    # Positions that are out already come last in the draw.
    drawn = torch.rand(flat.numel(), generator=generator)
    fewer = flat & ~top(drawn.masked_fill(~flat, -1.0), count)
    parts = torch.split(fewer, [mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def _set(sites: list[MaskedReLU], masks: list[Tensor]) -> None:
    for site, mask in zip(sites, masks, strict=True):
        site.set_mask(mask)
