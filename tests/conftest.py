"""Every test starts from the same random state and leaves torch's global settings as they were."""

import os
from collections.abc import Callable, Iterator

# On tensors this small more threads only wait for each other, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch
from torch import Tensor, nn

import probdefense as pd


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


Digits = tuple[pd.Defense, tuple[Tensor, Tensor]]


def trained_on_digits(build: Callable[[nn.Module], pd.Defense], count: int = 60) -> Digits:
    """A defense of a small network trained on digits, and some test images."""
    train, test = pd.data.digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defense = build(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
        optimizer = torch.optim.Adam(defense.param_groups(), lr=0.02)
        for _ in range(80):
            optimizer.zero_grad()
            pd.objectives.elbo(defense, *train.tensors).backward()
            optimizer.step()
    for parameter in defense.parameters():
        parameter.grad = None
    return defense.eval(), tuple(part[:count] for part in test.tensors)


@pytest.fixture(scope="session")
def digits_net() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A plain network and test images."""
    defense, data = trained_on_digits(pd.deterministic)
    return defense.net, data


@pytest.fixture(scope="session")
def digits_rse() -> Digits:
    """Noise before every layer."""
    return trained_on_digits(lambda net: pd.defenses.rse(net, before_linear=True))


@pytest.fixture(scope="session")
def digits_bayesian() -> Digits:
    """Random weights."""
    return trained_on_digits(lambda net: pd.defenses.bayesian(net, num_data=1437))


@pytest.fixture(scope="session", params=["rse", "bayesian"])
def random_digits(request: pytest.FixtureRequest) -> Digits:
    """Both kinds of randomness."""
    return request.getfixturevalue(f"digits_{request.param}")
