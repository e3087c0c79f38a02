"""NumPyro: JAX posteriors under attack, and NUTS as the gold standard beside SVI."""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.numpyro import bridge, compare_to_gold, last_layer_nuts, nuts
from probdefense.numpyro.chains import run_chains
from tests.contract import FIXED_BUDGET, MIN_NORM, defended
from tests.worlds import FAILURE_RATE, normal_quantile, tiny_batch

# The bridge

DRAWS = {"layer": {"w": np.random.default_rng(0).normal(size=(5, 4, 3)), "b": np.arange(15.0).reshape(5, 3)}}


def apply_fn(params, x):
    return jnp.tanh(x) @ params["layer"]["w"] + params["layer"]["b"]


def in_torch(x, members):
    w, b = (torch.tensor(DRAWS["layer"][name], dtype=torch.float32)[members] for name in ("w", "b"))
    return torch.tanh(x) @ w + b.unsqueeze(1)


def points(count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def test_logits_and_input_gradients_are_those_of_the_same_network_in_torch():
    frozen, (x, _) = bridge(apply_fn, DRAWS).freeze(4), points()
    answers = []
    for function in (frozen, partial(in_torch, members=frozen.members)):
        point = x.clone().requires_grad_(True)
        logits = function(point)
        answers.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), point)))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_call_picks_draws_evenly_with_replacement():
    posterior = bridge(lambda params, x: params["k"] * jnp.ones((len(x), 2)), {"k": np.arange(5.0)})
    assert posterior.stochastic and posterior(torch.rand(2, 4)).shape == (1, 2, 2)
    picked = posterior(torch.rand(1, 4), 3000)[:, 0, 0].long()
    assert stats.chisquare(torch.bincount(picked)).pvalue > FAILURE_RATE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = posterior(torch.rand(1, 4), 9)
        torch.manual_seed(0)
        assert torch.equal(first, posterior(torch.rand(1, 4), 9))


