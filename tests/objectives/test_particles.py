"""Particles: the Stein direction by hand and on a known target, and the information gain."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.objectives import elbo, information_gain, stein_direction, svgd
from probdefense.objectives.information import mutual_information
from tests.worlds import tiny_batch, tiny_net


class Point(nn.Module):
    """A network that is a point of the plane: its logits are the point."""

    def __init__(self, at):
        super().__init__()
        self.at = nn.Parameter(torch.as_tensor(at).float())

    def forward(self, x):
        return self.at.expand(len(x), 2)


MEAN, ROOT = torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])


def target(defense, x, y):
    """Minus the log-density of N(MEAN, ROOT ROOT^T), the mean over members, as an objective with num_data 1."""
    points = torch.stack([member.at for member in defense.net.members])
    white = torch.linalg.solve_triangular(ROOT, (points - MEAN).T, upper=False)
    return white.square().sum() / (2 * len(points))


def plane(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Point(torch.randn(2, generator=generator)) for _ in range(count)]


DATA = torch.zeros(1, 1), torch.zeros(1).long()


def test_the_direction_by_hand():
    """Two particles, both scores 1: half the kernel's mean of scores, and the push apart."""
    theta, score = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    k = math.exp(-1 / 2)
    found = stein_direction(theta, score, bandwidth=2.0)
    wanted = torch.tensor([[-k, 1 + 2 * k], [k, k + 2]]) / 2
    torch.testing.assert_close(found, wanted)
    median = stein_direction(theta, score)  # one distance, 1: h = 1 / log 2, so k = 1 / 2
    torch.testing.assert_close(median[0, 0], torch.tensor(-0.5 * 2 * math.log(2) / 2))


def test_the_direction_is_the_formula_with_derivatives_of_the_kernel(float64):
    theta = torch.randn(5, 3).double()
    score, h = torch.randn(5, 3).double(), 1.7
    wanted = torch.zeros(5, 3).double()
    for i in range(5):
        for j in range(5):
            at = theta[j].clone().requires_grad_()
            kernel = torch.exp(-(at - theta[i]).square().sum() / h)
            wanted[i] += (kernel.detach() * score[j] + torch.autograd.grad(kernel, at)[0]) / 5
    torch.testing.assert_close(stein_direction(theta, score, h), wanted)


@pytest.mark.slow
def test_particles_reach_the_mean_and_the_covariance_of_a_normal():
    defense = pd.defenses.particles(plane(60), num_data=1)
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.05)
    objective = svgd(target, prior_scale=None)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 800)
        optimizer.zero_grad()
        objective(defense, *DATA).backward()
        optimizer.step()
    points = torch.stack([member.at.detach() for member in defense.net.members])
    torch.testing.assert_close(points.mean(0), MEAN, atol=0.05, rtol=0)
    torch.testing.assert_close(points.T.cov(correction=0), ROOT @ ROOT.T, atol=0.2, rtol=0)


def test_without_the_repulsion_they_collapse():
    """An ensemble on the same target ends at its mode: what makes particles a posterior is the direction."""
    defense = pd.defenses.particles(plane(10), num_data=1)
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        target(defense, *DATA).backward()
        optimizer.step()
    points = torch.stack([member.at.detach() for member in defense.net.members])
    assert float(points.std(0).max()) < 0.02


def test_particles_that_start_together_would_stay_so_and_are_refused():
    with pytest.raises(ValueError, match="two networks with the same"):
        pd.defenses.particles([Point([0.0, 1.0]), Point([0.0, 1.0])])
    with pytest.raises(ValueError, match="of one architecture"):
        pd.defenses.particles([nn.Linear(2, 3), nn.Linear(2, 4)])


def test_the_value_is_the_joint_and_the_gradient_the_direction(float64):
    nets = [nn.Linear(4, 3).double() for _ in range(3)]
    defense = pd.defenses.particles(nets, num_data=20)
    x, y = torch.rand(6, 4).double(), torch.randint(3, (6,))
    loss = svgd(prior_scale=2.0)(defense, x, y)
    losses = [nn.functional.cross_entropy(net(x), y) for net in nets]
    flat = torch.stack([torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets])
    prior = flat.square().sum(1).mean() / (2 * 4 * 20)
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean().detach() + prior)
    loss.backward()
    scores = []
    for net, each, theta in zip(nets, losses, flat, strict=True):
        slopes = torch.autograd.grad(each, list(net.parameters()))
        scores.append(-20 * torch.cat([s.flatten() for s in slopes]) - theta / 4)
    wanted = -stein_direction(flat, torch.stack(scores)) / 20
    members = defense.net.members
    found = torch.stack([torch.cat([p.grad.flatten() for p in net.parameters()]) for net in members])
    torch.testing.assert_close(found, wanted)


