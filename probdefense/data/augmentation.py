"""Crops and flips of training images, drawn anew whenever an example is asked for."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from probdefense.validation import check_count


def augmented(data: Any, *, crop: int = 4, flip: bool = True) -> Dataset[tuple[Tensor, Any]]:
    """A data set whose images are shifted and mirrored at random, as is usual for CIFAR-10.

    The draws come from torch's random state: that of the process, or of each worker of a `DataLoader`.
    Mirror no digits or letters.

    Args:
        data: A map-style data set of images ``(channels, height, width)`` and labels.
        crop: By how many pixels an image moves at most, up or down and left or right; black comes in.
        flip: Whether every second image, by chance, is mirrored left to right.

    Returns:
        A map-style data set of the same size.

    Raises:
        TypeError: not a map-style data set.
        ValueError: a negative number of pixels; when it is used, something else than images.

    References:
        He et al., 2016, [Deep Residual Learning](https://arxiv.org/abs/1512.03385), section 4.2

    Examples:
        >>> data = torch.utils.data.TensorDataset(torch.ones(5, 1, 4, 4), torch.arange(5))
        >>> x, y = augmented(data, crop=2)[3]
        >>> x.shape, y
        (torch.Size([1, 4, 4]), tensor(3))
    """
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            f"expected a map-style data set, got {type(data).__name__}; wrap tensors in "
            "torch.utils.data.TensorDataset(x, y)"
        )
    return _Augmented(data, check_count("crop", crop, 0), flip)


class _Augmented(Dataset[tuple[Tensor, Any]]):
    """The data set behind `augmented`."""

    def __init__(self, data: Any, crop: int, flip: bool):
        self.data, self.crop, self.flip = data, crop, flip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        x, y = self.data[index]
        if not isinstance(x, Tensor) or x.dim() != 3:
            came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected an image (channels, height, width), got {came}; augment images only")
        top, left = torch.randint(2 * self.crop + 1, (2,)).tolist()
        x = pad(x, [self.crop] * 4)[:, top : top + x.shape[1], left : left + x.shape[2]]
        return (x.flip(-1) if self.flip and bool(torch.rand(()) < 0.5) else x), y
