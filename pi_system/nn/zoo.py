"""The architectures by name."""

from __future__ import annotations

from torch import nn

from ..errors import UsageError
from .resnet import ResNet, WideResNet
from .vgg import VGG16

DEFAULT_WIDTH = {
    "resnet10": 64,
    "resnet18": 64,
    "resnet34": 64,
    "resnet18_imagenet": 64,
    "resnet34_imagenet": 64,
    "wrn22_8": 16,
    "wrn22_8_imagenet": 16,
    "vgg16": 64,
}
_BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


def build(arch: str, *, classes: int, width: int | None = None, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network with ordinary ReLUs.

    Args:
        arch: one of ``DEFAULT_WIDTH``; ``resnet10`` is one block per stage, ``_imagenet`` has the
            stem for large images.
        width: channels of the first stage; ``None`` is the published width.

    Raises:
        UsageError: an unknown name or a width below 1.
    """
    if arch not in DEFAULT_WIDTH:
        raise UsageError(f"unknown architecture {arch!r}; known: {', '.join(DEFAULT_WIDTH)}")
    width = DEFAULT_WIDTH[arch] if width is None else width
    if width < 1:
        raise UsageError(f"the width of {arch} must be at least 1, got {width}")
    if arch == "vgg16":
        return VGG16(width=width, classes=classes, in_channels=in_channels)
    name, large = arch.removesuffix("_imagenet"), arch.endswith("_imagenet")
    if name == "wrn22_8":
        return WideResNet(3, 8, width=width, classes=classes, in_channels=in_channels, large=large)
    return ResNet(_BLOCKS[name], width=width, classes=classes, in_channels=in_channels, large=large)


def input_shape(arch: str) -> tuple[int, int, int]:
    """The (C, H, W) an architecture is published for."""
    return (3, 224, 224) if arch.endswith("_imagenet") else (3, 32, 32)
