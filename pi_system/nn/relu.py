"""The partial ReLU and its count (SENet, ICLR 2023, sections 3-4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..errors import UsageError


class MaskedReLU(nn.Module):
    """y = m*relu(x) + (1-m)*x with a boolean mask m per activation position.

    Args:
        shape: activation positions of one image, usually (C, H, W).

    The mask is a buffer, the same for every image, and starts full (an ordinary ReLU).
    Input and output are (N, *shape).
    """

    mask: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x < 0) & self.mask, 0.0, x)

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask.

        Raises:
            UsageError: ``mask`` is not boolean or not of this site's shape.
        """
        if mask.dtype != torch.bool or mask.shape != self.mask.shape:
            raise UsageError(
                f"a mask here is bool {tuple(self.mask.shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        with torch.no_grad():
            self.mask.copy_(mask)

    @property
    def kept(self) -> int:
        return int(self.mask.sum())

    @property
    def total(self) -> int:
        return self.mask.numel()

    def extra_repr(self) -> str:
        return f"{tuple(self.mask.shape)}, kept {self.kept} of {self.total}"


@dataclass(frozen=True)
class LayerCount:
    """ReLUs of one site: its name, positions per image and how many of them are kept."""

    name: str
    shape: tuple[int, ...]
    total: int
    kept: int


@dataclass(frozen=True)
class ReLUCount:
    """ReLUs of a network, per layer in the order of execution.

    Two conventions are in use and a figure means nothing without its own: SENet counts every
    site (``total``, ``kept``); SNL leaves the stem, the first site, out (``*_without_stem``).
    """

    layers: tuple[LayerCount, ...]

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def total_without_stem(self) -> int:
        return sum(layer.total for layer in self.layers[1:])

    @property
    def kept_without_stem(self) -> int:
        return sum(layer.kept for layer in self.layers[1:])


def relu_sites(model: nn.Module) -> dict[str, MaskedReLU]:
    """All masked ReLU sites by name: in the order of execution for a traced network (what
    :func:`linearize` returns), else in the order of registration."""
    sites = {n: m for n, m in model.named_modules() if isinstance(m, MaskedReLU)}
    if not isinstance(model, fx.GraphModule):
        return sites
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    ordered = {name: sites[name] for name in called if name in sites}
    return ordered | sites


def count_relus(model: nn.Module) -> ReLUCount:
    """Count the ReLUs of a masked network exactly, from its masks."""
    return ReLUCount(
        tuple(
            LayerCount(name, tuple(site.mask.shape), site.total, site.kept)
            for name, site in relu_sites(model).items()
        )
    )
