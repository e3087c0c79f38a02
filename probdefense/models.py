"""The networks of the seed papers, in pixels: each normalizes inside if it normalizes at all."""

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

    Example:
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
