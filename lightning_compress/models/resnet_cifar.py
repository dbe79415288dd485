"""The CIFAR ResNets of He et al. (2016): three stages of two-layer blocks on 32 × 32 images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SHORTCUTS = ("pad", "projection")


class PadShortcut(nn.Module):
    """Shortcut "option A": every second pixel, and zeros for the new channels; it has no parameters.

    y[:, p : p + C] = x[:, :, ::s, ::s] and 0 elsewhere, with p = ⌊(C_out − C) / 2⌋.

    Args:
        in_channels: C, channels of the input (N, C, H, W).
        out_channels: C_out ≥ C, channels of the output (N, C_out, ⌈H/s⌉, ⌈W/s⌉).
        stride: s ≥ 1.

    Examples:
        >>> PadShortcut(1, 3, stride=2)(torch.ones(1, 1, 4, 4)).sum(dim=(0, 2, 3)).tolist()
        [0.0, 4.0, 0.0]

    References:
        He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C_out, ⌈H/s⌉, ⌈W/s⌉)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Show the stride and the channels added on both sides."""
        return f"stride={self.stride}, channels_before={self.before}, channels_after={self.after}"


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut: y = ReLU(bn2(conv2(ReLU(bn1(conv1(x))))) + shortcut(x)).

    Args:
        in_channels: Channels of the input (N, in_channels, H, W).
        out_channels: Channels of the output (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).
        stride: Stride of the first convolution and of the shortcut.
        shortcut: "pad" or "projection", used where the shape changes; otherwise the shortcut is the
            identity.

    Examples:
        >>> BasicBlock(16, 32, stride=2, shortcut="pad")(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])

    References:
        He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: torch.Tensor = self.relu2(y + self.shortcut(x))
        return out


class ResNetCIFAR(nn.Module):
    """CIFAR ResNet of depth 6n + 2: a 3×3 convolution, three stages of n blocks, one linear layer.

    Stage widths are w, 2w, 4w at full, half and quarter resolution. Depth 20 has 269,722 parameters and
    40,551,040 MACs with ``shortcut="pad"`` (option A), 272,474 and 40,813,184 with
    ``shortcut="projection"`` (option B), at 32 × 32 and ten classes. Option-A keys are those of the
    published checkpoints (``conv1.weight``, ``bn1.*``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}.*``,
    ``linear.*``); option B adds ``shortcut.0.*`` (convolution) and ``shortcut.1.*`` (BatchNorm).

    Input: float (N, in_channels, H, W), H and W any size, 32 × 32 for CIFAR. The published checkpoints
    expect RGB in 0..1 minus mean (0.485, 0.456, 0.406), divided by std (0.229, 0.224, 0.225). Output:
    logits (N, num_classes).

    Args:
        depth: 6n + 2 with n ≥ 1: 20, 32, 44, 56, 110, 1202 in the paper.
        num_classes: Number of logits, ≥ 1.
        shortcut: "pad" (option A) or "projection" (option B: 1×1 convolution and BatchNorm where the shape
            changes).
        in_channels: Channels of the input image, ≥ 1.
        width: w, channels of the first stage, ≥ 1.

    Raises:
        ValueError: If the depth is not 6n + 2 or the shortcut is unknown.

    Examples:
        >>> model = ResNetCIFAR(20)
        >>> sum(p.numel() for p in model.parameters())
        269722
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    References:
        He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016, section 4.2;
        initialization of He et al., "Delving deep into rectifiers", 2015.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        shortcut: str = "pad",
        in_channels: int = 3,
        width: int = 16,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(
                f"ResNetCIFAR: depth must be 6n + 2 with n >= 1 (8, 14, 20, 26, 32, ...), got {depth}; "
                f"the nearest is {max(8, 6 * round((depth - 2) / 6) + 2)}."
            )
        if shortcut not in SHORTCUTS:
            raise ValueError(
                f"ResNetCIFAR: shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}."
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, 1, shortcut)
        self.layer2 = _stage(width, 2 * width, blocks, 2, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, shortcut)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1))
    )


def resnet20(**kwargs: Any) -> ResNetCIFAR:
    """``ResNetCIFAR(20, **kwargs)``: 269,722 parameters."""
    return ResNetCIFAR(20, **kwargs)


def resnet32(**kwargs: Any) -> ResNetCIFAR:
    """``ResNetCIFAR(32, **kwargs)``: 464,154 parameters."""
    return ResNetCIFAR(32, **kwargs)


def resnet44(**kwargs: Any) -> ResNetCIFAR:
    """``ResNetCIFAR(44, **kwargs)``: 658,586 parameters."""
    return ResNetCIFAR(44, **kwargs)


def resnet56(**kwargs: Any) -> ResNetCIFAR:
    """``ResNetCIFAR(56, **kwargs)``: 853,018 parameters."""
    return ResNetCIFAR(56, **kwargs)


def resnet110(**kwargs: Any) -> ResNetCIFAR:
    """``ResNetCIFAR(110, **kwargs)``: 1,727,962 parameters."""
    return ResNetCIFAR(110, **kwargs)


def resnet1202(**kwargs: Any) -> ResNetCIFAR:
    """``ResNetCIFAR(1202, **kwargs)``: 19,421,274 parameters."""
    return ResNetCIFAR(1202, **kwargs)
