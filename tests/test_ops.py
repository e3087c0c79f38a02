"""Projections, steps and norms, by their defining properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probdefense.ops import Ball, log_mean_exp, lp_norm
from probdefense.rng import Stream

NORMS = [1, 2, math.inf]
seeds = st.integers(0, 2**31)
radii = st.floats(1e-3, 3.0)


def box_points(seed: int, count: int = 4, dims: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, dims, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.2, x.round(), x)


def far_points(x: torch.Tensor, seed: int) -> torch.Tensor:
    return x + 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=x.dtype)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=60, deadline=None)
@given(seed=seeds, eps=radii)
def test_projection_lands_inside_and_stays(norm, seed, eps):
    x = box_points(seed)
    ball = Ball(x, eps, norm)
    once = ball.project(far_points(x, seed))
    assert bool((lp_norm(once - x, norm) <= eps * (1 + 1e-9)).all())
    assert float(once.min()) >= 0 and float(once.max()) <= 1
    torch.testing.assert_close(ball.project(once), once, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_projection_is_the_identity_inside(norm, seed):
    x = box_points(seed)
    inside = (x + 0.01 * (0.5 - x)).clamp(0, 1)
    torch.testing.assert_close(Ball(x, 1.0, norm).project(inside), inside, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [1, math.inf])
@settings(max_examples=30, deadline=None)
@given(seed=seeds, eps=st.floats(0.05, 1.5))
def test_exact_projections_are_the_nearest_point(norm, seed, eps):
    x = box_points(seed, count=1)
    far = far_points(x, seed)
    ball = Ball(x, eps, norm)
    nearest = ball.project(far)
    others = ball.project(nearest + 0.1 * torch.randn(500, *x.shape[1:], dtype=x.dtype))
    candidates = Ball(x.expand(500, -1), eps, norm).project(others)
    assert float((nearest - far).norm()) <= float((candidates - far).flatten(1).norm(dim=1).min()) + 1e-9


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_steepest_step_has_unit_norm_and_climbs(norm, seed):
    x = box_points(seed, dims=60).clamp(0.1, 0.9)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    step = Ball(x, 1.0, norm).steepest(gradient, x)
    torch.testing.assert_close(lp_norm(step, norm), torch.ones(len(x), dtype=x.dtype))
    gain = (gradient * step).flatten(1).sum(1)
    if norm == 1:
        assert bool((gain >= 0.5 * gradient.abs().flatten(1).amax(1)).all())
    else:
        dual = {2: 2, math.inf: 1}[norm]
        torch.testing.assert_close(gain, lp_norm(gradient, dual))


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_means_no_step(norm):
    x = torch.full((2, 30), 0.5)
    assert float(Ball(x, 0.3, norm).steepest(torch.zeros_like(x), x).abs().max()) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_starts_fill_the_ball_and_belong_to_their_example(norm):
    x = torch.full((400, 3), 0.5)
    ball = Ball(x, 0.3, norm)
    start = ball.start(Stream(torch.arange(400)))
    size = lp_norm(start - x, norm)
    assert float(size.max()) <= 0.3 + 1e-6
    median = 0.3 * 0.5 ** (1 / 3)  # of the radius of a uniform point in three dimensions
    assert abs(float(size.median()) - median) < 0.03
    alone = Ball(x[:7], 0.3, norm).start(Stream(torch.arange(400)[:7]))
    torch.testing.assert_close(alone, start[:7], rtol=0, atol=1e-6)


def test_radius_per_example():
    x = torch.full((2, 3), 0.5)
    points = Ball(x, torch.tensor([0.1, 0.4]), math.inf).project(torch.ones(2, 3))
    torch.testing.assert_close(points, torch.tensor([[0.6] * 3, [0.9] * 3]))


def test_log_mean_exp_does_not_overflow():
    values = torch.tensor([[1000.0, 1001.0], [-1000.0, -1002.0]])
    expected = values.double().logsumexp(1) - math.log(2)
    torch.testing.assert_close(log_mean_exp(values, 1).double(), expected)