def test_one_particle_finds_the_map(float64):
    net = nn.Linear(4, 3).double()
    defense, (x, y) = pd.deterministic(net, num_data=6), (torch.rand(6, 4).double(), torch.randint(3, (6,)))
    svgd(prior_scale=0.5)(defense, x, y).backward()
    found = net.weight.grad.clone()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), net.weight)
    torch.testing.assert_close(found, slope + net.weight.detach() / (0.25 * 6))


def test_svgd_needs_the_size_of_the_data():
    with pytest.raises(ValueError, match="expected num_data, got none"):
        svgd()(pd.defenses.particles(plane(2)), *DATA)


def test_the_information_of_draws_by_hand():
    logits = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]]).log()
    found = mutual_information(logits)
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(2)]))


def test_information_gain_is_the_gap_at_attacked_inputs():
    nets, (x, y) = [tiny_net().eval() for _ in range(3)], tiny_batch()
    defense = pd.defenses.particles(nets, num_data=6).eval()

    def brighter(logits_fn, x, y):
        assert logits_fn(x).shape[0] == 3
        return (x + 0.2).clamp(0, 1)

    def information(points):
        with torch.no_grad():
            probs = torch.stack([net(points).softmax(-1) for net in nets]).double()
        mixed = probs.mean(0)
        return -(mixed * mixed.log()).sum(-1) + (probs * probs.log()).sum(-1).mean(0)

    loss = information_gain(elbo, brighter, weight=3.0)(defense, x, y).detach()
    x_adv = brighter(defense.samples(3), x, y)
    gap = (information(x_adv) - information(x)).abs().mean()
    plain = elbo(defense, x_adv, y).detach()
    assert float(loss) == pytest.approx(float(plain) + 3.0 * float(gap), rel=1e-4)
    assert float(gap) > 1e-4


def test_a_recipe_of_both_trains_every_particle():
    defense, (x, y) = pd.defenses.particles([tiny_net() for _ in range(3)], num_data=6), tiny_batch()
    before = {name: value.detach().clone() for name, value in defense.named_parameters()}
    attack = partial(pd.attacks.pgd, eps=0.1, num_steps=2)
    pd.fit(defense, [(x, y)], epochs=2, objective=svgd(information_gain(elbo, attack)), progress=False)
    assert not [name for name, value in defense.named_parameters() if torch.equal(before[name], value)]


def test_bad_settings_are_refused():
    attack = partial(pd.attacks.fgsm, eps=0.1)
    with pytest.raises(ValueError, match="expected prior_scale > 0"):
        svgd(prior_scale=0.0)
    with pytest.raises(ValueError, match="expected bandwidth > 0"):
        svgd(bandwidth=-1.0)
    with pytest.raises(ValueError, match="expected weight >= 0"):
        information_gain(elbo, attack, weight=-1.0)
    with pytest.raises(ValueError, match="expected num_samples >= 2"):
        information_gain(elbo, attack, num_samples=1)


def test_the_bandwidth_of_an_even_number_of_pairs_is_that_of_the_median(float64):
    theta, score = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    h = float(torch.nn.functional.pdist(theta).quantile(0.5)) ** 2 / math.log(4)
    torch.testing.assert_close(stein_direction(theta, score), stein_direction(theta, score, h))


def test_coefficients_of_noise_belong_to_no_particle(float64):
    """Those of the first member sit on the input of all: as parts of particles they would undo the distance."""
    nets = [nn.Linear(4, 3).double() for _ in range(3)]
    silent = {"scale": "learned", "sigma_init": 1e-9, "sigma_inner": 1e-9}
    noisy = pd.defenses.rse(pd.defenses.particles(nets, num_data=6), before_linear=True, **silent)
    x, y = torch.rand(6, 4).double(), torch.randint(3, (6,))
    plain = pd.defenses.particles(nets, num_data=6)
    for defense in (plain, noisy):
        svgd()(defense, x, y).backward()
    for one, other in zip(plain.net.members, noisy.net.members, strict=True):
        torch.testing.assert_close(other.weight.grad, one.weight.grad, atol=1e-6, rtol=0)


def test_members_without_a_distance_are_refused():
    x, y = torch.rand(2, 4), torch.zeros(2).long()
    half = pd.defenses.particles([nn.Linear(4, 3), nn.Linear(4, 3)], num_data=2)
    half.net.members[0].bias.requires_grad_(False)
    others = pd.defenses.ensemble([nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3))], num_data=2)
    assert svgd()(others, x, y).isfinite()
    for defense in (half, pd.defenses.bayesian(others)):
        with pytest.raises(
            ValueError, match="expected networks whose trained parameters have the same shapes"
        ):
            svgd()(defense, x, y)
