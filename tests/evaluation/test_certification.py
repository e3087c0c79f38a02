"""Certificates in the world where the radius is known, and what is refused one."""

import copy
import math
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.evaluation.certification import clopper_pearson_low, out_of_reach, running_bounds
from tests.worlds import FAILURE_RATE, LinearWorld, tiny_batch, tiny_net


def exact_share(world, x):
    """Share of the votes for the class that wins infinitely many."""
    return torch.distributions.Normal(0, 1).cdf(world.distance(x) / world.sigma).double()


def test_the_radius_approaches_the_distance_to_the_plane_from_below():
    world = LinearWorld(sigma=0.3)
    x, y = world.points(16)
    found = pd.certify(world.noisy(), x, n0=200, n=6000, alpha=FAILURE_RATE / 16, seed=0)
    held, share = found.label >= 0, exact_share(world, x)
    assert bool((found.label[held] == y[held]).all()) and bool(held[share > 0.6].all())
    assert bool((found.radius <= world.distance(x)).all())
    clear = (share > 0.6) & (share < 0.95)
    assert int(clear.sum()) >= 4
    assert float((world.distance(x) - found.radius)[clear].max()) < 0.06
    assert bool((found.radius[~held] == 0).all()) and found.sigma == pytest.approx(0.3)


def test_a_unanimous_vote_certifies_the_known_radius():
    world = LinearWorld(sigma=0.01)
    x, _ = world.points(40)
    x = x[world.distance(x) > 0.1][:5]
    found = pd.certify(world.noisy(), x, n0=10, n=1000, alpha=0.001, seed=0)
    best = 0.01 * float(torch.special.ndtri(torch.tensor(0.001 ** (1 / 1000), dtype=torch.float64)))
    np.testing.assert_allclose(found.radius, best, rtol=1e-4)
    assert found.num_votes.tolist() == [1000] * 5


def test_certificates_are_false_as_rarely_as_stated():
    """At alpha = 0.3 the share of bounds above the truth is at most 0.3, and not absurdly less."""
    world = LinearWorld(sigma=0.3)
    x = world.points(30)[0]
    one = (exact_share(world, x) - 0.8).abs().argmin()
    x = x[one].expand(1500, -1)
    found = pd.certify(world.noisy(), x, n0=50, n=100, alpha=0.3, seed=0)
    false = float(((found.share > exact_share(world, x)) & (found.label >= 0)).double().mean())
    assert 0.15 < false < 0.3 + 4.3 * (0.21 / 1500) ** 0.5


def test_no_point_inside_the_radius_loses_the_vote():
    world = LinearWorld(sigma=0.3)
    x, _ = world.points(25)
    alpha = 0.01
    found = pd.certify(world.noisy(), x, n0=100, n=2000, alpha=alpha, seed=0)
    held = found.label >= 0
    x, label, radius = x[held], found.label[held], found.radius[held]
    away = torch.where(label == 1, -1.0, 1.0).unsqueeze(1) * world.w / world.w.norm()
    inside = x + 0.999 * radius.unsqueeze(1) * away
    outside = x + (world.distance(x) + 0.05).unsqueeze(1) * away
    for points, lost_most in ((inside, False), (outside, True)):
        with torch.no_grad():
            votes = (world.noisy()(points, 10_000).argmax(-1) == label).double().sum(0)
        against = clopper_pearson_low(10_000 - votes.numpy(), 10_000, alpha)
        lost = float((against > 0.5).mean())
        assert (lost > 0.8) if lost_most else (lost <= alpha)


def test_clopper_pearson_by_hand_and_by_counting():
    assert clopper_pearson_low(np.array([0, 20]), 20, 0.05) == pytest.approx([0.0, 0.05 ** (1 / 20)])
    low = float(clopper_pearson_low(np.array([7]), 10, 0.05)[0])
    tail = sum(math.comb(10, k) * low**k * (1 - low) ** (10 - k) for k in range(7, 11))
    assert tail == pytest.approx(0.05)


