"""One network that runs at several widths (SENet++; slimmable networks, Yu et al., ICLR 2019).

Channels are ordered: a narrower network uses the first channels of every layer, shares their
weights and has the same part of the masks, but keeps batch norms of its own, since its statistics
are others. Cut out, it is an ordinary network of a smaller width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from pi_system.nn import MaskedReLU

from . import teacher
from .loop import Run


class Sliced(nn.Module):
    """The first outputs and inputs of a convolution or linear layer that is trained elsewhere."""

    def __init__(self, whole: nn.Conv2d | nn.Linear, outputs: int, inputs: int) -> None:
        super().__init__()
        # In a tuple, so that the parameters belong to the whole layer alone.
        self._whole = (whole,)
        self.outputs, self.inputs = outputs, inputs

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight (outputs, inputs, ...) and bias (outputs,)."""
        whole = self._whole[0]
        bias = None if whole.bias is None else whole.bias[: self.outputs]
        return whole.weight[: self.outputs, : self.inputs], bias

    def forward(self, x: Tensor) -> Tensor:
        whole, (weight, bias) = self._whole[0], self.weights()
        if isinstance(whole, nn.Linear):
            return F.linear(x, weight, bias)
        stride, padding, dilation = whole.stride, whole.padding, whole.dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation)


class Slimmable(nn.Module):
    """A masked network and its narrower versions; called, it is the full one.

    Args:
        full: the network of the recipe's width, with its masks.
        fractions: of the recipe's channels, ascending; the last is 1, ``full`` itself.
    """

    def __init__(self, run: Run, full: fx.GraphModule, fractions: Sequence[float]) -> None:
        super().__init__()
        self.full = full
        self.channels = {f: run.recipe.channels_at(f) for f in fractions}
        self._run = run
        # Module names have no dots.
        self._narrow = nn.ModuleDict(
            {str(c): self._slice(c) for c in self.channels.values() if c != run.recipe.channels}
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.full(x)
        return result

    def at(self, fraction: float) -> fx.GraphModule:
        """The network of one width; it shares its weights with the others."""
        channels = self.channels[fraction]
        if channels == self._run.recipe.channels:
            return self.full
        narrow = self._narrow[str(channels)]
        assert isinstance(narrow, fx.GraphModule)
        return narrow

    def cut(self, fraction: float) -> fx.GraphModule:
        """The network of one width on its own: a masked network with copies of its weights."""
        source = self.at(fraction)
        result = _network(self._run, self.channels[fraction])
        state = {k: v.clone() for k, v in source.state_dict().items()}
        for name, module in source.named_modules():
            if isinstance(module, Sliced):
                weight, bias = module.weights()
                state[f"{name}.weight"] = weight.detach().clone()
                if bias is not None:
                    state[f"{name}.bias"] = bias.detach().clone()
        result.load_state_dict(state)
        return result.train(source.training)

    def _slice(self, channels: int) -> fx.GraphModule:
        narrow = _network(self._run, channels)
        for name, module in list(narrow.named_modules()):
            whole: Any = self.full.get_submodule(name)
            if isinstance(module, nn.Conv2d):
                sliced = Sliced(whole, module.out_channels, module.in_channels)
                narrow.set_submodule(name, sliced)
            elif isinstance(module, nn.Linear):
                narrow.set_submodule(name, Sliced(whole, module.out_features, module.in_features))
            elif isinstance(module, nn.BatchNorm2d):
                values = whole.state_dict()
                count = module.num_features
                module.load_state_dict({k: v[:count] if v.dim() else v for k, v in values.items()})
            elif isinstance(module, MaskedReLU):
                module.set_mask(whole.mask[: len(module.mask)])
        return narrow


def _network(run: Run, channels: int) -> fx.GraphModule:
    return teacher.masked(run, teacher.fresh(run, "slimmable", channels))
