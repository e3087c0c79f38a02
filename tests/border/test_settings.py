"""Settings of attacks in every form that means the same: tensors, arrays, numbers of NumPy, rounding."""

from functools import partial

import numpy as np
import pytest
import torch

import probdefense as pd
from tests.border.table import World

pgd, square = partial(pd.attacks.pgd, num_steps=1, seed=0), partial(pd.attacks.square, max_queries=4, seed=0)
suite = partial(pd.attacks.suite, budget=210, seed=0)

RADII = [
    torch.tensor(0.1),
    np.float32(0.1),
    np.float64(0.1),
    np.array(0.1),
    torch.full((4,), 0.1),
    np.full(4, 0.1),
]


@pytest.mark.parametrize("eps", RADII, ids=lambda eps: f"{type(eps).__name__} {getattr(eps, 'shape', '')}")
@pytest.mark.parametrize("attack", [pgd, square, partial(pd.attacks.apgd, num_steps=2, seed=0), suite])
def test_radii_of_every_kind_are_radii(attack, eps):
    world = World()
    found, wanted = (attack(world.plain, *world.data, eps=value) for value in (eps, 0.1))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_every_example_has_its_radius():
    world, radii = World(), np.array([0.0, 0.05, 0.1, 0.2])
    moved = (pgd(world.plain, *world.data, eps=radii) - world.x).abs().amax(1)
    assert bool((moved <= torch.as_tensor(radii) + 1e-6).all()) and float(moved[0]) == 0 < float(moved[3])


@pytest.mark.parametrize("norm", [np.inf, np.float64(2), torch.tensor(2.0), np.int64(1)])
def test_norms_of_every_kind_are_norms(norm):
    world = World()
    wanted = pgd(world.plain, *world.data, eps=0.1, norm=float(norm))
    assert torch.equal(pgd(world.plain, *world.data, eps=0.1, norm=norm), wanted)


def test_numbers_of_numpy_are_numbers():
    world = World()
    wanted = pgd(world.plain, *world.data, eps=0.1, num_steps=2, step_size=0.05, max_batch=3)
    options = {"num_steps": np.int64(2), "step_size": np.float64(0.05), "max_batch": np.int32(3)}
    assert torch.equal(pgd(world.plain, *world.data, eps=0.1, **options), wanted)


def test_pixels_that_rounding_carried_out_are_put_back():
    world = World()
    edge = torch.ones(4, 6)
    for out in (edge + 1.2e-7, edge.clone().fill_(1 + 9e-7)):
        assert float(out.max()) > 1
        found = pgd(world.plain, out, world.y, eps=0.1)
        assert torch.equal(found, pgd(world.plain, edge, world.y, eps=0.1)) and float(found.max()) <= 1
    assert float(pgd(world.plain, edge * 0 - 1e-7, world.y, eps=0.1).min()) >= 0
