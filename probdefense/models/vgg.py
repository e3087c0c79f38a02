"""Stacks of 3x3 convolutions with batch normalization."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def vgg16(num_classes: int = 10) -> nn.Sequential:
    """The network of RSE and Adv-BNN for CIFAR-10: thirteen 3x3 convolutions with batch normalization.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 32, 32) -> (batch, num_classes)``.

    References:
        Liu et al., 2018, [Random Self-ensemble](https://arxiv.org/abs/1712.00673)

    Examples:
        >>> vgg16().eval()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    widths = [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]
    return nn.Sequential(*_convolutions(widths), nn.Flatten(), nn.Linear(512, num_classes))


def model_a(num_classes: int = 10) -> nn.Sequential:
    """The network of RSE for STL-10 (96x96): six 3x3 convolutions, the last two without padding.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 96, 96) -> (batch, num_classes)``.

    References:
        Liu et al., 2018, [Random Self-ensemble](https://arxiv.org/abs/1712.00673)

    Examples:
        >>> model_a().eval()(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """
    padded = _convolutions([32, "M", 64, "M", 128, "M", 128, "M"], affine=False)
    valid = _convolutions([256, 256, "M"], in_channels=128, padding=0, affine=False)
    return nn.Sequential(*padded, *valid, nn.Flatten(), nn.Linear(256, num_classes))


def _convolutions(
    widths: Sequence[Any], in_channels: int = 3, padding: int = 1, affine: bool = True
) -> list[nn.Module]:
    """Convolution 3x3, batch normalization and ReLU for every number, a max pool for every ``"M"``."""
    layers: list[nn.Module] = []
    for width in widths:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [
            nn.Conv2d(in_channels, width, 3, padding=padding),
            nn.BatchNorm2d(width, affine=affine),
            nn.ReLU(),
        ]
        in_channels = width
    return layers
