"""Certificates of other noises, norms and rules: exact on the line, never violated, refused where unsound."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.evaluation.ballots import clopper_pearson_low, mean_low
from probdefense.evaluation.intervals import resampled_interval, wilson
from probdefense.evaluation.radii import SHAPES, certified_radius, enough, shrinking
from probdefense.ops import lp_norm, rounded_down
from tests.worlds import FAILURE_RATE, LinearWorld, tiny_batch, tiny_net

FAMILIES = {"normal": None, "laplace": dist.Laplace(0.0, 1.0), "uniform": dist.Uniform(-1.0, 1.0)}


def noisy(net, family, sigma=0.25):
    return pd.defenses.rse(net, before_linear=True, sigma_init=sigma, family=FAMILIES[family])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_line_the_radius_of_the_true_share_is_the_distance(family):
    """One pixel, a threshold: the share is the distribution function of the noise at the distance."""
    noise = {"normal": dist.Normal(0.0, 0.3), "laplace": dist.Laplace(0.0, 0.3)}.get(
        family, dist.Uniform(-0.3, 0.3)
    )
    distance = double(0.01, 0.1, 0.29)
    radius = certified_radius(noise.cdf(distance.float()).double(), family, 0.3)
    torch.testing.assert_close(radius, distance, atol=1e-6, rtol=1e-5)
    for r in distance.tolist():
        assert float(certified_radius(double(enough(r, family, 0.3)), family, 0.3)) >= r
        assert float(certified_radius(double(enough(r, family, 0.3) - 1e-6), family, 0.3)) < r


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_line_radii_approach_the_distance_from_below(family):
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0], [1.0]]))
        net.bias.copy_(torch.tensor([0.0, -0.5]))
    x = torch.linspace(0.32, 0.68, 13).unsqueeze(1)
    found = pd.certify(noisy(net, family), x, n0=100, n=20_000, alpha=FAILURE_RATE / 13, seed=0)
    distance, held = (x - 0.5).abs().squeeze(1), found.label >= 0
    assert found.norm == SHAPES[family].norm and found.family == family and found.sigma == 0.25
    assert bool((found.radius <= distance).all()) and int(held.sum()) >= 10
    assert float((distance - found.radius).max()) < 0.03


def test_balls_of_other_norms_lie_within_the_certified_one():
    for family, own in (("normal", 2), ("laplace", 1), ("uniform", 1)):
        for norm in (1, 2, math.inf):
            factor = shrinking(family, norm, 16)
            corner = {1: torch.eye(16)[0], 2: torch.full((16,), 0.25), math.inf: torch.ones(16)}[norm]
            assert float(lp_norm((factor * corner)[None], own)[0]) <= 1 + 1e-6
            assert factor == pytest.approx(
                {(2, 1): 1, (2, 2): 1, (2, math.inf): 1 / 4}.get((own, norm), factor)
            )
    assert shrinking("laplace", math.inf, 16) == pytest.approx(1 / 16)
    world = LinearWorld(sigma=0.3)
    x, y = world.points(6)
    of = {n: pd.certify(world.noisy(), x, n0=20, n=500, seed=0, norm=n) for n in (1, 2, math.inf)}
    torch.testing.assert_close(of[1].radius, of[2].radius)
    torch.testing.assert_close(of[math.inf].radius, of[2].radius / 6**0.5)
    assert "l-inf radii (the l2 radius over a power" in of[math.inf].table(y, [0.1])
    assert "l1 radii;" not in of[1].table(y, [0.1]) and "normal noise, l1 radii" in of[1].table(y, [0.1])
    with pytest.raises(ValueError, match="expected norm 1, 2 or math.inf"):
        pd.certify(world.noisy(), x, norm=3)


def soft_net():
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator))
    return net


def attacked(defense, x, label, radius, norm, rule, steps=8):
    """Points in the certified balls where the share of the label is low, by gradients of many draws."""
    point, like = x.clone(), radius.unsqueeze(1)
    for step in range(steps):
        point.requires_grad_()
        scores = defense(point, 32).softmax(-1).mean(0).gather(1, label.unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(scores, point)
        if norm == 1:
            move = -gradient.sign() * (gradient.abs() == gradient.abs().amax(1, keepdim=True))
        else:
            move = -gradient.sign() if norm == math.inf else -gradient / gradient.norm(dim=1, keepdim=True)
        delta = point.detach() + like * move * (1.5 / (step + 1)) - x
        point = (
            x + delta * (like / lp_norm(delta, norm).unsqueeze(1).clamp_min(1e-12)).clamp_max(1.0) * 0.9999
        )
    return point.detach()


KINDS = [("normal", 2, "vote"), ("normal", 1, "vote"), ("normal", math.inf, "vote"), ("laplace", 1, "vote")]
KINDS += [
    ("laplace", math.inf, "vote"),
    ("laplace", 2, "vote"),
    ("uniform", 1, "vote"),
    ("uniform", 2, "vote"),
    ("uniform", math.inf, "vote"),
    ("normal", 2, "mean_prob"),
    ("uniform", 1, "mean_prob"),
]


@pytest.mark.parametrize(("family", "norm", "rule"), KINDS)
def test_no_attacked_image_within_its_radius_changes(family, norm, rule):
    defense = pd.defenses.bayesian(noisy(soft_net(), family, 0.2), init_scale=0.05, num_data=10)
    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(1))
    options = {"n0": 50, "n": 1000, "alpha": FAILURE_RATE / 200, "seed": 0}
    found = pd.certify(defense, x, norm=norm, rule=rule, **options)
    held = found.label >= 0
    assert int(held.sum()) > 100 and float(found.radius[held].mean()) > 0.02
    label = found.label[held]
    point = attacked(defense, x[held], label, found.radius[held], norm, rule)
    assert bool((lp_norm(point - x[held], norm) <= found.radius[held]).all())
    with torch.no_grad():
        logits = defense(point, 400)
    if rule == "vote":
        against = clopper_pearson_low((logits.argmax(-1) != label).sum(0).numpy(), 400, FAILURE_RATE / 200)
    else:
        probs = logits.double().softmax(-1)[:, torch.arange(len(label)), label]
        against = mean_low(1 - probs.numpy(), FAILURE_RATE / 200)
    assert not (against > 0.5).any()


def test_points_outside_the_radius_do_change():
    """The attack of the test above has power: at four times the radius many votes are lost."""
    defense = noisy(soft_net(), "normal", 0.1)
    x = torch.rand(100, 4, generator=torch.Generator().manual_seed(1))
    found = pd.certify(defense, x, n0=50, n=1000, seed=0)
    held = found.label >= 0
    point = attacked(defense, x[held], found.label[held], 4 * found.radius[held], 2, "vote")
    with torch.no_grad():
        lost = (defense(point, 400).argmax(-1) != found.label[held]).double().mean(0) > 0.5
    assert float(lost.double().mean()) > 0.2


def test_the_smallest_scale_counts():
    noise = pd.nn.Noise(0.3, shape=(1, 6, 6), family=dist.Laplace(0.0, 0.5))
    with torch.no_grad():
        noise.fixed_scale[0, 2, 3] = 0.1
    defense = pd.deterministic(nn.Sequential(noise, tiny_net()))
    family, scale = defense.input_noise
    assert family == "laplace" and scale.shape == (1, 6, 6)
    assert pd.certify(defense, tiny_batch()[0], n0=2, n=10, seed=0).sigma == pytest.approx(0.05)


def test_scales_are_rounded_down():
    values = torch.rand(1000, dtype=torch.float64)
    down = rounded_down(values, torch.float32)
    assert bool((down.double() <= values).all()) and bool((values - down.double() < 1e-7).all())
    assert bool((values.float().double() > values).any()), "plain rounding goes up for some"
    found = pd.certify(LinearWorld(sigma=0.3).noisy(), LinearWorld().points(50)[0], n0=10, n=200, seed=0)
    exact = 0.3 * torch.special.ndtri(found.share.double().clamp_min(0.5))
    assert bool((found.radius.double() <= exact + 2e-8 * 3).all())


class Tied(nn.Module):
    """Two classes that always share the largest logit."""

    def forward(self, x):
        return torch.stack([x.sum(1), x.sum(1), x.sum(1) - 1], 1)


def test_ties_are_votes_for_nobody():
    defense = pd.defenses.rse(nn.Sequential(nn.Linear(4, 4), Tied()), before_linear=True)
    found = pd.certify(defense, torch.rand(5, 4), n0=10, n=100, seed=0)
    assert bool((found.label == -1).all()) and float(found.share.max()) == 0.0


def random_scale():
    defense = pd.defenses.rse(tiny_net(), scale="learned", num_data=9)
    return pd.defenses.bayesian(defense, where=lambda name, _: name.endswith("log_scale"), num_data=9)


class Doubled(pd.nn.Noise):
    """A layer of one's own, whose noise depends on the input."""

    def forward(self, x):
        return x + (1 + x.mean()) * self.eps(x)


