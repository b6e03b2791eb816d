"""Small graphs and the comparison every test here ends with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from pi_system import models
from pi_system.graph import execute
from pi_system.graph.ir import Graph
from pi_system.graph.trace import export

Check = Callable[..., Graph]


def randomise_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training, the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = (module.num_features,)
            module.running_mean = torch.randn(shape, generator=generator) * 0.3
            module.running_var = torch.rand(shape, generator=generator) + 0.5
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def same() -> Check:
    """Export a network and check that every executor computes what PyTorch does."""

    def check(model: nn.Module, shape: tuple[int, ...] = (3, 8, 12), seed: int = 0) -> Graph:
        randomise_statistics(model, seed)
        graph = export(model, shape, metadata={"name": "test"})
        images = models.random_images(3, shape, seed)
        with torch.no_grad():
            expected = model(torch.from_numpy(images.copy())).numpy()
        limit = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, float(np.abs(expected).max()))}
        np.testing.assert_allclose(execute.run(graph, images), expected, **limit)
        for channels_last in (False, True):
            compiled = execute.compile_plaintext(graph, channels_last=channels_last)
            for _ in range(2):
                np.testing.assert_allclose(compiled(images), expected, **limit)
        edges = execute.run(graph, images, all_edges=True)
        assert {n.name: (3, *n.shape) for n in graph} == {k: v.shape for k, v in edges.items()}
        return graph

    return check


@pytest.fixture(scope="session")
def graph() -> Graph:
    """Every kind of node but affine: a ResNet-10 of width 2, an eighth of its ReLUs kept."""
    return models.random_graph("resnet10", width=2, relus=1216)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
