"""LeNet-5 with ReLU and max-pooling, for MNIST-sized images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LeNet5(nn.Module):
    """Two convolutions and three linear layers: 61,706 parameters, 416,520 MACs on a 28 × 28 image.

    ``conv1`` 5×5 (6, padding 2) → ReLU → max-pool 2 → ``conv2`` 5×5 (16) → ReLU → max-pool 2 → flatten →
    ``fc1`` (120) → ReLU → ``fc2`` (84) → ReLU → ``fc3``. The original's sigmoids, trainable pooling and
    partial connections are replaced, as is usual today.

    Input: float (N, in_channels, 28, 28). For MNIST that is ``(x / 255 − 0.1307) / 0.3081`` of the grey
    value x.
    Output: logits (N, num_classes).

    Args:
        num_classes: Number of logits, ≥ 1.
        in_channels: Channels of the input image, ≥ 1.

    Examples:
        >>> LeNet5()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    References:
        LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, kernel_size=5, padding=2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.relu2 = nn.ReLU()
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, 28, 28) to logits (N, num_classes)."""
        x = F.max_pool2d(self.relu1(self.conv1(x)), 2)
        x = F.max_pool2d(self.relu2(self.conv2(x)), 2)
        x = self.relu3(self.fc1(torch.flatten(x, 1)))
        x = self.relu4(self.fc2(x))
        logits: torch.Tensor = self.fc3(x)
        return logits
