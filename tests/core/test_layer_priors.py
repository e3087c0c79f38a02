"""Priors with parts of their own: learned and drawn scales, mixtures, centers, and the low-rank guide."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.core.families import LogNormalScale
from probdefense.core.low_rank import LowRankNormal
from probdefense.objectives import elbo
from tests.worlds import monte_carlo_tolerance

N = 20


def two_layers() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def kl_of(defense, name="weights"):
    return defense.step(*batch()).kl[name]


def test_a_learned_scale_is_one_per_layer_and_least_at_the_root_mean_square():
    defense = pd.defenses.bayesian(two_layers(), num_data=N, init_scale=0.3, prior=pd.priors.learned_scale())
    prior, q = defense.model.priors["weights"], defense.guide.posteriors["weights"]()
    squares = (q.loc**2 + q.scale**2).detach()
    best = torch.stack([part.mean() for part in squares.split([25, 18])]).sqrt()
    with torch.no_grad():
        prior.log_scale.copy_(best.log())
    (slope,) = torch.autograd.grad(kl_of(defense), prior.log_scale)
    torch.testing.assert_close(slope, torch.zeros(2), atol=1e-4, rtol=0)
    by_hand = sum(
        math.log(s / 0.3) * n for s, n in zip(best.tolist(), (25, 18), strict=True)
    )  # the squares are 1 in the mean, and cancel the -1/2
    assert float(kl_of(defense).detach()) == pytest.approx(by_hand, rel=1e-4)


def test_a_learned_scale_follows_the_weights_to_nothing_where_the_data_say_nothing():
    """The known failure of empirical Bayes: posterior and prior shrink together without a cost."""
    defense = pd.defenses.bayesian(nn.Linear(4, 3), num_data=N, prior=pd.priors.learned_scale())
    q, prior = defense.guide.posteriors["weights"], defense.model.priors["weights"]
    costs = []
    for scale in (1.0, 1e-3):
        with torch.no_grad():
            q.loc.zero_()
            q.log_scale.fill_(math.log(scale))
            prior.log_scale.fill_(math.log(scale))
        costs.append(float(kl_of(defense).detach()))
    assert costs == pytest.approx([0.0, 0.0], abs=1e-4)
    fixed = pd.defenses.bayesian(nn.Linear(4, 3), num_data=N, init_scale=1e-3)
    assert float(kl_of(fixed).detach()) > 50


def test_scales_of_a_hierarchy_are_sites_and_the_kl_is_given_them(float64):
    prior = pd.priors.hierarchical(dist.HalfCauchy(1.0))
    defense = pd.defenses.bayesian(two_layers().double(), num_data=N, prior=prior).double()
    x, y = batch()
    step = defense.step(x.double(), y)
    tau = step.draws["weights_scale"]
    assert tau.shape == (2,) and bool((tau > 0).all())
    q = defense.guide.posteriors["weights"]()
    p = dist.Normal(0.0, torch.cat([tau[:1].expand(25), tau[1:].expand(18)]))
    torch.testing.assert_close(step.kl["weights"], torch.distributions.kl_divergence(q, p).sum())
    slopes = torch.autograd.grad(step.kl["weights"], defense.guide.posteriors["weights_scale"].loc)[0]
    assert bool((slopes.abs() > 0).all())


def test_a_hierarchy_is_in_arviz_by_layer():
    prior = pd.priors.hierarchical(dist.HalfCauchy(1.0))
    defense = pd.defenses.bayesian(two_layers(), num_data=N, prior=prior)
    tree = pd.to_arviz(defense, batch(), num_samples=7)
    assert tree["posterior"]["weights_scale"].shape == (1, 7, 2)
    center = defense.sites["weights_scale"].center().detach()
    (scale,) = (tree[g]["prior_scale"] for g in ("posterior", "constant_data") if "prior_scale" in tree[g])
    found = scale.sel(prior_parameter="2.weight").values.ravel()[0]
    assert found == pytest.approx(float(center[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("hyper", "exact"),
    [
        (dist.LogNormal(0.5, 2.0), lambda q: torch.distributions.kl_divergence(q, dist.LogNormal(0.5, 2.0))),
        (dist.Gamma(2.0, 3.0), None),
        (dist.HalfCauchy(1.0), None),
    ],
    ids=["log-normal", "gamma", "half-cauchy"],
)
def test_the_kl_of_scales_is_as_good_as_closed(hyper, exact, float64):
    loc, scale = torch.tensor([-1.0, 0.7]).double(), torch.tensor([0.3, 1.2]).double()
    q, plain = LogNormalScale(loc, scale), dist.LogNormal(loc, scale)
    kl = torch.distributions.kl_divergence(q, hyper)
    if exact is not None:
        return torch.testing.assert_close(kl, exact(plain))
    torch.manual_seed(0)
    draws = plain.sample((200_000,))
    terms = plain.log_prob(draws) - hyper.log_prob(draws)
    tolerance = monte_carlo_tolerance(float(terms.std(0).max()), len(draws))
    assert float((terms.mean(0) - kl).abs().max()) < tolerance
    assert float(kl.min()) > 3 * tolerance, "the test has no power"
    return None


def test_a_prior_is_learned_by_the_evidence():
    """With weights of size 3 the scale of the prior rises from 0.5; a fixed one would pull them in."""
    defense = pd.defenses.bayesian(nn.Linear(4, 3), num_data=N, prior=pd.priors.learned_scale(0.5))
    with torch.no_grad():
        defense.guide.posteriors["weights"].loc.copy_(3.0 * torch.ones(15))
    defense.guide.requires_grad_(False)
    optimizer = torch.optim.Adam(defense.model.priors.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        elbo(defense, *batch()).backward()
        optimizer.step()
    assert float(defense.model.priors["weights"].log_scale.exp().detach()) == pytest.approx(3.0, rel=0.02)


def test_the_mixture_is_that_of_blundell():
    prior, values = pd.priors.mixture(1.0, 0.1, 0.25), torch.linspace(-2, 2, 9)
    normal = torch.distributions.Normal
    wide, narrow = (normal(0.0, s).log_prob(values).exp() for s in (1.0, 0.1))
    torch.testing.assert_close(prior.log_prob(values).exp(), 0.25 * wide + 0.75 * narrow)
    torch.manual_seed(0)
    draws = prior.sample((40_000,))
    assert float(draws.var()) == pytest.approx(float(prior.variance), rel=0.05)
    assert prior.variance == pytest.approx(0.2575)


@pytest.mark.filterwarnings("ignore:KL.* has no closed form")
def test_a_mixture_is_one_flat_site_and_comes_back_from_a_file(tmp_path):
    net = two_layers()
    defense = pd.defenses.bayesian(net, num_data=N, prior=pd.priors.mixture())
    assert list(defense.sites) == ["weights"]
    step = defense.step(*batch())
    value, q = step.draws["weights"], defense.guide.posteriors["weights"]()
    wanted = q.log_prob(value).sum() - pd.priors.mixture().log_prob(value).sum()
    torch.testing.assert_close(step.kl["weights"], wanted)
    pd.save(defense, tmp_path / "mixture.safetensors")
    again = pd.load(tmp_path / "mixture.safetensors", net=two_layers())
    assert float(again.model.priors["weights"]().scale_2.detach()) == pytest.approx(0.0025)


def test_a_centered_prior_costs_nothing_at_its_center_and_comes_back_from_a_file(tmp_path):
    net = two_layers()
    defense = pd.defenses.bayesian(net, num_data=N, init_scale=0.1, prior=pd.priors.centered(net, 0.1))
    assert float(kl_of(defense).detach()) == pytest.approx(0.0, abs=1e-4)
    zero = pd.defenses.bayesian(net, num_data=N, init_scale=0.1, prior=dist.Normal(0.0, 0.1))
    squares = sum(float(p.detach().square().sum()) for p in net.parameters())
    assert float(kl_of(zero).detach()) == pytest.approx(squares / (2 * 0.1**2), rel=1e-3)
    pd.save(defense, tmp_path / "centered.safetensors")
    other = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    again = pd.load(tmp_path / "centered.safetensors", net=other)
    assert float(kl_of(again).detach()) == pytest.approx(0.0, abs=1e-4)


def test_bad_priors_are_refused():
    with pytest.raises(ValueError, match="every positive number"):
        pd.priors.hierarchical(dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="every positive number"):
        pd.priors.hierarchical(dist.HalfCauchy(torch.ones(3)))
    with pytest.raises(TypeError, match="expected hyper as Distribution"):
        pd.priors.hierarchical(1.0)
    with pytest.raises(ValueError, match="expected init > 0"):
        pd.priors.learned_scale(0.0)
    with pytest.raises(ValueError, match="expected a weight weight of shape"):
        pd.defenses.bayesian(nn.Linear(4, 3), prior=pd.priors.centered(nn.Linear(5, 3), 0.1))


def test_scales_stay_between_floor_and_ceiling_and_can_come_back():
    defense = pd.defenses.bayesian(nn.Linear(4, 3), init_scale=0.2, floor=0.1, ceiling=0.4)
    q = defense.guide.posteriors["weights"]
    torch.testing.assert_close(q().scale.detach(), torch.full((15,), 0.2))
    with torch.no_grad():
        q.log_scale.copy_(torch.linspace(-8, 8, 15))
    scale = q().scale
    assert 0.1 <= float(scale.detach().min()) < 0.11 and 0.39 < float(scale.detach().max()) <= 0.4
    (slope,) = torch.autograd.grad(scale.sum(), q.log_scale)
    assert bool((slope > 0).all()), "a clamp would have none at the ceiling"
    with pytest.raises(ValueError, match="expected init_scale below the ceiling"):
        pd.defenses.bayesian(nn.Linear(4, 3), init_scale=0.5, ceiling=0.5)


# The low-rank guide


def low_rank(size=6, rank=2):
    generator = torch.Generator().manual_seed(1)
    loc, factor = (torch.randn(*s, generator=generator).double() for s in ((size,), (size, rank)))
    scale = torch.rand(size, generator=generator).double() + 0.2
    return LowRankNormal(loc, scale, factor), factor @ factor.T + torch.diag(scale**2)


def test_the_low_rank_density_and_kl_are_those_of_the_full_normal(float64):
    q, covariance = low_rank()
    full = torch.distributions.MultivariateNormal(q.loc, covariance)
    values = torch.randn(5, 6).double()
    torch.testing.assert_close(q.log_prob(values), full.log_prob(values))
    prior_scale = torch.linspace(0.5, 2.0, 6).double()
    p = dist.Normal(torch.zeros(6).double(), prior_scale).to_event(1)
    diagonal = torch.distributions.MultivariateNormal(torch.zeros(6).double(), torch.diag(prior_scale**2))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(kl(q, p), kl(full, diagonal))


def test_low_rank_draws_have_the_covariance():
    q, covariance = low_rank()
    torch.manual_seed(0)
    draws = q.rsample((40_000,))
    error = (draws.T.cov() - covariance).abs().max()
    assert float(error) < monte_carlo_tolerance(float(covariance.diagonal().max()) * 2**0.5, 40_000)
    assert float(covariance.fill_diagonal_(0).abs().max()) > 10 * float(error), "the test has no power"


def regression():
    """Conjugate: two inputs that nearly agree, so that their weights can hardly be told apart."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, 1, generator=generator)
    x = torch.cat([first, first + 0.3 * torch.randn(40, 1, generator=generator)], dim=1)
    precision = x.T @ x + torch.eye(2)
    y = x @ torch.tensor([1.0, -0.5]) + torch.randn(40, generator=generator)
    return x, y, torch.linalg.inv(precision), torch.linalg.solve(precision, x.T @ y)


