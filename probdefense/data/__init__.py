"""Data sets in pixels [0, 1]: of libraries, in folders, and what a file of yours makes."""

from probdefense.data.augmentation import augmented
from probdefense.data.bundled import Split, digits, mnist_5k
from probdefense.data.folders import Folder
from probdefense.data.sources import SOURCES, Source, load

__all__ = ["SOURCES", "Folder", "Source", "Split", "augmented", "digits", "load", "mnist_5k"]