@pytest.mark.parametrize(
    "make",
    [
        random_scale,
        lambda: pd.deterministic(nn.Sequential(Doubled(0.2), tiny_net())),
        lambda: pd.deterministic(nn.Sequential(pd.nn.Normalize([0.5], [0.5]), pd.nn.Noise(0.2), tiny_net())),
        lambda: pd.deterministic(nn.Sequential(pd.nn.Noise(0.2, family=dist.StudentT(3.0)), tiny_net())),
    ],
    ids=["random scale", "input-dependent", "a transform before", "another family"],
)
def test_noise_that_is_not_fixed_independent_and_first_is_refused(make):
    defense = make()
    assert defense.input_noise is None and "Defense of" in repr(defense)
    with pytest.raises(ValueError, match="no certificate: .* random or depends on the input"):
        pd.certify(defense, tiny_batch()[0], n0=2, n=10)


def test_correlated_noise_of_another_family_has_no_certificate():
    layer = pd.nn.CorrelatedNoise(0.2, 1, axis=1, family=dist.Laplace(0.0, 1.0))
    assert pd.deterministic(nn.Sequential(layer, tiny_net())).input_noise is None


def test_rounds_through_members_are_refused_where_votes_must_be_independent():
    defense = pd.defenses.rse(pd.defenses.ensemble([tiny_net(), tiny_net()]))
    x, _ = tiny_batch()
    assert pd.certify(defense, x, n0=4, n=20, seed=0).num_votes.tolist() == [20] * 6
    for options in ({"target_radius": 0.1}, {"rule": "mean_prob"}):
        with pytest.raises(ValueError, match="in rounds through its members"):
            pd.certify(defense, x, n0=4, n=20, **options)