def test_freezing_picks_a_subset_once():
    posterior, (x, _) = bridge(apply_fn, DRAWS), points()
    frozen = posterior.freeze(5)
    assert not frozen.stochastic and frozen.freeze(2) is frozen
    assert sorted(frozen.members.tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(frozen(x), frozen(x, 3)) and len(frozen(x)) == 5
    torch.testing.assert_close(frozen(x)[:, 2:4], frozen(x[2:4]))
    assert len(posterior.freeze(8)(x)) == 8


def test_the_mean_and_doubles():
    posterior, (x, _) = bridge(apply_fn, DRAWS), points()
    mean = torch.stack([torch.tensor(DRAWS["layer"]["w"]).mean(0)])
    expected = torch.tanh(x) @ mean.float() + torch.tensor(DRAWS["layer"]["b"]).mean(0).float()
    torch.testing.assert_close(posterior.mean()(x), expected)
    assert posterior.mean()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", [*FIXED_BUDGET, *MIN_NORM])
def test_every_attack_runs_on_it(name):
    posterior, (x, y) = bridge(apply_fn, DRAWS), points(3)
    attack = MIN_NORM[name] if name in MIN_NORM else partial(FIXED_BUDGET[name], eps=0.1)
    x_adv = attack(posterior.samples(2), x, y, seed=0)
    assert x_adv.shape == x.shape and bool(torch.isfinite(x_adv).all())


def test_its_report_depends_on_the_seed_alone():
    posterior, data = bridge(apply_fn, DRAWS), points()
    reports = [pd.evaluate(posterior, data, {"fgsm": pd.attacks.fgsm}, num_samples=6) for _ in range(2)]
    assert reports[0].rows == reports[1].rows


def test_bad_draws_are_refused():
    with pytest.raises(ValueError, match="share a leading axis of draws"):
        bridge(apply_fn, {"a": np.ones((5, 2)), "b": np.ones((6, 2))})
    with pytest.raises(ValueError, match="share a leading axis of draws"):
        bridge(apply_fn, {"a": np.ones(())})
    with pytest.raises(ValueError, match=r"to give logits \(2, classes\), got \(2,\)"):
        bridge(lambda params, x: x @ params["w"], {"w": np.ones((5, 4))})(torch.rand(2, 4))


# Conjugate regression: the labels are numbers with Gaussian noise, so the posterior is closed

NOISE = 0.6


class Regression(PyroModule):
    def forward(self, x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = x @ w
        with pyro.plate("data", size=len(x), subsample=range(len(x))):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=None if y is None else y.to(mean.dtype))
        return torch.stack([torch.zeros_like(mean), mean], dim=-1)


class FullRank(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.zeros(2))
        self.tril = PyroParam(0.1 * torch.eye(2), constraint=constraints.lower_cholesky)

    def forward(self, x, y=None):
        pyro.sample("w", dist.MultivariateNormal(self.loc, scale_tril=self.tril))


def regression_data():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(30, 2, generator=generator)
    y = (x @ torch.tensor([1.5, 1.0]) + NOISE * torch.randn(30, generator=generator)).round().clamp_min(0)
    return x, y.long()


def closed_posterior(x, y):
    precision = torch.eye(2) + x.T @ x / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ x.T @ y.float() / NOISE**2, covariance


def same_posterior(draws, x, y, effective):
    """Whether means and standard deviations agree with the closed form within Monte Carlo error."""
    mean, covariance = closed_posterior(x, y)
    deviation = covariance.diagonal().sqrt()
    off_mean = (draws.mean(0) - mean).abs() / (deviation / math.sqrt(effective))
    off_scale = (draws.std(0) / deviation - 1).abs() * math.sqrt(2 * effective)
    return max(float(off_mean.max()), float(off_scale.max())) < normal_quantile()


@pytest.mark.slow
def test_svi_nuts_and_numpyro_reach_the_closed_posterior():
    x, y = regression_data()
    with pyro.settings.context(module_local_params=True):
        defense = pd.Defense(Regression(), FullRank(), example=x)
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=30)
    pd.fit(
        defense,
        loader,
        epochs=400,
        objective=partial(pd.objectives.elbo, num_particles=4),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400),
        progress=False,
    )
    mean, covariance = closed_posterior(x, y)
    torch.testing.assert_close(defense.guide.loc.detach(), mean, rtol=0, atol=0.05)
    tril = defense.guide.tril.detach()
    torch.testing.assert_close(tril @ tril.T, covariance, rtol=0.2, atol=0.005)

    gold = nuts(defense, (x, y), num_samples=120, num_warmup=60)
    drawn = torch.stack([gold.draw(x)["w"] for _ in range(600)])
    assert same_posterior(drawn, x, y, effective=120)
    assert not same_posterior(drawn + 0.6 * covariance.diagonal().sqrt(), x, y, effective=120)

    def model(x, y):
        w = numpyro.sample("w", ndist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", ndist.Normal(x @ w, NOISE), obs=y)

    data, start = (x.numpy(), y.numpy()), {"w": np.zeros(2)}
    chains = run_chains(model, data, start, num_warmup=200, num_samples=250, num_chains=2, seed=0)
    draws = {name: value.reshape(-1, 2) for name, value in chains.items()}
    assert same_posterior(torch.tensor(np.asarray(draws["w"])), x, y, effective=120)
    posterior = bridge(lambda params, x: jnp.stack([jnp.zeros(len(x)), x @ params["w"]], -1), draws)
    ours, theirs = (pd.predict(f, x, 500, seed=0).probs for f in (posterior, gold))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03)


# NUTS over the last layer and over whole networks


