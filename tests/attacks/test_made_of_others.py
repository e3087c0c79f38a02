"""Attacks that use other functions or other attacks: transfer, substitute, BPDA, ARC and the suite."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks import (
    apgd,
    arc,
    bpda,
    fgsm,
    fmn,
    least_budget,
    pgd,
    square,
    substitute,
    suite,
    transfer,
)
from probdefense.attacks.suite import _nearest
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.attacks.tools.selection import SELECTION_DRAWS, remaining_margin
from probdefense.attacks.tools.settle import HELD_OUT_DRAWS
from probdefense.defenses.jump_relu import surrogates
from probdefense.logits.adapters import counted
from probdefense.logits.losses import margin
from probdefense.prediction.drawing import draw_keyed
from tests.contract import defended
from tests.worlds import LinearWorld, monte_carlo_tolerance, tiny_batch


def accuracy(defense, x, y, num_samples=400):
    """Of the rule of one draw, by fresh draws: the mean over many of them."""
    return float((draw_keyed(defense, x, num_samples, 77).argmax(-1) == y).float().mean())


class Two:
    """Two members, drawn with equal chance, whose margins are lines in t = (x0 - .5) / .1."""

    stochastic = True

    def __init__(self, first, second):
        self.lines = first, second

    def members(self, x):
        t = (x[:, 0] - 0.5) / 0.1
        return [torch.stack([a + b * t, torch.zeros_like(t)], -1) for a, b in self.lines]

    def __call__(self, x, num_samples=None):
        members = self.members(x)
        return torch.stack([members[int(k)] for k in torch.randint(2, (num_samples or 1,))])

    def freeze(self, num_samples=1):
        return Both(self)


class Both:
    stochastic = False

    def __init__(self, two):
        self.two = two

    def __call__(self, x, num_samples=None):
        return torch.stack(self.two.members(x))

    def freeze(self, num_samples=1):
        return self


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_arc_breaks_the_member_that_the_mean_hides(norm):
    """The mean margin falls where both members are right; one of them errs only at the other end."""
    two, x, y = Two((1.2, 1.1), (0.1, -0.15)), torch.full((8, 1), 0.5), torch.zeros(8).long()
    by_mean = pgd(two.freeze(), x, y, eps=0.1, norm=norm, loss=margin, seed=0)
    assert accuracy(two.freeze(), by_mean, y) == 1.0
    assert accuracy(two.freeze(), arc(two, x, y, eps=0.1, norm=norm), y) == 0.5


def test_arc_never_makes_more_members_right(digits_net):
    net, (x, y) = digits_net
    both = pd.defenses.ensemble([net, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])
    torch.manual_seed(0)
    frozen = both.freeze(2)
    before = accuracy(frozen, x, y)
    left = [accuracy(frozen, arc(frozen, x, y, eps=eps, num_steps=6), y) for eps in (0.02, 0.1)]
    assert left[1] < left[0] <= before


def test_transfer_never_asks_the_function_under_attack(digits_rse):
    defense, (x, y) = digits_rse
    cost, source = pd.counted(defense), pd.counted(defense.mean())
    x_adv = transfer(pgd, source)(cost, x, y, eps=0.2, seed=0)
    assert cost.queries == cost.gradients == 0 and source.gradients == 40 * len(x)
    torch.testing.assert_close(x_adv, transfer(pgd, defense.mean())(defense, x, y, eps=0.2, seed=0))
    assert accuracy(defense, x_adv, y) < 0.5 < accuracy(defense, x, y)


def test_transfer_of_a_plain_network_is_refused_with_the_fix():
    with pytest.raises(TypeError, match="wrap it with probdefense.deterministic"):
        transfer(pgd, nn.Linear(2, 2))


def test_a_substitute_learns_the_boundary_from_labels_alone(digits_rse):
    defense, (x, y) = digits_rse
    cost = pd.counted(defense)
    x_adv = substitute(cost.samples(4), x, y, eps=0.4, num_rounds=3, seed=0)
    assert cost.gradients == 0 and cost.queries == 60 * 4 * 2**3
    assert float((x_adv - x).abs().max()) <= 0.4 + 1e-6
    noise = (x + 0.4 * (2 * torch.rand_like(x) - 1).sign()).clamp(0, 1)
    assert accuracy(defense, x_adv, y) < accuracy(defense, noise, y) - 0.15


def test_a_substitute_is_trained_on_what_the_attacker_knows():
    defense, (x, y) = defended("deterministic"), tiny_batch()
    cost = pd.counted(defense)
    substitute(cost, x, y, eps=0.1, known=torch.rand(9, 1, 6, 6), num_rounds=1, num_epochs=1, seed=0)
    assert cost.queries == 2 * 9


class Round(nn.Module):
    def forward(self, x):
        return (4 * x).round() / 4


def test_bpda_gives_the_gradient_of_the_surrogate_and_the_answer_of_the_net():
    plain = nn.Linear(5, 3)
    net = pd.deterministic(nn.Sequential(Round(), plain))
    x, y = torch.rand(4, 5), torch.randint(3, (4,))
    exact = input_gradient(pd.deterministic(plain), Round()(x), climb(margin, y)).gradient
    before = net(x)
    for key in (Round, "net.0" if "net.0" in dict(net.named_modules()) else "model.net.0"):
        with bpda(net, {key: lambda z: z}):
            assert torch.equal(net(x), before)
            torch.testing.assert_close(input_gradient(net, x, climb(margin, y)).gradient, exact)
    assert float(input_gradient(net, x, climb(margin, y)).gradient.abs().max()) == 0, (
        "the hook is still there"
    )


def test_bpda_leaves_no_hook_behind_after_an_error():
    net = nn.Sequential(Round(), nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match="planted"), bpda(net, {Round: lambda z: z}):
        raise RuntimeError("planted")
    assert not net[0]._forward_hooks


@pytest.mark.parametrize("key", ["no such name", nn.Conv3d])
def test_bpda_refuses_a_module_that_is_not_there(key):
    with (
        pytest.raises(ValueError, match="found no module .* to give a surrogate; known: 0"),
        bpda(nn.Sequential(Round()), {key: lambda z: z}),
    ):
        pass


def test_bpda_refuses_a_surrogate_of_another_shape():
    net = pd.deterministic(nn.Sequential(Round(), nn.Linear(5, 3)))
    with bpda(net, {Round: lambda z: z[:, :2]}), pytest.raises(ValueError, match="expected the surrogate of"):
        fgsm(net, torch.rand(2, 5), torch.tensor([0, 1]), eps=0.1)


def test_bpda_opens_what_rounding_closes(digits_net):
    net, (x, y) = digits_net
    rounded = pd.deterministic(nn.Sequential(Round(), net))
    masked = accuracy(rounded, pgd(rounded, x, y, eps=0.2, seed=0), y)
    with bpda(rounded, {Round: lambda z: z}):
        x_adv = pgd(rounded, x, y, eps=0.2, seed=0)
    assert accuracy(rounded, x_adv, y) < masked - 0.3


def test_bpda_through_the_surrogates_of_jump_relu(digits_net):
    net, (x, y) = digits_net
    defense = pd.defenses.jump_relu(net, kappa=1.5)
    plain = pgd(defense, x, y, eps=0.1, seed=0)
    with bpda(defense, surrogates(defense)):
        assert torch.equal(defense(x), pd.defenses.jump_relu(net, kappa=1.5)(x))
        through = pgd(defense, x, y, eps=0.1, seed=0)
        frozen = pgd(defense.freeze(), x, y, eps=0.1, seed=0)
    assert accuracy(defense, through, y) <= accuracy(defense, plain, y)
    torch.testing.assert_close(frozen, through)
    assert not torch.allclose(plain, through)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_the_suite_spends_no_more_than_its_budget(norm):
    defense, (x, y) = defended("rse"), tiny_batch()
    cost = pd.counted(defense)
    suite(cost, x, y, eps={1: 1.0, 2: 0.2, math.inf: 0.02}[norm], norm=norm, budget=950, seed=0)
    assert 100 * len(x) < cost.queries <= 950 * len(x)


def test_the_suite_stops_where_examples_have_surely_fallen(digits_rse):
    defense, (x, y) = digits_rse
    spent = []
    for eps in (0.02, 0.5):
        cost = pd.counted(defense)
        suite(cost, x, y, eps=eps, seed=0)
        spent.append(cost.gradients)
    assert spent[1] < 0.3 * spent[0]


def test_one_lucky_draw_does_not_take_an_example_out():
    """With a null budget the suite must not claim what a random defense gets wrong by chance."""
    world = LinearWorld(sigma=0.6)
    noisy, (x, y) = world.noisy(), world.points(150)
    x_adv = suite(noisy, x, y, eps=1e-6, seed=0)
    assert abs(accuracy(noisy, x_adv, y) - accuracy(noisy, x, y)) < 0.005
    unsure = (world.share_of_one(x) - 0.5).abs() < 0.2
    cost = pd.counted(noisy)
    suite(cost, x[unsure], y[unsure], eps=1e-6, seed=0)
    assert cost.gradients > 100 * int(unsure.sum()), "points on the fence must stand"


def test_the_suite_is_no_weaker_than_its_parts(digits_net, digits_rse):
    for defense, (x, y) in ((pd.deterministic(digits_net[0]), digits_net[1]), digits_rse):
        x, y = x[:30], y[:30]
        left = accuracy(defense, suite(defense, x, y, eps=0.08, seed=0), y)
        for part in (
            partial(pgd, num_steps=40),
            partial(apgd, num_steps=40),
            partial(square, max_queries=200),
        ):
            slack = monte_carlo_tolerance(0.5, 400) if defense.stochastic else 0.0
            assert left <= accuracy(defense, part(defense.samples(4), x, y, eps=0.08, seed=0), y) + slack


def test_the_suite_takes_a_function_that_cannot_freeze():
    world = LinearWorld()
    noisy, (x, y) = world.noisy(), world.points(4)
    x_adv = suite(lambda points, num_samples: noisy(points, num_samples), x, y, eps=0.05, seed=0)
    assert float((x_adv - x).abs().max()) <= 0.05 + 1e-6


@pytest.mark.parametrize("name", ["rse", "deterministic"])
def test_a_budget_that_does_not_reach_every_attack_is_refused(name):
    x, y = tiny_batch()
    with pytest.raises(ValueError, match="budget=99 does not pay for 10 steps of every attack; needed:"):
        suite(defended(name), x, y, eps=0.05, budget=99)
    needed = {"rse": 920, "deterministic": 200}[name]
    suite(defended(name), x[:1], y[:1], eps=0.05, budget=needed)


def test_points_nearest_to_the_boundary_go_on_to_the_sphere(digits_net):
    """Half of them lie inside the ball: there the suite uses the rest of the budget too."""
    net, (x, y) = digits_net
    near = fmn(pd.deterministic(net), x, y, norm=2, num_steps=30)
    eps = float((near - x).flatten(1).norm(dim=1).median())
    far = _nearest(pd.deterministic(net), x, y, eps=eps, norm=2, num_steps=30)
    length = (far - x).flatten(1).norm(dim=1)
    assert float(length.max()) <= eps * (1 + 1e-5) and float(length.median()) > 0.99 * eps
    assert float((net(far).argmax(1) == y).float().mean()) < 0.6


def test_points_are_compared_on_many_fresh_draws():
    """The margin of a restart is that of a mean over 32 draws, and asks anew for every one."""
    cost = counted(defended("rse"))
    x, y = tiny_batch(5)
    margins = [remaining_margin(cost, x, y, pd.rules.mean_prob) for _ in range(2)]
    assert cost.queries == 2 * SELECTION_DRAWS * len(x) and not torch.equal(*margins)


def test_the_smallest_budget_is_known_before_anything_is_attacked():
    x, y = tiny_batch()
    for name, norm in (("rse", math.inf), ("rse", 1), ("deterministic", 2)):
        defense = defended(name)
        least = least_budget(defense, norm=norm)
        suite(defense, x[:1], y[:1], eps=0.05, norm=norm, budget=least)
        with pytest.raises(ValueError, match=f"budget={least - 1} does not pay .* needed: {least}"):
            suite(defense, x[:1], y[:1], eps=0.05, norm=norm, budget=least - 1)


@pytest.mark.parametrize(("kind", "budget", "unspent"), [("plain", 400, 20), ("random", 1500, 100)])
def test_an_image_that_stands_gets_its_whole_budget(kind, budget, unspent, digits_net, digits_rse):
    """Neither less, where others fall at once, nor what they leave of theirs."""
    defense, (x, _) = (pd.deterministic(digits_net[0]), digits_net[1]) if kind == "plain" else digits_rse
    sure = defense(x, 64).softmax(-1).mean(0).amax(1).argmax()
    x = x[sure].repeat(4, 1, 1, 1)
    right = defense(x[:1], 64).softmax(-1).mean(0).argmax(1)
    y = torch.cat([right, (right + torch.arange(1, 4)) % 10])
    spent = []
    for rows in (slice(1), slice(4)):
        cost = pd.counted(defense)
        suite(cost, x[rows], y[rows], eps=1e-4, budget=budget, seed=0)
        spent.append(cost.queries)
    assert budget - unspent < spent[0] <= budget
    assert spent[1] == spent[0] + 3 * (HELD_OUT_DRAWS if kind == "random" else 1)


@pytest.mark.parametrize("kind", ["plain", "random"])
def test_the_suite_goes_for_the_class_wanted(kind, digits_net, digits_rse):
    defense, (x, y) = (pd.deterministic(digits_net[0]), digits_net[1]) if kind == "plain" else digits_rse
    x, y = x[:12], y[:12]
    target = (y + 1) % 10
    cost = pd.counted(defense)
    x_adv = suite(cost, x, y, eps=0.3, target=target, seed=0)
    reached = accuracy(defense, x_adv, target)
    alone = accuracy(
        defense, apgd(defense.samples(4), x, y, eps=0.3, target=target, num_steps=20, seed=0), target
    )
    assert reached >= alone - 0.05 and reached > 0.6
    assert cost.queries <= 1000 * len(x)
