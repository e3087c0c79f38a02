"""Steepest-ascent attacks: their formulas, and the order in which they must stand."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks import apgd, bim, fgsm, mim, pgd, r_fgsm, worst_of
from probdefense.attacks.tools.diagnostics import gradient_signal
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.logits.losses import dlr, expected_cross_entropy, margin, predictive_margin, vote_margin
from probdefense.ops import Ball
from probdefense.prediction.drawing import draw_keyed
from probdefense.rng import Stream
from tests.contract import defended
from tests.worlds import LinearWorld, monte_carlo_tolerance, tiny_batch

ITERATED = {name: partial(getattr(pd.attacks, name), num_steps=15) for name in ("bim", "mim", "pgd", "apgd")}
iterated = pytest.mark.parametrize("attack", ITERATED.values(), ids=ITERATED)


def accuracy(defense, x, y, num_samples=400, seed=77):
    """Of the rule of one draw, by fresh draws: the mean over many of them."""
    return float((draw_keyed(defense, x, num_samples, seed).argmax(-1) == y).float().mean())


def gradient_at(defense, x, y):
    return input_gradient(defense, x, climb(expected_cross_entropy, y)).gradient


def test_r_fgsm_takes_its_gradient_at_the_moved_point():
    defense, (x, y) = defended("deterministic"), tiny_batch()
    x_adv = r_fgsm(defense, x, y, eps=0.2, seed=4)
    noise = Stream.of(4, x).normal(x.shape[1:])
    moved = (x + 0.1 * noise.sign()).clamp(0, 1)
    here, there = ((moved + 0.1 * gradient_at(defense, p, y).sign()).clamp(0, 1) for p in (x, moved))
    torch.testing.assert_close(x_adv, Ball(x, 0.2).project(there))
    assert not torch.allclose(x_adv, Ball(x, 0.2).project(here))


def test_r_fgsm_refuses_a_random_step_beyond_the_budget():
    with pytest.raises(ValueError, match="expected 0 <= alpha <= eps"):
        r_fgsm(defended("deterministic"), *tiny_batch(), eps=0.1, alpha=0.2)


def test_bim_by_hand():
    defense, (x, y) = defended("deterministic"), tiny_batch()
    point = x
    for _ in range(3):
        point = (point + 0.05 * gradient_at(defense, point, y).sign()).clamp(0, 1)
        point = (x + (point - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(bim(defense, x, y, eps=0.1, step_size=0.05, num_steps=3), point)


def test_signs_of_draws_are_averaged_so_that_no_draw_outweighs_the_others():
    """Three draws whose gradients are (1, 9), (1, -1) and (1, -1): their mean points up, their signs down."""
    slopes = iter(torch.tensor([[1.0, 9.0], [1.0, -1.0], [1.0, -1.0]] * 2))

    def logits_fn(x, num_samples=None):
        gain = (x * next(slopes)).sum(1)
        return torch.stack([torch.zeros_like(gain), gain], dim=1).unsqueeze(0)

    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    for signs, expected in ((False, 0.6), (True, 0.4)):
        options = {"eps": 0.1, "num_steps": 1, "repeats": 3, "loss": margin, "signs": signs}
        torch.testing.assert_close(mim(logits_fn, x, y, **options), torch.tensor([[0.6, expected]]))


def test_momentum_by_hand():
    defense, (x, y) = defended("deterministic"), tiny_batch()
    point, velocity = x, torch.zeros_like(x)
    for _ in range(3):
        slope = gradient_at(defense, point, y)
        velocity = 0.5 * velocity + slope / slope.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
        point = (x + (point + 0.05 * velocity.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(mim(defense, x, y, eps=0.1, step_size=0.05, num_steps=3, momentum=0.5), point)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("loss", [expected_cross_entropy, dlr, margin])
def test_apgd_reaches_the_best_point_of_a_linear_ball(norm, loss):
    world = LinearWorld(dims=40)
    x, y = world.points(8)
    x_adv = apgd(world.plain(), x, y, eps=0.15, norm=norm, loss=loss, num_steps=60, seed=0)
    gained = (world.score(x) - world.score(x_adv)) * (2 * y - 1)
    best = 0.15 * torch.linalg.vector_norm(world.w, ord={1: math.inf, 2: 2, math.inf: 1}[norm])
    assert float((gained / best).min()) > (0.9 if norm == 1 else 0.99)
    assert float((gained / best).max()) < 1.0001


@iterated
def test_without_a_budget_nothing_stands(attack, digits_net, random_digits):
    for defense, (x, y) in ((pd.deterministic(digits_net[0]), digits_net[1]), random_digits):
        assert accuracy(defense, attack(defense.samples(4), x, y, eps=1.0, seed=0), y) <= 0.005


@iterated
def test_iterated_attacks_beat_one_step(attack, digits_net):
    net, (x, y) = digits_net
    defense = pd.deterministic(net)
    one = accuracy(defense, fgsm(defense, x, y, eps=0.08), y)
    assert (
        accuracy(defense, attack(defense, x, y, eps=0.08, seed=0), y) <= one < accuracy(defense, x, y) - 0.2
    )


@iterated
def test_bigger_budgets_are_never_weaker(attack, digits_net, digits_rse):
    defense, (x, y) = digits_rse
    torch.manual_seed(0)
    for function in (pd.deterministic(digits_net[0]), defense.freeze(4)):
        left = [accuracy(function, attack(function, x, y, eps=eps, seed=0), y) for eps in (0.04, 0.1, 0.24)]
        assert left == sorted(left, reverse=True) and left[-1] < left[0]
    left = [
        accuracy(defense, attack(defense.samples(4), x, y, eps=eps, seed=0), y) for eps in (0.05, 0.1, 0.2)
    ]
    slack = monte_carlo_tolerance(0.5, 400)
    assert left[1] <= left[0] + slack and left[2] <= left[1] + slack


def test_sixteen_draws_per_step_are_as_strong_as_one(random_digits):
    defense, (x, y) = random_digits
    one, many = (
        accuracy(defense, pgd(defense.samples(n), x, y, eps=0.12, num_steps=15, seed=0), y) for n in (1, 16)
    )
    assert many <= one + monte_carlo_tolerance(0.5, 400) and many < accuracy(defense, x, y) - 0.2


def test_one_draw_and_many_steps_tie_with_many_draws_at_equal_gradients(random_digits):
    defense, (x, y) = random_digits
    costs, left = [], []
    for draws in (1, 16):
        cost = pd.counted(defense)
        x_adv = pgd(cost.samples(draws), x, y, eps=0.12, num_steps=160 // draws, seed=0)
        costs.append(cost.gradients)
        left.append(accuracy(defense, x_adv, y))
    assert costs[0] == costs[1] and abs(left[0] - left[1]) < 0.05


@pytest.mark.parametrize("loss", [predictive_margin, vote_margin, dlr])
def test_every_loss_finds_the_way(loss, random_digits):
    defense, (x, y) = random_digits
    assert accuracy(defense, pgd(defense.samples(8), x, y, eps=0.3, loss=loss, seed=0), y) < 0.25


@pytest.mark.parametrize("attack", [pgd, apgd], ids=["pgd", "apgd"])
def test_repeats_cost_gradients_and_average_draws(attack):
    defense, (x, y) = defended("rse"), tiny_batch()
    cost = pd.counted(defense)
    attack(cost.samples(2), x, y, eps=0.1, num_steps=3, repeats=4, seed=0)
    assert cost.gradients == 3 * 4 * 2 * len(x)


def test_apgd_with_targets_is_no_weaker_than_without(digits_net):
    net, (x, y) = digits_net
    defense = pd.deterministic(net)
    plain = accuracy(defense, apgd(defense, x, y, eps=0.06, num_steps=20, seed=0), y)
    aimed = accuracy(defense, apgd(defense, x, y, eps=0.06, num_steps=20, num_targets=9, loss=dlr, seed=0), y)
    assert aimed <= plain + 1e-9


def test_targeted_forms_reach_the_class(digits_net):
    net, (x, y) = digits_net
    target = (y + 1) % 10
    for attack in (bim, mim, apgd, partial(apgd, loss=dlr)):
        x_adv = attack(pd.deterministic(net), x, y, eps=0.6, target=target, seed=0)
        assert float((net(x_adv).argmax(1) == target).float().mean()) > 0.9


def test_the_nearest_class_is_the_first_target():
    """The likeliest wrong class is flat and out of reach; the one behind it is steep and near."""
    net = nn.Linear(2, 4)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0], [0.1, 0.1], [10.0, 10.0], [0.0, 0.0]]))
        net.bias.copy_(torch.tensor([0.0, -1.1, -12.0, -9.0]))
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    assert net(x).argsort(descending=True).tolist() == [[0, 1, 2, 3]]
    for scale in (1e-4, 1.0, 1e4):
        scaled = nn.Linear(2, 4)
        scaled.load_state_dict({name: scale * value for name, value in net.state_dict().items()})
        x_adv = apgd(pd.deterministic(scaled), x, y, eps=0.2, num_steps=5, num_targets=1, seed=0)
        assert net(x_adv).argmax(1).tolist() == [2]


def test_apgd_refuses_two_kinds_of_targets():
    x, y = tiny_batch()
    with pytest.raises(ValueError, match="expected num_targets or target, got both"):
        apgd(defended("deterministic"), x, y, eps=0.1, num_targets=1, target=(y + 1) % 3)


@pytest.mark.parametrize("attack", [pgd, bim, mim, apgd])
@pytest.mark.parametrize("options", [{"num_steps": 0}, {"num_steps": -1}, {"repeats": 0}])
def test_counts_below_one_are_refused(attack, options):
    with pytest.raises(ValueError, match="expected (num_steps|repeats) >= 1"):
        attack(defended("deterministic"), *tiny_batch(), eps=0.1, **options)


def test_the_worst_of_several_is_no_weaker_than_each(digits_net):
    net, (x, y) = digits_net
    defense, parts = pd.deterministic(net), [fgsm, r_fgsm, partial(bim, num_steps=3)]
    alone = [accuracy(defense, part(defense, x, y, eps=0.08, seed=0), y) for part in parts]
    assert accuracy(defense, worst_of(parts)(defense, x, y, eps=0.08, seed=0), y) <= min(alone)


def test_the_worst_of_null_attacks_is_the_clean_accuracy():
    """Eight attacks that do nothing give eight chances to be lucky, if the draws are those of a verdict."""
    world = LinearWorld(sigma=0.6)
    noisy, (x, y) = world.noisy(), world.points(200)
    null = worst_of([partial(fgsm, eps=0.0)] * 8)
    torch.testing.assert_close(null(noisy, x, y, seed=0), x)


def test_the_worst_of_puts_points_without_a_budget_into_the_ball(digits_net):
    net, (x, y) = digits_net
    both = worst_of([fgsm, pd.attacks.ddn])
    x_adv = both(pd.deterministic(net), x, y, eps=0.05, seed=0)
    assert float((x_adv - x).abs().max()) <= 0.05 + 1e-6


def test_the_worst_of_nothing_is_refused():
    with pytest.raises(ValueError, match="expected at least one attack"):
        worst_of([])


class NoisyLine:
    """A linear net of two classes whose gradient has known mean and spread."""

    stochastic = True

    def __init__(self, mean, spread):
        self.mean, self.spread = torch.tensor(mean), torch.tensor(spread)

    def __call__(self, x, num_samples=None):
        score = x @ (self.mean + self.spread * torch.randn(3))
        return torch.stack([torch.zeros_like(score), score], -1).unsqueeze(0)


def test_the_signal_of_a_gradient_by_hand():
    line, x, y = NoisyLine([1.0, 0.0, 2.0], [0.5, 0.0, 0.5]), torch.rand(4, 3), torch.zeros(4).long()
    found = gradient_signal(line, x, y, loss=margin, num_samples=1500, seed=0)
    torch.testing.assert_close(found.signal_to_noise, torch.full((4,), math.sqrt(5 / 0.5)), rtol=0.1, atol=0)
    phi = torch.distributions.Normal(0, 1).cdf(torch.tensor([2.0, 4.0]))
    expected = (phi * torch.tensor([1.0, 2.0])).sum() / 3
    torch.testing.assert_close(found.agreement, expected.expand(4), rtol=0, atol=0.02)
    torch.testing.assert_close(found.zeros, torch.full((4,), 1 / 3))


def test_noise_alone_has_no_signal():
    line, x, y = NoisyLine([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), torch.rand(4, 3), torch.zeros(4).long()
    found = gradient_signal(line, x, y, loss=margin, num_samples=1500, seed=0)
    assert float(found.signal_to_noise.max()) < 0.15 and float(found.agreement.max()) < 0.6


def test_a_constant_function_has_gradients_of_zero():
    line, x, y = NoisyLine([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), torch.rand(4, 3), torch.zeros(4).long()
    assert gradient_signal(line, x, y, loss=margin, num_samples=2).zeros.tolist() == [1.0] * 4


def test_the_worst_of_several_selects_by_the_target(digits_net):
    """A point that is wrong by far, but not in the way wanted, must not replace a hit."""
    net, (x, y) = digits_net
    defense, target = pd.deterministic(net), (y + 3) % 10
    parts = [
        partial(pgd, num_steps=15),
        partial(apgd, num_steps=15),
        fgsm,
        partial(pgd, loss=margin, num_steps=15),
    ]

    def hit(attack):
        return net(attack(defense, x, y, eps=0.35, target=target, seed=0)).argmax(1) == target

    alone, together = [hit(part) for part in parts], hit(worst_of(parts))
    assert float(together.float().mean()) >= max(float(one.float().mean()) for one in alone)
    assert float(together.float().mean()) > 0.8


def test_the_worst_of_several_selects_by_the_target_on_draws_and_in_chunks(digits_rse):
    defense, (x, y) = digits_rse
    target = (y + 3) % 10
    both = worst_of([partial(fgsm, eps=0.0), partial(pgd, num_steps=20)])
    x_adv = both(defense.samples(4), x, y, eps=0.5, target=target, seed=0, max_batch=25)
    assert float((defense(x_adv, 100).mean(0).argmax(-1) == target).float().mean()) > 0.8


def test_the_worst_of_points_that_are_no_numbers_is_refused():
    def broken(logits_fn, x, y):
        return x * torch.nan

    with pytest.raises(FloatingPointError, match="NaN or infinite logits in worst for 6 of 6 examples"):
        worst_of([fgsm, broken])(defended("deterministic"), *tiny_batch(), eps=0.1)
