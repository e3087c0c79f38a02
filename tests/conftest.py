"""Every test starts from the same random state and leaves torch's global settings as they were."""

from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pyro.clear_param_store()
        yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype"


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
