"""Priors of any shape: the KL through their log-density, equal to Pyro's, and what no prior may be."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.infer import Predictive, Trace_ELBO
from torch import nn

import probdefense as pd
from probdefense.objectives import elbo

N = 8
SPIKE = torch.distributions.MixtureSameFamily(
    torch.distributions.Categorical(torch.tensor([0.5, 0.5])),
    torch.distributions.Normal(torch.zeros(2), torch.tensor([0.1, 1.0])),
)
ROWS = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
COVARIANCE = torch.eye(12) + 0.3
SKEWED = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.AffineTransform(0.1, 2.0)])

PRIORS = {
    "a mixture": SPIKE,
    "a mixture of Pyro": dist.MixtureSameFamily(SPIKE.mixture_distribution, SPIKE.component_distribution),
    "a transformed normal": SKEWED,
    "a masked normal": dist.Normal(0.0, 1.0).mask(torch.tensor(True)),
    "nothing, by a mask": dist.Normal(0.0, 1.0).mask(False),
    "rows of independent normals": dist.Normal(torch.zeros(4), torch.ones(4)).to_event(1),
    "a whole independent tensor": dist.Normal(torch.zeros(3, 4), 2 * torch.ones(3, 4)).to_event(2),
    "a mask of elements": dist.Normal(torch.zeros(3, 4), 1.0).mask(torch.eye(3, 4).bool()),
    "correlated rows": dist.MultivariateNormal(torch.zeros(4), ROWS),
    "a correlated tensor": dist.MultivariateNormal(torch.zeros(12), COVARIANCE),
    "a Student": dist.StudentT(3.0, 0.0, 1.0),
}
every_prior = pytest.mark.parametrize("name", PRIORS)
estimated = pytest.mark.filterwarnings("ignore:KL.* has no closed form")


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def defended(prior, **options):
    torch.manual_seed(0)
    return pd.defenses.bayesian(
        nn.Linear(4, 3, bias=False), num_data=N, prior=prior, init_scale=0.3, **options
    )


def log_prior(prior, weights):
    """By hand: the density of the weights, as a tensor or flat."""
    shaped = weights.flatten() if prior.event_shape == (12,) else weights
    return prior.log_prob(shaped).sum()


@estimated
@every_prior
def test_the_kl_is_that_of_the_densities_at_the_draw(name):
    defense, (x, y) = defended(PRIORS[name]), batch()
    step = defense.step(x, y)
    q = defense.guide.posteriors["weights"]()
    value = step.draws["weights"]
    wanted = q.log_prob(value).sum() - log_prior(PRIORS[name], value.view(3, 4))
    torch.testing.assert_close(step.kl["weights"], wanted)


@estimated
@every_prior
def test_the_objective_is_that_of_pyro(name):
    defense, (x, y) = defended(PRIORS[name]), batch()
    torch.manual_seed(1)
    ours = N * elbo(defense, x, y)
    torch.manual_seed(1)
    theirs = Trace_ELBO().differentiable_loss(defense.model, defense.guide, x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@estimated
@every_prior
@pytest.mark.parametrize("layout", ["flat", "per_tensor"])
def test_such_a_prior_trains_and_travels(name, layout, tmp_path):
    defense, (x, y) = defended(PRIORS[name], layout=layout), batch()
    pd.fit(defense, [(x, y)], epochs=2, seed=0, progress=False)
    twin = defended(PRIORS[name], layout=layout)
    twin.load_state_dict(defense.state_dict())
    assert torch.equal(twin.mean()(x), defense.mean()(x))
    defense.double()
    assert elbo(defense, x.double(), y).dtype == torch.float64
    tree = pd.to_arviz(twin, (x, y), num_samples=2)
    assert "posterior" in tree


@pytest.mark.slow
def test_draws_from_a_nested_prior_are_those_of_the_prior():
    defense, (x, _) = defended(PRIORS["correlated rows"]), batch()
    draws = Predictive(defense.model, num_samples=4000)(x)["weights"].view(-1, 4)
    tolerance = 6 * 3.0 * math.sqrt(2 / len(draws))
    assert float((draws.T.cov() - ROWS).abs().max()) < tolerance


@estimated
def test_parameters_share_a_prior_of_one_element_and_have_their_own_by_name():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert list(pd.defenses.bayesian(net, prior=SPIKE).sites) == ["weights"]
    by_name = pd.defenses.bayesian(
        net,
        num_data=N,
        prior=lambda name, tensor: SPIKE if name.endswith("weight") else dist.Normal(0.0, 1.0),
    )
    assert len(by_name.sites) == 2
    step = by_name.step(*batch())
    names = [names[0] for site in by_name.sites.values() for names in site.names]
    assert sorted(names) == ["0.bias", "0.weight", "2.bias", "2.weight"] and len(step.kl) == 2


@pytest.mark.parametrize(
    "prior",
    [
        dist.HalfNormal(1.0),
        dist.LogNormal(0.0, 1.0),
        dist.Uniform(-5.0, 5.0),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.ExpTransform()]),
        dist.Gamma(torch.ones(4), torch.ones(4)).to_event(1),
        dist.HalfNormal(1.0).mask(True),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.HalfNormal(torch.ones(2))),
    ],
    ids=repr,
)
def test_a_prior_that_excludes_the_posterior_is_refused(prior):
    with pytest.raises(ValueError, match="support is every real number"):
        defended(prior)


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(torch.zeros(5), 1.0),
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        dist.MultivariateNormal(torch.zeros(5), torch.eye(5)),
        dist.Normal(torch.zeros(2, 3, 4), 1.0),
    ],
    ids=repr,
)
def test_a_prior_of_another_shape_is_refused_with_the_name(prior):
    with pytest.raises(ValueError, match=r"of shape \(3, 4\) for weight, got batch shape"):
        defended(prior)
