"""The layers of a graph on CrypTen's shared tensors, where CrypTen's own do not serve.

Shares are additive in Z/2^64 with :data:`.compat.PRECISION_BITS` fractional bits throughout, so
layers that only move or add elements work on the shares directly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import reduce
from typing import Any, Final

import crypten
import torch
from crypten.mpc import MPCTensor
from torch import Tensor

Pair = tuple[int, int]
SharedTensor = Any

LOWEST: Final = -(2**20)
"""What max pooling pads with: below every activation, and far from wrapping."""


def from_share(share: Tensor) -> SharedTensor:
    """The shared tensor of which ``share`` is this party's."""
    return MPCTensor.from_shares(share)


class Layer(crypten.nn.Module):  # type: ignore[misc]
    """A module with encrypted parameters, registered by keyword."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, value, requires_grad=False)


class Conv(Layer):
    """Weight (O, I/groups, kh, kw), bias (O, 1, 1); one exchange."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> None:
        super().__init__(weight=weight, bias=bias)
        self.options = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }

    def forward(self, x: SharedTensor) -> SharedTensor:
        return x.conv2d(self.weight, **self.options).add(self.bias)


class Linear(Layer):
    """Weight (I, O), transposed; bias (O,); one exchange."""

    def forward(self, x: SharedTensor) -> SharedTensor:
        return x.matmul(self.weight).add(self.bias)


class Affine(Layer):
    """Scale and shift of the shape of the channels, (C, 1, 1) or (C,); one exchange."""

    def forward(self, x: SharedTensor) -> SharedTensor:
        return x.mul(self.scale).add(self.shift)


class Add(Layer):
    def forward(self, inputs: list[SharedTensor]) -> SharedTensor:
        return reduce(lambda a, b: a.add(b), inputs)


class Concat(Layer):
    def forward(self, inputs: list[SharedTensor]) -> SharedTensor:
        return from_share(torch.cat([x.share for x in inputs], dim=1))


class Flatten(Layer):
    def forward(self, x: SharedTensor) -> SharedTensor:
        return from_share(x.share.reshape(x.size(0), -1))


class AvgPool(Layer):
    """Sum on the shares, then a division by the window's size, zeros of the padding included."""

    def __init__(self, *, kernel: Pair, stride: Pair, padding: Pair) -> None:
        super().__init__()
        self.options = {"stride": stride, "padding": padding}
        self.kernel = kernel

    def forward(self, x: SharedTensor) -> SharedTensor:
        return x.avg_pool2d(self.kernel, **self.options)


class MaxPool(Layer):
    """Rows, then columns, each as a tree of max(a, b) = a + relu(b - a).

    One batched comparison per level: ceil(log2 kw) + ceil(log2 kh) of them. CrypTen's own also
    computes the position of the maximum.
    """

    def __init__(self, *, kernel: Pair, stride: Pair, padding: Pair) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: SharedTensor) -> SharedTensor:
        height, width = self.padding
        if height or width:
            x = x.pad((width, width, height, height), value=LOWEST)
        for axis in (3, 2):
            x = self._maximum(x, axis, self.kernel[axis - 2], self.stride[axis - 2])
        return x

    @staticmethod
    def _maximum(x: SharedTensor, axis: int, kernel: int, stride: int) -> SharedTensor:
        size = (x.size(axis) - kernel) // stride + 1
        share = x.share.transpose(0, axis)
        windows = [share[k : k + stride * (size - 1) + 1 : stride] for k in range(kernel)]
        while len(windows) > 1:
            half = len(windows) // 2
            first = torch.stack(windows[:half])
            second = torch.stack(windows[half : 2 * half])
            larger = first + from_share(second - first).relu().share
            windows = [*larger.unbind(), *windows[2 * half :]]
        return from_share(windows[0].transpose(0, axis).contiguous())


class MaskedRelu(Layer):
    """ReLU at the kept positions, in one batched comparison of those alone.

    Multiplying by the mask instead would compare everywhere and save nothing.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.kept = mask.flatten().nonzero().flatten()
        self.full = bool(mask.all())

    def forward(self, x: SharedTensor) -> SharedTensor:
        if self.full:
            return x.relu()
        if not len(self.kept):
            return x
        flat = x.share.reshape(x.size(0), -1)
        result = flat.clone()
        result[:, self.kept] = from_share(flat[:, self.kept]).relu().share
        return from_share(result.reshape(x.size()))


class LabelledGraph(crypten.nn.Graph):  # type: ignore[misc]
    """A CrypTen graph run in the order its modules were added, each under its label.

    CrypTen's own run searches for the next computable module and fails where one reads the same
    value twice.
    """

    def __init__(
        self, input: str, output: str, label: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        super().__init__(input, output)
        self._label = label

    def forward(self, x: SharedTensor) -> SharedTensor:
        values = {self.input_names[0]: x}
        order = list(self._graph)
        last = {source: name for name in order for source in self._graph[name]}
        for name in order:
            inputs = [values[source] for source in self._graph[name]]
            with self._label(name):
                values[name] = self._modules[name](inputs[0] if len(inputs) == 1 else inputs)
            for source in self._graph[name]:
                if last[source] == name:
                    values.pop(source, None)
        return values[self.output_names[0]]
