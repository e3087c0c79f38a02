"""Attacks without gradients: what they spend, what noise does to them, and that they succeed."""

import math
from functools import partial

import pytest
import torch

import probdefense as pd
from probdefense.attacks import hop_skip_jump, square, zoo
from probdefense.attacks.square import NOISY_RIVALS
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.attacks.tools.queries import Queries, both_ways, fitted_width, random_directions, slope_along
from probdefense.attacks.tools.selection import Goal
from probdefense.logits.adapters import counted
from probdefense.logits.losses import margin, predictive_margin
from probdefense.prediction.drawing import draw_keyed
from probdefense.rng import Stream
from tests.contract import defended
from tests.worlds import LinearWorld, tiny_batch

BUDGETED = {name: partial(getattr(pd.attacks, name), eps=0.3) for name in ("square", "nes", "spsa")}
QUERYING = {**BUDGETED, "zoo": zoo, "hop_skip_jump": hop_skip_jump}
querying = pytest.mark.parametrize("name", QUERYING)


def share_right(defense, x, y):
    return float((pd.rules.mean_prob(draw_keyed(defense, x, 100, 5)).argmax(-1) == y).float().mean())


@querying
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_more_is_asked_than_allowed_and_no_gradient(name, draws, frozen):
    noisy, (x, y) = LinearWorld().noisy(), LinearWorld().points(5)
    cost = pd.counted(noisy)
    QUERYING[name](cost.samples(draws), x, y, max_queries=1500, frozen=frozen, seed=0)
    assert 400 * len(x) < cost.queries <= 1500 * len(x)
    assert cost.gradients == 0


@querying
def test_a_budget_that_pays_for_nothing_is_refused(name):
    noisy, (x, y) = LinearWorld().noisy(), LinearWorld().points(2)
    with pytest.raises(ValueError, match="max_queries=9 does not pay for one step"):
        QUERYING[name](noisy.samples(2), x, y, max_queries=9)


@querying
def test_a_function_that_cannot_freeze_is_attacked_but_not_frozen(name):
    noisy, (x, y) = LinearWorld().noisy(), LinearWorld().points(2)
    QUERYING[name](lambda points: noisy(points, 2), x, y, max_queries=2500)
    with pytest.raises(ValueError, match="frozen=True needs a defense that can freeze"):
        QUERYING[name](lambda points: noisy(points, 2), x, y, max_queries=2500, frozen=True)


@querying
def test_a_plain_network_falls_without_gradients(name, digits_net):
    net, (x, y) = digits_net
    budget = 6000 if name == "zoo" else 1500
    x_adv = QUERYING[name](pd.deterministic(net), x[:30], y[:30], max_queries=budget, seed=0)
    assert float((net(x_adv).argmax(1) == y[:30]).float().mean()) <= 0.05


@pytest.mark.parametrize("name", ["nes", "spsa"])
def test_random_defenses_fall_without_gradients(name, random_digits):
    defense, (x, y) = random_digits
    x_adv = BUDGETED[name](defense.samples(1), x[:30], y[:30], max_queries=3000, seed=0)
    assert share_right(defense, x_adv, y[:30]) <= 0.25


class Hidden:
    """A linear margin under noise of twice what the whole ball is worth; it answers with one draw."""

    stochastic = True
    weights = torch.randn(64, generator=torch.Generator().manual_seed(0)) / 8

    def __call__(self, x, num_samples=None):
        z = (x.flatten(1) - 0.5) @ self.weights + torch.randn(1, len(x))
        return torch.stack([z, -z], -1)


def test_square_gains_from_a_larger_budget_under_noise():
    x, y = torch.full((40, 1, 8, 8), 0.5), torch.zeros(40, dtype=torch.long)
    most = 0.1 * float(Hidden.weights.abs().sum())
    reached = [
        -float(
            (
                (square(Hidden(), x, y, eps=0.1, max_queries=n, seed=0) - 0.5).flatten(1) @ Hidden.weights
            ).mean()
        )
        for n in (1000, 16_000)
    ]
    assert reached[1] > 0.2 * most > 2 * reached[0]


def test_zoo_spends_a_small_budget_on_one_run():
    torch.manual_seed(0)
    net = torch.nn.Linear(784, 3)
    torch.nn.init.normal_(net.weight, std=0.1)
    x = 0.3 + 0.4 * torch.rand(20, 784)
    y = net(x).argmax(1)
    left = [
        float(
            (net(zoo(pd.deterministic(net), x, y, max_queries=2500, seed=0, **runs)).argmax(1) == y)
            .float()
            .mean()
        )
        for runs in ({}, {"num_searches": 4})
    ]
    assert left[0] < 0.5 < left[1]


def test_zoo_finds_far_points_of_random_defenses_without_gradients(random_digits):
    defense, (x, y) = random_digits
    x_adv = zoo(defense.samples(1), x[:20], y[:20], max_queries=6000, num_searches=3, seed=0)
    assert share_right(defense, x_adv, y[:20]) <= 0.1