def looked_at(count, looks, share, alpha):
    """Whether bounds after every 50 of `looks` x 50 votes ever exclude the share, for `count` races."""
    votes = np.random.default_rng(0).random((count, looks * 50)) < share
    wins = votes.cumsum(1)[:, 49::50].astype(float)
    trials = np.arange(50, 50 * looks + 1, 50.0)
    sequence = np.zeros(count, dtype=bool)
    fixed = np.zeros(count, dtype=bool)
    for look, trial in enumerate(trials):
        low, _ = running_bounds(wins[:, look], np.full(count, trial), alpha)
        sequence |= low > share
        fixed |= clopper_pearson_low(wins[:, look], int(trial), alpha) > share
    return sequence.mean(), fixed.mean()


def test_a_confidence_sequence_may_be_looked_at_and_a_fixed_interval_may_not():
    sequence, fixed = looked_at(2000, 60, 0.8, 0.05)
    assert sequence <= 0.05 + 4.3 * (0.0475 / 2000) ** 0.5
    assert fixed > 0.15, "looking at a fixed interval is what must not be done"


def test_early_exit_only_with_a_target_and_by_the_confidence_sequence():
    world = LinearWorld(sigma=0.3)
    x, _ = world.points(30)
    options = {"n0": 50, "n": 3000, "alpha": 0.01, "seed": 0}
    full = pd.certify(world.noisy(), x, **options)
    early = pd.certify(world.noisy(), x, **options, target_radius=0.05)
    assert bool((full.num_votes == 3000).all())
    assert float(early.num_votes.double().mean()) < 1500 and int(early.num_votes.max()) <= 3000
    reached = early.radius >= 0.05
    assert bool((world.distance(x)[reached] >= 0.05).all()) and int(reached.sum()) > 5
    bound, _ = running_bounds(np.array([90.0]), np.array([100.0]), 0.05)
    assert float(bound[0]) < float(clopper_pearson_low(np.array([90]), 100, 0.05)[0])


def test_everything_random_is_inside_the_vote():
    """Random weights beside input noise: shares are those of the joint draw, so radii shrink."""
    world = LinearWorld(sigma=0.3)
    x, _ = world.points(20)
    joint = pd.defenses.bayesian(world.noisy(), init_scale=0.3)
    alone, both = (pd.certify(d, x, n0=50, n=1000, seed=0) for d in (world.noisy(), joint))
    assert both.sigma == pytest.approx(0.3)
    with torch.no_grad():
        share = (joint(x, 1000).argmax(-1) == both.label.clamp_min(0)).double().mean(0)
    held = both.label >= 0
    assert bool((both.share.double()[held] <= share[held] + 0.06).all())
    assert float(both.radius.mean()) < float(alone.radius.mean())


def test_a_net_that_normalizes_inside_does_not_inflate_the_radius():
    """Pixels are divided by .1 inside: in units of the inner input the noise would look ten times larger."""
    world = LinearWorld(sigma=0.05)
    x, _ = world.points(20)
    inner = nn.Linear(world.dims, 2)
    with torch.no_grad():
        inner.weight.copy_(0.1 * world.net.weight)
        inner.bias.copy_(world.net.bias + 0.5 * world.net.weight.sum(1))
    net = nn.Sequential(pd.nn.Normalize([0.5] * world.dims, [0.1] * world.dims), inner)
    torch.testing.assert_close(net(x), world.net(x), rtol=1e-4, atol=1e-5)
    plain, inside = (
        pd.certify(
            pd.defenses.rse(n, sigma_init=0.05, sigma_inner=0.0, before_linear=True), x, n0=20, n=500, seed=0
        )
        for n in (world.net, net)
    )
    assert inside.sigma == pytest.approx(0.05)
    assert bool((inside.radius <= world.distance(x)).all())
    torch.testing.assert_close(inside.radius, plain.radius, rtol=0.2, atol=0.01)
    behind = pd.deterministic(nn.Sequential(net[0], pd.nn.Noise(0.5), inner))
    with pytest.raises(ValueError, match="no additive noise on its raw pixels"):
        pd.certify(behind, x)


def adaptive():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
    base = pd.defenses.rse(net, before_linear=True)
    return pd.rmc(
        base, tiny_batch(40), attack=partial(pd.attacks.fgsm, eps=0.1), num_neighbors=8, max_epochs=1
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pd.deterministic(tiny_net()), "no additive noise on its raw pixels"),
        (lambda: pd.defenses.bayesian(tiny_net()), "no additive noise on its raw pixels"),
        (lambda: pd.defenses.rse(tiny_net(), init_at="conv"), "no additive noise on its raw pixels"),
        (lambda: pd.defenses.rse(tiny_net(), multiplicative=True), "no additive noise on its raw pixels"),
        (adaptive, "a defense that adapts to its inputs has none"),
        (
            lambda: pd.deterministic(nn.Sequential(pd.nn.Noise(0.2, when="train"), tiny_net())),
            "noise in training only",
        ),
    ],
)
def test_a_defense_without_noise_on_its_pixels_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        pd.certify(make(), tiny_batch()[0])