def test_antithetic_votes_and_adaptive_defenses_are_refused():
    defense, (x, _) = pd.defenses.rse(tiny_net()), tiny_batch()
    paired = defense.samples(4, draws="antithetic")
    for function in (paired, pd.logits.adapters.Samples(paired, 2)):
        with pytest.raises(ValueError, match="antithetic pairs"):
            pd.certify(function, x, n0=2, n=10)
    assert pd.certify(defense.samples(4), x, n0=2, n=10, seed=0).num_votes.tolist() == [10] * 6
    defense.respond = lambda x, seed: defense(x)
    with pytest.raises(ValueError, match="a defense that adapts to its inputs has none"):
        pd.certify(defense, x, n0=2, n=10)


@pytest.mark.parametrize("rule", ["single_draw", pd.rules.single_draw, "loudest"])
def test_other_rules_have_no_certificate(rule):
    with pytest.raises(ValueError, match=r"expected rule|expected one of|rule"):
        pd.certify(pd.defenses.rse(tiny_net()), tiny_batch()[0], rule=rule, n0=2, n=10)


# The mean probability


@pytest.mark.parametrize("a, b", [(8.0, 2.0), (0.3, 0.1), (2.0, 2.0)])
def test_bets_bound_the_mean_as_rarely_wrongly_as_stated(a, b):
    values = np.random.default_rng(0).beta(a, b, (300, 1500))
    low, mean = mean_low(values, 0.1), a / (a + b)
    assert (low > mean).mean() < 0.1 + 4.3 * (0.09 / 1500) ** 0.5
    assert np.median(mean - low) < 3 * math.sqrt(a * b / (a + b) ** 2 / (a + b + 1) / 300)


def test_bets_beat_hoeffding_and_come_near_clopper_pearson():
    values = (np.random.default_rng(0).random((2000, 20)) < 0.97).astype(np.float32)
    low, exact = mean_low(values, 0.001), clopper_pearson_low(values.sum(0), 2000, 0.001)
    hoeffding = values.mean(0) - math.sqrt(math.log(1000) / 4000)
    assert (low > hoeffding + 0.02).all() and (low < exact + 0.005).all()
    assert mean_low(np.ones((1000, 1)), 0.001)[0] == pytest.approx(1 - math.log(1000) / 750, abs=2e-3)
    assert mean_low(np.zeros((1000, 1)), 0.001)[0] == 0.0