def two_weights():
    """A classifier of two weights, whose posterior can be integrated on a grid."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, generator=generator)
    y = (torch.rand(40, generator=generator) < torch.sigmoid(4 * x[:, 0] - 1)).long()
    net = nn.Linear(1, 2, bias=False)
    return pd.defenses.bayesian(net, prior=dist.Normal(0.0, 2.0), num_data=40), (x, y)


def predictive_on_a_grid(x, y):
    """P(class 1 | x) under the exact posterior of two weights with prior N(0, 2)."""
    axis = torch.linspace(-9, 9, 361)
    w = torch.cartesian_prod(axis, axis)
    log_probs = (x[None] * w[:, None, :]).log_softmax(-1)
    log_posterior = log_probs[:, torch.arange(len(y)), y].sum(1) - w.square().sum(1) / 8
    return torch.einsum("k,kb->b", log_posterior.softmax(0), log_probs[..., 1].exp())


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [last_layer_nuts, nuts])
def test_both_samplers_reach_a_posterior_known_on_a_grid(sampler):
    defense, (x, y) = two_weights()
    chains = 1 if sampler is last_layer_nuts else 2
    gold = sampler(defense, (x, y), num_samples=150, num_warmup=100, num_chains=chains)
    found = pd.predict(gold, x, 1500, seed=0).probs[:, 1]
    torch.testing.assert_close(found, predictive_on_a_grid(x, y), rtol=0, atol=0.03)
    point = pd.predict(defense.mean(), x).probs[:, 1]
    assert float((point - predictive_on_a_grid(x, y)).abs().max()) > 0.1, "the test has no power"


def kept_on_noise():
    """A noisy Bayesian network whose last layer was sampled, briefly."""
    defense = pd.defenses.rse(defended("bayesian"), sigma_init=0.2)
    return defense, last_layer_nuts(defense, tiny_batch(50), num_samples=8, num_warmup=8, num_chains=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:R-hat of a log-probability")
def test_the_sampled_last_layer_is_a_defense_like_any_other():
    defense, gold = kept_on_noise()
    (x, y), rows = tiny_batch(), gold.guide.posteriors["weights"].rows
    assert rows.shape == (8, 51) and gold.input_noise == defense.input_noise
    weights = {tuple(gold.draw(x)["weights"].tolist()) for _ in range(60)}
    assert weights <= {tuple(row) for row in rows.tolist()} and len(weights) > 4  # whole rows, never a mix
    mean = defense.guide.posteriors["weights"].loc.detach()
    torch.testing.assert_close(gold.net.get_submodule("1").weight.detach().flatten(), mean[:27])
    frozen = gold.freeze(3)
    assert torch.equal(frozen(x), frozen(x)) and gold(x, 4).shape == (4, 6, 3)
    report = pd.evaluate(gold, (x, y), {"fgsm": pd.attacks.fgsm}, eps=0.1, num_samples=5)
    assert len(report.rows) == 4
    twin = pd.defenses.bayesian(gold, where=lambda name, _: name == "4.weight")
    twin.load_state_dict(twin.state_dict())
    gap = compare_to_gold(defense, gold, (x, y), num_samples=50)
    assert 0 <= gap.total_variation <= 1 and gap.report.defenses == ["defense", "gold"]


def test_the_gap_between_two_predictives_by_hand():
    nets = [nn.Linear(4, 2) for _ in range(2)]
    with torch.no_grad():
        for net, bias in zip(nets, (0.0, math.log(3.0)), strict=True):
            net.weight.zero_()
            net.bias.copy_(torch.tensor([bias, 0.0]))
    gap = compare_to_gold(*map(pd.deterministic, nets), (torch.rand(5, 4), torch.zeros(5).long()))
    assert gap.total_variation == pytest.approx(0.25) and gap.agreement == 1.0
    assert gap.entropy == pytest.approx(math.log(2.0))
    assert gap.gold_entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_what_the_samplers_refuse_and_warn_of():
    defense, (x, y) = two_weights()
    with pytest.raises(ValueError, match="site 'input_noise' is drawn for every example"):
        nuts(pd.defenses.rse(pd.models.small_cnn()), tiny_batch())
    with pytest.raises(ValueError, match="site 'weights' have no prior"):
        nuts(pd.defenses.bayesian(nn.Linear(1, 2), prior=None), (x, y))
    with pytest.raises(ValueError, match=r"expected a network that ends in nn.Linear"):
        last_layer_nuts(pd.deterministic(nn.Sequential(nn.Linear(1, 2), nn.Tanh())), (x, y))
    with pytest.raises(ValueError, match="expected a Normal prior on the last layer, got Laplace"):
        last_layer_nuts(pd.defenses.bayesian(nn.Linear(1, 2), prior=dist.Laplace(0.0, 1.0)), (x, y))
    with pyro.settings.context(module_local_params=True):
        own = pd.Defense(Regression(), FullRank(), example=torch.rand(3, 2))
    with pytest.raises(TypeError, match="got a Defense of your own model and guide"):
        last_layer_nuts(own, regression_data())
    with (
        pytest.warns(UserWarning, match="20 examples of a data set of 40"),
        pytest.warns(UserWarning, match="R-hat"),
    ):
        nuts(defense, (x[:20], y[:20]), num_samples=4, num_warmup=2)
