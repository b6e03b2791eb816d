"""PRAM and the stage outputs it compares."""

from __future__ import annotations

import pytest
import torch

from pi_system import nn
from training.distill import stage_sites
from training.losses import attention, pram


def test_pram_is_zero_for_equal_networks_and_for_scaled_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.rand(2, 4, 8, 8, generator=generator),
        torch.rand(2, 8, 4, 4, generator=generator),
    ]
    assert float(pram(maps, maps)) == 0
    assert float(pram(maps, [3 * m for m in maps])) == pytest.approx(0, abs=1e-12)
    other = [m.flip(-1) for m in maps]
    assert float(pram(maps, other)) > 0


def test_pram_against_its_definition() -> None:
    ours = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    theirs = torch.tensor([0.0, 2.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert float(pram([ours], [theirs])) == pytest.approx(2 / 4)


def test_attention_maps_have_unit_norm() -> None:
    maps = attention(torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert maps.shape == (3, 16)
    assert torch.allclose(maps.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("arch", "stages"), [("resnet10", 4), ("resnet18", 4), ("vgg16", 5), ("wrn22_8", 3)]
)
def test_one_output_per_stage(arch: str, stages: int) -> None:
    model = nn.linearize(nn.build(arch, classes=4, width=2), torch.zeros(2, 3, 32, 32))
    sites = nn.relu_sites(model)
    found = stage_sites(model)
    assert found[-1] == list(sites)[-1]
    shapes = [tuple(sites[name].mask.shape) for name in found]
    assert len(set(shapes)) == len(shapes) >= stages