def covariance_of(posterior):
    q = posterior()
    return torch.diag(q.scale**2) + (q.factor @ q.factor.T if hasattr(q, "factor") else 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_low_rank_guide_reaches_a_correlated_posterior_that_mean_field_cannot(rank):
    """Fitted on the closed ELBO of the regression: E_q of the squares is known, the KL is ours."""
    x, y, covariance, mean = regression()
    net = nn.Linear(2, 1, bias=False)
    defense = pd.defenses.bayesian(net, num_data=40, init_scale=0.2, rank=rank)
    q = defense.guide.posteriors["weights"]
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.02)
    for _ in range(1500):
        w = covariance_of(q)
        loss = ((y - x @ q.loc).square().sum() + (x.T @ x * w).sum()) / 2
        if rank:
            p = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            loss = loss + torch.distributions.kl_divergence(q(), p)
        else:
            loss = loss + torch.distributions.kl_divergence(q(), dist.Normal(torch.zeros(2), 1.0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = covariance_of(q).detach()
    torch.testing.assert_close(q.loc.detach(), mean, rtol=0.02, atol=0.02)
    error = float((found - covariance).norm() / covariance.norm())
    assert error < 0.02 if rank else error > 0.5
    if not rank:  # the known answer of mean field: the inverse of the diagonal of the precision
        wanted = 1 / (x.T @ x + torch.eye(2)).diagonal()
        torch.testing.assert_close(q.scale.detach() ** 2, wanted, rtol=0.02, atol=0)


def test_a_rank_is_for_normal_elements():
    with pytest.raises(ValueError, match="expected family=Normal with rank=2"):
        pd.defenses.bayesian(nn.Linear(4, 3), family=dist.Laplace, rank=2)
