"""The networks of the seed papers, in pixels: each normalizes inside if it normalizes at all."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from probdefense.types import Inputs


def small_cnn(in_channels: int = 1, num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Two convolutions and two linear layers for small images such as the 8x8 digits.

    About 38,000 parameters at the default width; an adaptive pool makes any image size fit.

    Args:
        in_channels: Channels of the image.
        num_classes: Width of the output.
        width: Channels of the first convolution; the second has twice as many.

    Returns:
        A network ``(batch, in_channels, height, width) -> (batch, num_classes)``.

    Examples:
        >>> small_cnn()(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def lenet(num_classes: int = 10) -> nn.Sequential:
    """The network of JumpReLU for MNIST: two 5x5 convolutions, three linear layers, dropout between.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 1, 28, 28) -> (batch, num_classes)``.

    References:
        Erichson et al., 2020, [JumpReLU](https://arxiv.org/abs/1904.03750)

    Examples:
        >>> lenet()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(10, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(320, 120), nn.ReLU()),
        *(nn.Linear(120, 90), nn.ReLU(), nn.Linear(90, num_classes)),
    )


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


def resnet20(num_classes: int = 10) -> nn.Module:
    """The residual network of PNI for CIFAR-10: 20 layers, widths 16, 32 and 64, shortcuts without weights.

    Names are those of common checkpoints (``layer1.0.conv1.weight``). It does not normalize: put
    `Normalize` before it if the checkpoint was trained so. Each block runs one ReLU module twice.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 32, 32) -> (batch, num_classes)``.

    References:
        He et al., 2016, [Deep Residual Learning](https://arxiv.org/abs/1512.03385), option A

    Examples:
        >>> resnet20().eval()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return _ResNet(num_classes)


class _ResNet(nn.Module):
    """Three stages of three blocks."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(_Block(16, 16), _Block(16, 16), _Block(16, 16))
        self.layer2 = nn.Sequential(_Block(16, 32), _Block(32, 32), _Block(32, 32))
        self.layer3 = nn.Sequential(_Block(32, 64), _Block(64, 64), _Block(64, 64))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Inputs) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(z))).mean((2, 3)))


class _Block(nn.Module):
    """Two convolutions and a shortcut, which skips pixels and pads channels where the width doubles."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.stride, self.new = width // width_in, width - width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x: Inputs) -> Tensor:
        z = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return self.relu(z + pad(kept, (0, 0, 0, 0, self.new // 2, self.new // 2)))


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
