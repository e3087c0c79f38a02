"""What noise is paid for, and that it collapses without pay."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.objectives import alignment, elbo, entropy, harmonic, rewarded, root_scale
from probdefense.training.counters import counters
from tests.worlds import LinearWorld, tiny_batch, tiny_net

UNIT = 0.5 * math.log(2 * math.pi * math.e)


def linear(width=2, outputs=3):
    torch.manual_seed(0)
    return nn.Linear(width, outputs)


def with_factor(defense, seed=1):
    (layer,) = (m for m in defense.net.modules() if isinstance(m, pd.nn.CorrelatedNoise))
    with torch.no_grad():
        layer.factor.copy_(torch.randn(layer.factor.shape, generator=torch.Generator().manual_seed(seed)))
    return defense, layer


@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_the_entropy_of_correlated_noise_is_that_of_the_normal(covariance):
    built = pd.defenses.rse(linear(4), before_linear=True, scale="learned", covariance=covariance)
    defense, layer = with_factor(built)
    normal = dist.MultivariateNormal(torch.zeros(4), layer.covariance)
    torch.testing.assert_close(entropy(defense), normal.entropy())


def test_the_entropy_counts_every_trained_scale_once():
    learned = pd.defenses.rse(tiny_net(), scale="learned", scale_shape="channel", sigma_init=0.5)
    expected = (math.log(0.5) + UNIT) + 3 * (math.log(0.1) + UNIT)
    assert entropy(learned).item() == pytest.approx(expected, rel=1e-5)
    assert root_scale(learned).item() == pytest.approx(math.sqrt(0.5) + 3 * math.sqrt(0.1), rel=1e-5)
    variational = pd.defenses.rse(tiny_net(), scale="variational", num_data=9, sigma_init=0.5)
    assert entropy(variational).item() == pytest.approx(math.log(0.5) + math.log(0.1) + 2 * UNIT, rel=1e-5)
    weights = pd.defenses.pni(tiny_net(), alpha_init=0.5)
    assert entropy(weights).item() == pytest.approx(3 * (math.log(0.5) + UNIT), rel=1e-5)
    changes = [pd.nn.transforms.Shift(0.25, learned=True), pd.nn.transforms.Color(0.5)]
    transforms = pd.defenses.random_transforms(tiny_net(), changes)
    assert entropy(transforms).item() == pytest.approx(math.log(2 * 0.25), rel=1e-5)
    laplace = pd.defenses.rse(linear(), before_linear=True, scale="learned", family=dist.Laplace(0.0, 1.0))
    assert entropy(laplace).item() == pytest.approx(math.log(0.2) + 1 + math.log(2), rel=1e-5)


def test_the_entropy_of_conditional_noise_is_the_mean_over_the_batch():
    torch.manual_seed(2)
    defense, x = pd.defenses.conditional_noise(linear()), torch.rand(5, 2)
    scale = defense.net.noise.moments(x)[1]
    torch.testing.assert_close(entropy(defense, x), (scale.log() + UNIT).sum(1).mean())
    assert not torch.equal(scale[0], scale[1])
    random = pd.defenses.bayesian(defense, where=lambda *_: True, init_scale=1e-6, num_data=9)
    torch.testing.assert_close(entropy(random, x), entropy(defense, x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="depends on its input"):
        entropy(defense)


def test_alignment_is_the_log_variance_of_the_outputs():
    defense, layer = with_factor(pd.defenses.wca(linear()))
    weight = defense.net.weight
    variance = torch.stack([w @ layer.covariance @ w for w in weight])
    torch.testing.assert_close(alignment(defense), variance.log().sum())
    samples = defense.samples(40_000)(torch.zeros(1, 2))[:, 0].detach()
    torch.testing.assert_close(samples.var(0), variance.detach(), rtol=0.1, atol=0.0)
    diagonal = pd.defenses.rse(linear(), before_linear=True, scale="learned", sigma_init=0.5)
    torch.testing.assert_close(alignment(diagonal), (0.25 * diagonal.net.weight.square().sum(1)).log().sum())
    random = pd.defenses.bayesian(defense, num_data=9)
    torch.testing.assert_close(alignment(random), alignment(defense))


def test_nothing_to_reward_is_refused():
    for defense in (
        pd.deterministic(tiny_net()),
        pd.defenses.rse(tiny_net()),
        pd.defenses.bayesian(tiny_net()),
    ):
        with pytest.raises(ValueError, match="none to reward"):
            entropy(defense)
    with pytest.raises(ValueError, match="before a linear layer"):
        alignment(pd.defenses.rse(tiny_net(), scale="learned"))


def test_the_harmonic_weight_counts_steps_and_checkpoints_hold_the_count():
    falling = harmonic(2.0, num_steps=3)
    expected = [2.0] * 3 + [2 / 1.5] * 3 + [2 / (1 + 1 / 2 + 1 / 3)]
    assert [falling(step) for step in range(7)] == pytest.approx(expected)
    defense, (x, y) = pd.deterministic(tiny_net()), tiny_batch()
    objective = rewarded(lambda *_: torch.zeros(()), falling, reward=lambda defense, x: torch.ones(()))
    assert [float(objective(defense, x, y)) for _ in range(7)] == pytest.approx([-w for w in expected])
    (counter,) = counters(objective)
    assert counter.state_dict() == {"steps": 7}
    counter.load_state_dict({"steps": 0})
    assert float(objective(defense, x, y)) == -2.0


def trained_scale(objective, builder):
    """The entropy per feature of noise that starts at .1, after a short clean training."""
    world = LinearWorld(slope=8.0)
    x, y = world.points(50)
    torch.manual_seed(0)
    defense = builder(world.net)
    optimizer = torch.optim.Adam([p for n, p in defense.named_parameters() if "noise" in n], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        objective(defense, x, y).backward()
        optimizer.step()
    return entropy(defense, x).item() / world.dims


@pytest.mark.parametrize(
    "builder",
    [
        lambda net: pd.defenses.rse(
            net, before_linear=True, scale="learned", scale_shape="channel", sigma_init=0.1
        ),
        pd.defenses.wca,
        pd.defenses.conditional_noise,
    ],
)
def test_scales_collapse_without_a_reward_and_stay_with_one(builder):
    start = math.log(0.1) + UNIT
    alone = trained_scale(elbo, builder)
    paid = trained_scale(rewarded(elbo, 0.2), builder)
    assert alone < start - 0.2, "clean training takes the noise away"
    assert paid > start, "what is paid for stays"


@pytest.mark.parametrize("family", [dist.Normal(0.0, 2.0), dist.Laplace(0.0, 2.0)], ids=["normal", "laplace"])
@pytest.mark.parametrize("scale", ["learned", "variational"])
def test_entropy_is_that_of_the_noise_whatever_the_scale_of_the_family(family, scale):
    options = {"before_linear": True, "scale": scale, "sigma_init": 0.3, "family": family}
    defense = pd.defenses.rse(linear(), num_data=10, **options)
    assert entropy(defense).item() == pytest.approx(type(family)(0.0, 0.6).entropy().item(), abs=1e-6)


@pytest.mark.parametrize("covariance", [None, "full"])
def test_alignment_counts_the_variance_of_the_family(covariance):
    net, options = linear(), {"before_linear": True, "scale": "learned", "sigma_init": 0.3}
    defense = pd.defenses.rse(net, family=dist.Laplace(0.0, 2.0), covariance=covariance, **options)
    variances = (net.weight * 0.3).square().sum(1) * 8
    torch.testing.assert_close(alignment(defense), variances.log().sum())


@pytest.mark.parametrize("reward", [alignment, entropy, root_scale])
def test_conditional_noise_of_an_ensemble_counts_in_every_member(reward):
    nets, x = [linear() for _ in range(3)], torch.rand(4, 2)
    several = pd.defenses.conditional_noise(pd.defenses.ensemble(nets))
    one = pd.defenses.conditional_noise(nets[0])
    torch.testing.assert_close(reward(several, x), 3 * reward(one, x))
