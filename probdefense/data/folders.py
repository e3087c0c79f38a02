"""Images in folders, one per class, read while they are used: for sets that do not fit into memory."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Folder(Dataset[tuple[Tensor, int]]):
    """A map-style data set of the images in a folder, in the layout of torchvision's ``ImageFolder``.

    Classes are the sub-folders in alphabetical order. Images are gray if the first one is, else in
    color, and all of one size, as they come: nothing is resized.

    Args:
        path: The folder.
        classes: Its classes, where another folder has named them.

    Raises:
        ValueError: no folder, no classes or no images in one, or classes that were not named.

    Examples:
        >>> Folder("absent")
        Traceback (most recent call last):
        ...
        ValueError: expected a folder of images at absent, got nothing; put one folder per class there
    """

    def __init__(self, path: Path | str, classes: list[str] | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            came = "a file" if self.path.exists() else "nothing"
            raise ValueError(
                f"expected a folder of images at {self.path}, got {came}; put one folder per class there"
            )
        present = sorted(part.name for part in self.path.iterdir() if part.is_dir())
        self.classes = present if classes is None else classes
        if unknown := [name for name in present if name not in self.classes]:
            raise ValueError(
                f"expected the classes {', '.join(self.classes[:10])} in {self.path}, got "
                f"{', '.join(unknown[:10])} too; training and test set need the same"
            )
        self.images = [(file, self.classes.index(name)) for name in present for file in self._files(name)]
        if not self.images:
            raise ValueError(
                f"expected images in {self.path}, one folder per class, got none; endings are "
                f"{', '.join(ENDINGS)}"
            )
        self.mode = "RGB"
        self.mode = "L" if _mode(self.images[0][0]) in ("1", "L", "I;16") else "RGB"
        self.shape = tuple(self[0][0].shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """``(channels, height, width)`` in [0, 1], and the number of the class.

        Raises:
            ValueError: the file holds no image, or one of another size.
        """
        file, label = self.images[index]
        x = _read(file, self.mode)
        if x.shape != getattr(self, "shape", x.shape):
            raise ValueError(
                f"expected images of {self.shape}, as {self.images[0][0]}, got {tuple(x.shape)} at {file}; "
                "resize them to one size"
            )
        return x, label

    def _files(self, name: str) -> list[Path]:
        found = sorted(f for f in (self.path / name).rglob("*") if f.suffix.lower() in ENDINGS)
        if not found:
            raise ValueError(
                f"expected images in {self.path / name}, got none; remove the folder, or put images there"
            )
        return found


def _mode(file: Path) -> str:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.mode
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(file) from error


def _read(file: Path, mode: str) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(file) from error
    x = torch.as_tensor(pixels).float() / 255
    return x.unsqueeze(0) if mode == "L" else x.permute(2, 0, 1).contiguous()


def _unreadable(file: Path) -> ValueError:
    return ValueError(f"expected an image in {file}, got something else or a part of one; fetch it anew")
