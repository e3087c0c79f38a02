"""Every example in a docstring runs and says the truth."""

import doctest
import importlib
import math
import pkgutil
import sys
from functools import partial

import pytest
import torch

import probdefense

MODULES = ["probdefense"] + [
    info.name for info in pkgutil.walk_packages(probdefense.__path__, "probdefense.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "math": math, "partial": partial}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, extraglobs=names, optionflags=flags)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    assert result.failed == 0