def test_other_things_are_refused():
    x, _ = tiny_batch()
    defense = pd.defenses.rse(tiny_net())
    with pytest.raises(TypeError, match="expected a Defense, which knows its input noise, got Frozen"):
        pd.certify(defense.freeze(3), x)
    for options, message in (
        ({"n": 0}, "expected n >= 1"),
        ({"n0": 0}, "expected n0 >= 1"),
        ({"alpha": 1.5}, "expected 0 < alpha < 1, got 1.5"),
        ({"target_radius": 0.0}, "expected target_radius > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pd.certify(defense, x, **options)


def test_the_curve_counts_what_is_certified_and_right():
    found = pd.Certificate(
        label=torch.tensor([0, 1, -1, 1]),
        radius=torch.tensor([0.1, 0.3, 0.0, 0.2]),
        share=torch.tensor([0.6, 0.9, 0.4, 0.8]),
        num_votes=torch.tensor([10] * 4),
        sigma=0.25,
        alpha=0.001,
    )
    rows = found.curve(torch.tensor([0, 1, 1, 0]), [0.0, 0.1, 0.2, 0.4])
    assert [row["accuracy"] for row in rows] == [0.5, 0.5, 0.25, 0.0]
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    assert "of the infinite vote, input noise 0.25 px" in found.table(torch.tensor([0, 1, 1, 0]), [0.1])


def unanimous(n, rule="vote", **options):
    """A certificate of a network that always answers 0, with noise of scale 0.25."""
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([60.0, 0.0, 0.0]))
    defense = pd.defenses.rse(net, sigma_init=0.25, before_linear=True)
    return pd.certify(defense, torch.rand(3, 4), n0=5, n=n, rule=rule, seed=0, **options)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("radius", [0.125, 0.25, 0.6])
def test_a_radius_that_no_image_could_pass_says_how_many_votes_it_needs(radius, alpha):
    """By hand: n votes that agree bound the share by alpha^(1/n), and Phi(R / sigma) must be below it."""
    share = NormalDist().cdf(radius / 0.25)
    needed = math.ceil(math.log(alpha) / math.log(share))
    y = torch.zeros(3).long()
    (short,) = unanimous(needed - 1, alpha=alpha).curve(y, [radius])
    assert (short["accuracy"], short["needed"], short["num_votes"]) == (0.0, needed, needed - 1)
    assert short["largest"] == pytest.approx(0.25 * NormalDist().inv_cdf(alpha ** (1 / (needed - 1))))
    (enough,) = unanimous(needed, alpha=alpha).curve(y, [radius])
    assert enough["accuracy"] == 1.0 and enough.keys() == {"eps", "accuracy", "low", "high"}


def test_the_largest_radius_is_that_of_draws_that_agree():
    for rule in ("vote", "mean_prob"):
        found, y = unanimous(200, rule), torch.zeros(3).long()
        assert found.largest == pytest.approx(float(found.radius[0]), rel=1e-6)
        rows = found.curve(y, [0.0, found.largest / 2, 0.7, 0.9])
        assert ["largest" in row for row in rows] == [False, False, True, True]
        assert (rows[2]["needed"] is None) == (rule == "mean_prob")
        said = found.table(y, [0.0, 0.7, 0.9])
        assert "200 draws that all agree" in said and said.endswith("; nor a larger one")
    assert out_of_reach(found.curve(y, [0.0])) == "" and "agree" not in found.table(y, [0.0])


def test_a_seed_fixes_the_certificate_and_nothing_else_moves():
    defense, (x, _) = pd.defenses.rse(tiny_net()), tiny_batch()
    state = torch.get_rng_state()
    first, second = (pd.certify(defense, x, n0=10, n=50, seed=4) for _ in range(2))
    assert torch.equal(first.share, second.share) and torch.equal(state, torch.get_rng_state())


EFFECTIVE = [
    ({"sigma_init": 0.25, "family": torch.distributions.Normal(0.0, 0.1)}, 0.025),
    ({"sigma_init": 0.25, "family": torch.distributions.Normal(0.0, 2.0)}, 0.5),
    ({"sigma_init": 0.25, "family": torch.distributions.Normal(0.0, 0.1), "scale": "learned"}, 0.025),
    ({"sigma_init": 0.25, "family": torch.distributions.Normal(0.0, 0.1), "scale": "variational"}, 0.025),
    ({"sigma_init": 0.25}, 0.25),
]


@pytest.mark.parametrize("options, sigma", EFFECTIVE)
def test_the_noise_that_is_certified_is_the_noise_that_acts(options, sigma):
    world = LinearWorld()
    x, _ = world.points(20)
    defense = pd.defenses.rse(world.net, before_linear=True, num_data=20, **options)
    with torch.no_grad():
        acts = defense(x, 4000) - world.net(x)
    measured = float(acts.diff(dim=-1).std() / world.w.norm())
    assert measured == pytest.approx(sigma, rel=0.02)
    assert defense.input_noise[0] == "normal" and float(defense.input_noise[1]) == pytest.approx(sigma)
    found = pd.certify(defense, x, n0=50, n=500, alpha=1e-4, seed=0)
    assert found.sigma == pytest.approx(sigma)
    assert bool((found.radius <= world.distance(x)).all())
    assert f"{sigma:.3g}" in repr(defense).splitlines()[-1].split()[-1]


@pytest.mark.parametrize(
    "family",
    [
        torch.distributions.Normal(0.5, 1.0),
        torch.distributions.Laplace(0.1, 1.0),
        torch.distributions.Uniform(-0.5, 1.0),
        torch.distributions.StudentT(3.0),
    ],
)
def test_noise_that_is_not_centered_or_of_another_family_has_no_certificate(family):
    defense = pd.defenses.rse(LinearWorld().net, before_linear=True, family=family)
    assert defense.stochastic and defense.input_noise is None
    with pytest.raises(ValueError, match="no certificate"):
        pd.certify(defense, LinearWorld().points(2)[0], n0=2, n=10)


def test_a_certificate_is_the_same_for_any_form_of_data_and_any_restart(tmp_path):
    world = LinearWorld(sigma=0.3)
    x, y = world.points(23)
    options = {"n0": 20, "n": 100, "seed": 3, "chunk_size": 8}
    forms = (x, (x, y), TensorDataset(x, y), DataLoader(TensorDataset(x, y), 5))
    found = [pd.certify(world.noisy(), data, **options) for data in forms]
    journaled = [pd.certify(world.noisy(), x, journal=tmp_path, **options) for _ in range(2)]
    for other in [*found[1:], *journaled]:
        for name in ("label", "radius", "share", "num_votes"):
            assert torch.equal(getattr(other, name), getattr(found[0], name)), name
    with pytest.raises(ValueError, match="seed, chunk_size differ"):
        pd.certify(world.noisy(), x, journal=tmp_path, **options | {"seed": 4, "chunk_size": 9})
    with pytest.raises(ValueError, match="expected seed= beside journal="):
        pd.certify(world.noisy(), x, journal=tmp_path)


def test_a_hook_of_somebody_else_ends_the_certificate():
    """A pre-hook that normalizes would make the noise smaller than it says; a hook may hand on the raw input."""
    world = LinearWorld()
    x, _ = world.points(3)
    net = torch.nn.Sequential(copy.deepcopy(world.net))
    net.register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) / 0.1,))
    before = pd.defenses.rse(net, before_linear=True, sigma_init=0.25, example=x)
    by_hand = pd.deterministic(torch.nn.Sequential(pd.nn.Noise(0.3), world.net))
    by_hand.net.register_forward_pre_hook(lambda module, args: (args[0] * 10,))
    layer = pd.nn.Noise(0.3)
    layer.register_forward_hook(lambda module, args, output: args[0])
    skipping = pd.deterministic(torch.nn.Sequential(layer, world.net))
    for defense in (before, by_hand, skipping):
        assert defense.input_noise is None
        with pytest.raises(ValueError, match="no certificate"):
            pd.certify(defense, x, n0=2, n=10)
