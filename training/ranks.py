"""Data-parallel training: one process per rank, started by ``torchrun``, on torch's own engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among ``size`` that train one network; the default is the only one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """What ``torchrun`` says of this process, from its environment."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This rank's equal part of a global batch (N, ...)."""
        share = len(batch) // self.size
        return batch[self.rank * share : (self.rank + 1) * share]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients, and batch statistics, of the global batch."""
        if self.size == 1:
            return model
        _synchronise(model)
        return DistributedDataParallel(model)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started; one rank where it did not start this process."""
    ranks = Ranks.here()
    if ranks.size == 1:
        yield ranks
        return
    dist.init_process_group("gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over the ranks; the gradient of each rank's part is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        result = value.clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result = gradient.clone()
        dist.all_reduce(result)
        return result


def _global_batch_norm(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm over the batch of all ranks; ``nn.SyncBatchNorm`` is for GPUs only."""
    if not module.training:
        return nn.BatchNorm2d.forward(module, x)
    assert module.running_mean is not None and module.running_var is not None
    assert module.momentum is not None and module.num_batches_tracked is not None
    values = x.float()
    count = values.numel() // values.shape[1] * dist.get_world_size()
    mean = _summed(values.sum((0, 2, 3))) / count
    centred = values - mean[:, None, None]
    var = _summed(centred.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        module.num_batches_tracked += 1
        module.running_mean.lerp_(mean, module.momentum)
        module.running_var.lerp_(var * count / (count - 1), module.momentum)
    scale = module.weight * (var + module.eps).rsqrt()
    return (centred * scale[:, None, None] + module.bias[:, None, None]).to(x.dtype)


def _summed(value: Tensor) -> Tensor:
    result: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return result


def _synchronise(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # The class stays, so that a trace still knows the layer.
            module.forward = MethodType(_global_batch_norm, module)  # type: ignore[method-assign]