def test_the_mean_probability_is_certified_and_not_the_vote():
    """Every draw prefers class 0 by a little, so the vote is unanimous and the mean is .55."""
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([math.log(0.55 / 0.45), 0.0]))
    defense, x = noisy(net, "normal"), torch.rand(3, 4)
    votes = pd.certify(defense, x, n0=10, n=1000, seed=0)
    means = pd.certify(defense, x, n0=10, n=1000, seed=0, rule=pd.rules.mean_prob)
    assert (votes.rule, means.rule) == ("vote", "mean_prob")
    assert float(votes.share.min()) > 0.99 and float(means.share.max()) <= 0.55
    torch.testing.assert_close(means.observed, torch.full((3,), 0.55), atol=1e-5, rtol=0)
    assert bool((means.radius < votes.radius).all()) and bool((means.label == 0).all())
    assert "the mean probability of infinitely many draws" in means.table(torch.zeros(3).long(), [0.1])


# Intervals over images that share draws, and shares


def test_quantiles_of_the_shares_stand_beside_the_curve():
    world = LinearWorld(sigma=0.3)
    x, y = world.points(40)
    found = pd.certify(world.noisy(), x, n0=20, n=400, seed=0)
    rows = found.shares([0.0, 0.5, 1.0])
    assert [row["images"] for row in rows] == [0.0, 0.5, 1.0]
    assert rows[1]["observed"] == pytest.approx(float(found.observed.double().quantile(0.5)))
    assert all(row["low"] <= row["observed"] for row in rows)
    assert "share p_A of the votes by quantile of images: 5% " in found.table(y, [0.1])


def test_only_images_that_share_draws_have_shifts():
    x, _ = tiny_batch()
    own, shared = (pd.certify(d, x, n0=4, n=40, seed=0) for d in (pd.defenses.rse(tiny_net()), joint()))
    assert own.shifts is None and shared.shifts.shape == (6, 10)
    raced = pd.certify(joint(), x, n0=4, n=400, target_radius=0.02, seed=0)
    assert raced.shifts.shape == (6, 10)


def joint():
    return pd.defenses.bayesian(pd.defenses.rse(tiny_net()), num_data=10)


def certified_once(generator, images, draws, together):
    """Whether each image is certified in a run whose votes have a part that all images share."""
    ease = generator.normal(0.6, 0.6, images)
    common = together * generator.normal(size=(draws, 1))
    own = generator.normal(size=(draws, images))
    wins = ease + common + own > 0
    needed = 0.75
    low = clopper_pearson_low(wins.sum(0), draws, 0.01)
    rest = [(wins.sum(0) - wins[b::10].sum(0)) / (draws - len(wins[b::10])) for b in range(10)]
    without = np.stack(rest) - wins.mean(0)
    return low >= needed, low + without >= needed


def test_intervals_over_images_that_share_draws_cover():
    generator = np.random.default_rng(0)
    runs = [certified_once(generator, 400, 300, together=1.5) for _ in range(400)]
    truth = np.mean([right.mean() for right, _ in runs])
    covered = {"shared": 0, "images": 0}
    for right, without in runs:
        low, high = resampled_interval(right, without)
        covered["shared"] += low <= truth <= high
        low, high = wilson(right.sum(), len(right))
        covered["images"] += low <= truth <= high
    assert covered["shared"] / 400 > 0.90, covered
    assert covered["images"] / 400 < 0.82, covered


def test_intervals_over_images_with_draws_of_their_own_stay_as_they_are():
    generator = np.random.default_rng(1)
    runs = [certified_once(generator, 150, 60, together=0.0) for _ in range(600)]
    truth = np.mean([right.mean() for right, _ in runs])
    found = [(resampled_interval(*run), wilson(run[0].sum(), 150)) for run in runs]
    assert np.mean([low <= truth <= high for (low, high), _ in found]) > 0.92
    assert np.mean([(b - a) / (d - c) for (a, b), (c, d) in found]) < 1.25
