"""VGG-16 with batch norm for small images (Simonyan & Zisserman 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class VGG16(nn.Module):
    """13 convolutions of ``width`` to ``8 * width`` channels on (N, 3, H, W), H, W >= 32."""

    def __init__(self, *, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = in_channels
        for stage in _STAGES:
            for multiple in stage:
                c_out = width * multiple
                layers += [
                    nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                    nn.BatchNorm2d(c_out),
                    nn.ReLU(),
                ]
                c_in = c_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return result
