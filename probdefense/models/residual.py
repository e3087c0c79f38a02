"""Residual networks for 32x32 images, under the names of the checkpoints that people share.

He et al., 2016, [Deep Residual Learning](https://arxiv.org/abs/1512.03385) and [Identity
Mappings](https://arxiv.org/abs/1603.05027). None of them normalizes: put `Normalize` before one whose
checkpoint was trained so.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import pad

from probdefense.core.networks import network
from probdefense.types import Inputs
from probdefense.validation import check_count


@network
def resnet(depth: int = 20, num_classes: int = 10) -> nn.Module:
    """The residual network of its paper for CIFAR-10: widths 16, 32 and 64, shortcuts without weights.

    Names are those of common checkpoints (``layer1.0.conv1.weight``). Each block runs one ReLU module
    twice.

    Args:
        depth: Layers, two more than a multiple of 6: 20, 32, 44, 56 or 110 in the paper.
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 32, 32) -> (batch, num_classes)``.

    Raises:
        ValueError: a depth that no number of blocks gives.

    References:
        He et al., 2016, [Deep Residual Learning](https://arxiv.org/abs/1512.03385), option A

    Examples:
        >>> resnet(32).eval()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if check_count("depth", depth, 8) % 6 != 2:
        raise ValueError(f"expected depth as 6 n + 2, such as 20, 32, 44, 56 or 110, got {depth}; choose one")
    return _ResNet(_PaddedBlock, [16, 32, 64], depth // 6, num_classes)


@network
def resnet20(num_classes: int = 10) -> nn.Module:
    """The residual network of PNI for CIFAR-10, ``resnet(20)``: 269,722 parameters.

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
    return resnet(20, num_classes)


@network
def resnet18(num_classes: int = 10) -> nn.Module:
    """The ResNet-18 that is usual for CIFAR-10: a 3x3 convolution first, no pool, widths 64 to 512.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 32, 32) -> (batch, num_classes)`` of 11,173,962 parameters.

    References:
        He et al., 2016, [Deep Residual Learning](https://arxiv.org/abs/1512.03385)

    Examples:
        >>> resnet18().eval()(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return _ResNet(_Block, [64, 128, 256, 512], 2, num_classes)


@network
def preact_resnet18(num_classes: int = 10) -> nn.Module:
    """The ResNet-18 of fast adversarial training: normalization and ReLU come before each convolution.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 32, 32) -> (batch, num_classes)`` of 11,172,170 parameters.

    References:
        He et al., 2016, [Identity Mappings](https://arxiv.org/abs/1603.05027); Wong et al., 2020, [Fast is
        better than free](https://arxiv.org/abs/2001.03994)

    Examples:
        >>> preact_resnet18().eval()(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return _PreActResNet(num_classes)


@network
def wide_resnet(depth: int = 28, width: int = 10, num_classes: int = 10) -> nn.Module:
    """The wide residual network of adversarial training for CIFAR-10.

    Names are those of TRADES and of most of RobustBench (``block1.layer.0.conv1.weight``).

    Args:
        depth: Layers, four more than a multiple of 6: 28 or 34.
        width: How many times wider than 16, 32 and 64 channels.
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 32, 32) -> (batch, num_classes)``; of 36,479,194 parameters by default.

    Raises:
        ValueError: a depth that no number of blocks gives.

    References:
        Zagoruyko and Komodakis, 2016, [Wide Residual Networks](https://arxiv.org/abs/1605.07146)

    Examples:
        >>> wide_resnet(10, 1).eval()(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    if check_count("depth", depth, 10) % 6 != 4:
        raise ValueError(f"expected depth as 6 n + 4, such as 16, 28 or 34, got {depth}; choose one")
    return _WideResNet(depth // 6, check_count("width", width), num_classes)


@network
def resnext29(num_classes: int = 10) -> nn.Module:
    """The ResNeXt of RSE for CIFAR-10: 29 layers, two groups of 64 channels.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 3, 32, 32) -> (batch, num_classes)`` of 9,128,778 parameters.

    References:
        Xie et al., 2017, [Aggregated Residual Transformations](https://arxiv.org/abs/1611.05431); Liu et al.,
        2018, [Random Self-ensemble](https://arxiv.org/abs/1712.00673)

    Examples:
        >>> resnext29().eval()(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return _ResNeXt(num_classes)


def _conv(width_in: int, width: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, groups=groups, bias=False)


def _stage(
    block: Callable[[int, int, int], nn.Module], width_in: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """Blocks of one width, the first of which may skip pixels."""
    later = (block(width, width, 1) for _ in range(count - 1))
    return nn.Sequential(block(width_in, width, stride), *later)


def _shortcut(width_in: int, width: int, stride: int, normalized: bool = True) -> nn.Sequential:
    """The identity, or a 1x1 convolution where the shape changes."""
    if stride == 1 and width_in == width:
        return nn.Sequential()
    layers = [nn.BatchNorm2d(width)] if normalized else []
    return nn.Sequential(_conv(width_in, width, 1, stride), *layers)


class _ResNet(nn.Module):
    """Stages of blocks behind one convolution, and the mean over pixels."""

    def __init__(
        self, block: Callable[[int, int, int], nn.Module], widths: list[int], count: int, num_classes: int
    ):
        super().__init__()
        self.conv1, self.bn1, self.relu = _conv(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU()
        for stage, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            self.add_module(f"layer{stage + 1}", _stage(block, before, width, count, 2 if stage else 1))
        self.num_stages, self.linear = len(widths), nn.Linear(widths[-1], num_classes)

    def forward(self, x: Inputs) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.num_stages):
            z = self.get_submodule(f"layer{stage + 1}")(z)
        return self.linear(z.mean((2, 3)))


class _PaddedBlock(nn.Module):
    """Two convolutions and a shortcut, which skips pixels and pads channels where the width doubles."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.stride, self.new = stride, width - width_in
        self.conv1, self.conv2 = _conv(width_in, width, stride=stride), _conv(width, width)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x: Inputs) -> Tensor:
        z = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return self.relu(z + pad(kept, (0, 0, 0, 0, self.new // 2, self.new // 2)))


class _Block(nn.Module):
    """Two convolutions and a shortcut, which is a 1x1 convolution where the width doubles."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(width_in, width, stride=stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width), nn.BatchNorm2d(width)
        self.shortcut, self.relu = _shortcut(width_in, width, stride), nn.ReLU()

    def forward(self, x: Inputs) -> Tensor:
        z = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(z + self.shortcut(x))


class _PreActResNet(nn.Module):
    """As `_ResNet`, with the normalization at the end."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = _conv(3, 64)
        self.layer1 = _stage(_PreActBlock, 64, 64, 2, 1)
        self.layer2 = _stage(_PreActBlock, 64, 128, 2, 2)
        self.layer3 = _stage(_PreActBlock, 128, 256, 2, 2)
        self.layer4 = _stage(_PreActBlock, 256, 512, 2, 2)
        self.bn, self.relu, self.linear = nn.BatchNorm2d(512), nn.ReLU(), nn.Linear(512, num_classes)

    def forward(self, x: Inputs) -> Tensor:
        z = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.relu(self.bn(z)).mean((2, 3)))


class _PreActBlock(nn.Module):
    """Normalization, ReLU and convolution, twice; a shortcut with weights takes what is normalized."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), _conv(width_in, width, stride=stride)
        self.bn2, self.conv2, self.relu = nn.BatchNorm2d(width), _conv(width, width), nn.ReLU()
        self.shortcut = _shortcut(width_in, width, stride, normalized=False)

    def forward(self, x: Inputs) -> Tensor:
        z = self.relu(self.bn1(x))
        kept = self.shortcut(z) if len(self.shortcut) else x
        return self.conv2(self.relu(self.bn2(self.conv1(z)))) + kept


class _WideResNet(nn.Module):
    """Three wide stages of blocks that normalize first."""

    def __init__(self, count: int, width: int, num_classes: int):
        super().__init__()
        self.conv1 = _conv(3, 16)
        self.block1 = _WideStage(_stage(_WideBlock, 16, 16 * width, count, 1))
        self.block2 = _WideStage(_stage(_WideBlock, 16 * width, 32 * width, count, 2))
        self.block3 = _WideStage(_stage(_WideBlock, 32 * width, 64 * width, count, 2))
        self.bn1, self.relu = nn.BatchNorm2d(64 * width), nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x: Inputs) -> Tensor:
        z = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(z)).mean((2, 3)))


class _WideStage(nn.Module):
    """For the name that checkpoints have."""

    def __init__(self, layer: nn.Sequential):
        super().__init__()
        self.layer = layer

    def forward(self, x: Inputs) -> Tensor:
        return self.layer(x)


class _WideBlock(nn.Module):
    """As `_PreActBlock`, with a shortcut under the name that checkpoints have."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(width_in), nn.ReLU()
        self.conv1 = _conv(width_in, width, stride=stride)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(width), nn.ReLU(), _conv(width, width)
        self.convShortcut = None if width_in == width else _conv(width_in, width, 1, stride)

    def forward(self, x: Inputs) -> Tensor:
        z = self.relu1(self.bn1(x))
        kept = x if self.convShortcut is None else self.convShortcut(z)
        return self.conv2(self.relu2(self.bn2(self.conv1(z)))) + kept


class _ResNeXt(nn.Module):
    """Three stages of three blocks of two groups."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1, self.relu = _conv(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU()
        self.layer1 = _stage(_GroupedBlock, 64, 256, 3, 1)
        self.layer2 = _stage(_GroupedBlock, 256, 512, 3, 2)
        self.layer3 = _stage(_GroupedBlock, 512, 1024, 3, 2)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Inputs) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(z))).mean((2, 3)))


class _GroupedBlock(nn.Module):
    """A bottleneck of half the width whose middle convolution has two groups."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        inner = width // 2
        self.conv1, self.bn1 = _conv(width_in, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, stride=stride, groups=2), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, width, 1), nn.BatchNorm2d(width)
        self.shortcut, self.relu = _shortcut(width_in, width, stride), nn.ReLU()

    def forward(self, x: Inputs) -> Tensor:
        z = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(z)) + self.shortcut(x))
