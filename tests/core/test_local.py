"""Local reparameterization: the ELBO's gradient is unbiased and varies less; nothing but training changes."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import probdefense as pd
from probdefense.defenses import bayesian
from probdefense.objectives import elbo
from tests.worlds import monte_carlo_tolerance, tiny_batch, tiny_net

STEPS = 400


def world(estimator: str) -> tuple[pd.Defense, Tensor, Tensor]:
    """Two classes and one layer, so that the margin of every example is normal."""
    net = nn.Linear(5, 2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, 5, generator=generator))
        net.bias.zero_()
    x = torch.rand(32, 5, generator=generator)
    defense = bayesian(net, num_data=32, init_scale=0.5, estimator=estimator)
    return defense, x, torch.randint(2, (32,), generator=generator)


def gradients(estimator: str) -> Tensor:
    """Of the ELBO in the locations, one per step, ``(STEPS, D)``."""
    defense, x, y = world(estimator)
    loc = defense.guide.posteriors["weights"].loc
    return torch.stack([torch.autograd.grad(elbo(defense, x, y), loc)[0] for _ in range(STEPS)]).double()


def true_gradient() -> Tensor:
    """By a fine sum over the normal margin of every example."""
    defense, x, y = world("weights")
    q = defense.guide.posteriors["weights"]
    loc, scale = q.loc.detach().double().requires_grad_(), q.scale.detach().double()
    weight, bias = loc[:10].view(2, 5), loc[10:]
    spread, x, sign = scale[:10].view(2, 5), x.double(), 1.0 - 2.0 * y.double()
    mean = sign * (x @ (weight[0] - weight[1]) + bias[0] - bias[1])
    deviation = (x.square() @ spread.square().sum(0) + scale[10:].square().sum()).sqrt()
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    loss = nn.functional.softplus(-(mean + z.unsqueeze(1) * deviation)) * density.unsqueeze(1)
    kl = (loc.square().sum() + scale.square().sum()) / 2 / 32
    return torch.autograd.grad((loss.sum(0) / density.sum()).mean() + kl, loc)[0]


@pytest.mark.parametrize("estimator", ["weights", "local"])
def test_the_gradient_of_the_elbo_is_unbiased(estimator):
    found, true = gradients(estimator), true_gradient()
    for mean, deviation, expected in zip(found.mean(0), found.std(0), true, strict=True):
        assert abs(float(mean - expected)) < monte_carlo_tolerance(float(deviation), STEPS)


def test_its_variance_is_a_fraction():
    ratio = gradients("local").var(0).sum() / gradients("weights").var(0).sum()
    assert ratio < 0.3


def test_the_gradient_of_the_scales_is_unbiased_too():
    """Between the estimators, which share nothing but their mean."""
    means, deviations = [], []
    for estimator in ("weights", "local"):
        defense, x, y = world(estimator)
        rho = defense.guide.posteriors["weights"].log_scale
        found = torch.stack([torch.autograd.grad(elbo(defense, x, y), rho)[0] for _ in range(STEPS)])
        means.append(found.mean(0))
        deviations.append(found.var(0))
    for gap, variance in zip(means[0] - means[1], sum(deviations), strict=True):
        assert abs(float(gap)) < monte_carlo_tolerance(float(variance) ** 0.5, STEPS)


def test_every_other_path_draws_weights():
    x, _ = tiny_batch(4)
    plain, local = (bayesian(tiny_net(), estimator=each).eval() for each in ("weights", "local"))
    local.load_state_dict(plain.state_dict())
    for ask in (
        lambda d: d.freeze(3, torch.Generator().manual_seed(0))(x),
        lambda d: d.drawn(x, 3, seed=1),
        lambda d: d.mean()(x),
        lambda d: d.step(x, torch.zeros(4, dtype=torch.int64), d.draw(x)).logits * 0,
    ):
        torch.testing.assert_close(ask(local), ask(plain))


def test_outputs_of_a_convolution_have_the_moments_of_drawn_weights():
    conv, x = nn.Conv2d(1, 2, 3), torch.rand(1, 1, 3, 3)
    net = nn.Sequential(conv, nn.Flatten())
    defense = bayesian(net, init_scale=0.3, num_data=4000, estimator="local")
    logits = defense.step(x.expand(4000, -1, -1, -1), torch.zeros(4000, dtype=torch.int64)).logits.double()
    mean = net(x)[0].double()
    variance = 0.09 * (x.double().square().sum() + 1)
    tolerance = monte_carlo_tolerance(float(variance) ** 0.5, 4000)
    assert ((logits.mean(0) - mean).abs() < tolerance).all()
    assert ((logits.var(0) / variance - 1).abs() < monte_carlo_tolerance(2**0.5, 4000)).all()


def test_layers_get_their_own_forward_back():
    defense = bayesian(tiny_net(), estimator="local", num_data=6)
    defense.step(*tiny_batch(6))
    assert all("forward" not in vars(module) for module in defense.net.modules())


def test_refusals():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    with pytest.raises(ValueError, match="runs twice"):
        bayesian(Twice(), estimator="local").step(torch.rand(2, 3), torch.tensor([0, 1]))
    for wrong in ({"family": dist.Laplace}, {"rank": 1}):
        with pytest.raises(ValueError, match="independent normal"):
            bayesian(nn.Linear(3, 3), estimator="local", **wrong)
    with pytest.raises(ValueError, match="unknown estimator"):
        bayesian(nn.Linear(3, 3), estimator="flipout")


def test_it_trains_with_masks_and_noise():
    build = partial(bayesian, estimator="local", prior=None)
    defense = pd.defenses.rse(build(tiny_net()))
    loss = elbo(defense, *tiny_batch(6))
    loss.backward()
    assert all(p.grad is not None for p in defense.guide.parameters())
