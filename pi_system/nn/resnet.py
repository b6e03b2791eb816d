"""ResNet-18/34 (He et al. 2016) with the CIFAR or the ImageNet stem, and WRN-22-8."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


def _stem(c_in: int, c_out: int, large: bool) -> tuple[nn.Conv2d, nn.Module]:
    """The first convolution and the pooling after it."""
    if large:
        return nn.Conv2d(c_in, c_out, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
    return _conv3(c_in, c_out), nn.Identity()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ReLU after the addition."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3(c_out, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        result: Tensor = self.relu2(y + self.shortcut(x))
        return result


class ResNet(nn.Module):
    """Residual network on (N, 3, H, W) images, H and W multiples of 8, or 32 with ``large``.

    Args:
        blocks: blocks per stage.
        width: channels of the first stage; later stages double it.
        large: the stem for large images, a 7x7 convolution and max pooling, each of stride 2,
            instead of a 3x3 convolution.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        width: int,
        classes: int,
        in_channels: int,
        large: bool = False,
    ):
        super().__init__()
        self.conv1, self.pool = _stem(in_channels, width, large)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages, c_in = [], width
        for i, count in enumerate(blocks):
            c_out, layers = width << i, []
            for j in range(count):
                layers.append(BasicBlock(c_in, c_out, 2 if i and not j else 1))
                c_in = c_out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.pool(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return result


class PreActBlock(nn.Module):
    """Pre-activation block of wide residual networks (Zagoruyko & Komodakis 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv3(c_out, c_out)
        self.project = stride != 1 or c_in != c_out
        if self.project:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(x))
        skip = self.shortcut(y) if self.project else x
        result: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(y)))) + skip
        return result


class WideResNet(nn.Module):
    """WRN-``6n+4``-k: three stages of ``blocks`` pre-activation blocks, ``width * factor`` wide.

    Args:
        large: the stem for large images, as in :class:`ResNet`.
    """

    def __init__(
        self,
        blocks: int,
        factor: int,
        *,
        width: int,
        classes: int,
        in_channels: int,
        large: bool = False,
    ):
        super().__init__()
        self.conv1, self.pool = _stem(in_channels, width, large)
        layers, c_in = [], width
        for i in range(3):
            c_out = width * factor << i
            for j in range(blocks):
                layers.append(PreActBlock(c_in, c_out, 2 if i and not j else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(c_in)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.blocks(self.pool(self.conv1(x)))))
        result: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return result
