"""Small networks for 8x8 and 28x28 images."""

from torch import nn


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


def madry_cnn(num_classes: int = 10) -> nn.Sequential:
    """The network of Madry et al. for MNIST: two 5x5 convolutions, each followed by a pool, and 1,024 units.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 1, 28, 28) -> (batch, num_classes)`` of 3,274,634 parameters.

    References:
        Madry et al., 2018, [Towards Deep Learning Models Resistant to Adversarial
        Attacks](https://arxiv.org/abs/1706.06083)

    Examples:
        >>> madry_cnn()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, num_classes)),
    )


def cohen_lenet(num_classes: int = 10) -> nn.Sequential:
    """The LeNet on which certificates by smoothing are reported for MNIST: 20 and 50 channels, 500 units.

    Args:
        num_classes: Width of the output.

    Returns:
        A network ``(batch, 1, 28, 28) -> (batch, num_classes)`` of 431,080 parameters.

    References:
        LeCun et al., 1998, [Gradient-based learning applied to document
        recognition](https://doi.org/10.1109/5.726791); Cohen et al., 2019, [Certified Adversarial Robustness
        via Randomized Smoothing](https://arxiv.org/abs/1902.02918)

    Examples:
        >>> cohen_lenet()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, num_classes)),
    )


def strided_cnn(in_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """A fast network for 28x28 images: two 4x4 convolutions that skip every second pixel, and 100 units.

    Args:
        in_channels: Channels of the image.
        num_classes: Width of the output.

    Returns:
        A network ``(batch, in_channels, 28, 28) -> (batch, num_classes)`` of 166,406 parameters by default.

    References:
        Wong and Kolter, 2018, [Provable Defenses via the Convex Outer Adversarial
        Polytope](https://arxiv.org/abs/1711.00851)

    Examples:
        >>> strided_cnn()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        *(nn.Conv2d(in_channels, 16, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, num_classes)),
    )