def test_the_l2_form_of_square(digits_net):
    net, (x, y) = digits_net
    x_adv = square(pd.deterministic(net), x, y, eps=1.5, norm=2, max_queries=400, seed=0)
    assert float((net(x_adv).argmax(1) == y).float().mean()) < 0.3


def test_square_has_no_l1_form():
    with pytest.raises(ValueError, match="expected norm 2 or math.inf for square"):
        square(LinearWorld().plain(), *LinearWorld().points(2), eps=0.1, norm=1)


@pytest.mark.parametrize("name", ["square", "nes", "spsa"])
def test_targeted_forms_reach_the_class(name, digits_net):
    net, (x, y) = digits_net
    target = (y + 1) % 10
    attack = partial(getattr(pd.attacks, name), eps=0.6, max_queries=1500)
    x_adv = attack(pd.deterministic(net), x[:30], y[:30], target=target[:30], seed=0)
    assert float((net(x_adv).argmax(1) == target[:30]).float().mean()) > 0.85


def test_more_queries_are_no_weaker(digits_net):
    net, (x, y) = digits_net
    few, many = (
        float(
            (net(square(pd.deterministic(net), x, y, eps=0.12, max_queries=n, seed=0)).argmax(1) == y)
            .float()
            .mean()
        )
        for n in (40, 800)
    )
    assert many <= few


def test_differences_along_every_pixel_give_the_gradient():
    world = LinearWorld(dims=6)
    x, y = world.points(3)
    queries = Queries(world.plain(), x, Goal(y, loss=margin), 100)
    pixels = torch.eye(6).unsqueeze(1).expand(6, 3, 6)
    found = 6 * slope_along(*both_ways(queries, x, pixels, 0.01), pixels, 0.01)
    exact = input_gradient(world.plain(), x, queries.goal.climbed).gradient
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_the_step_of_differences_grows_with_the_noise(digits_net, digits_rse):
    """Without noise it is the narrowest; on the defense the paper's 1e-4 sees nothing, the fitted step does."""

    def fitted(defense, x, y):
        queries = Queries(defense, x, Goal(y, loss=predictive_margin), 10_000, num_samples=1)
        return fitted_width(queries, x, random_directions(Stream.of(0, x).normal, 8, x))

    def cosine(defense, x, y, width):
        queries = Queries(defense, x, Goal(y, loss=predictive_margin), 10**6, num_samples=1)
        directions = random_directions(Stream.of(1, x).normal, 200, x)
        found = slope_along(*both_ways(queries, x, directions, width), directions, width).flatten(1)
        exact = input_gradient(defense.samples(400), x, climb(predictive_margin, y)).gradient.flatten(1)
        return float(torch.cosine_similarity(found, exact, dim=1).mean())

    defense, (x, y) = digits_rse
    x, y = x[:20], y[:20]
    assert float(fitted(pd.deterministic(digits_net[0]), x, y).max()) == pytest.approx(1e-3)
    width = fitted(defense, x, y)
    assert float(width.median()) > 0.03
    assert cosine(defense, x, y, width) > 0.4
    assert abs(cosine(defense, x, y, 1e-4)) < 0.1


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_the_fitted_step_follows_the_noise_in_the_linear_world(sigma):
    world = LinearWorld(sigma=sigma, dims=6)
    x, y = world.points(40)
    queries = Queries(world.noisy(), x, Goal(y, loss=margin), 10_000, num_samples=1)
    width = fitted_width(queries, x, torch.eye(6).unsqueeze(1).expand(6, 40, 6))
    exact = sigma * math.sqrt(2 * 6)  # noise of a difference over the slope of a pixel, clipped to the box
    assert 0.5 * min(exact, 0.5) <= float(width.median()) <= 0.5


def test_a_start_that_is_given_is_used(digits_net):
    """Random images are almost never of a wanted class; an image of it is."""
    net, (x, y) = digits_net
    target = (y + 1) % 10
    start = torch.stack([x[(y == t).nonzero()[0, 0]] for t in target])
    reach = (net(start).argmax(1) == target) & (net(x).argmax(1) == y)
    attack = partial(hop_skip_jump, max_queries=2000, num_directions=50)
    x_adv = attack(pd.deterministic(net), x, y, start=start, target=target, seed=0)
    assert bool((net(x_adv).argmax(1) == target)[reach].all())
    nearer = (x_adv - x).flatten(1).norm(dim=1) < (start - x).flatten(1).norm(dim=1)
    assert bool(nearer[reach].all())


def test_square_asks_again_about_the_point_it_holds():
    """On a random defense a value that was lucky once must not stay: every step asks about all its points."""
    cost, (x, y) = counted(defended("rse").samples(1)), tiny_batch()
    pd.attacks.square(cost, x, y, eps=0.1, max_queries=200, seed=0)
    step = NOISY_RIVALS + 1
    assert 200 - 2 * step < cost.queries / len(x) <= 200
