"""Minimum-norm attacks: closed forms, success on random defenses, and the protocol that is no attack."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks import cw, cw_fixed, ddn, deepfool, ead, fmn, hop_skip_jump, zoo
from probdefense.attacks.tools.selection import Goal
from probdefense.attacks.tools.settle import settle
from probdefense.logits.rules import mean_prob
from probdefense.ops import lp_norm
from probdefense.prediction.drawing import draw_keyed
from tests.worlds import LinearWorld

DUAL = {1: math.inf, 2: 2, math.inf: 1}


def share_right(defense, x, y, verdicts=4):
    """Accuracy by the mean of 50 draws, over several sets of fresh draws."""
    logits = [draw_keyed(defense, x, 50, 1000 + seed) for seed in range(verdicts)]
    return sum(float((mean_prob(one).argmax(-1) == y).float().mean()) for one in logits) / verdicts


def near_the_plane(distance=0.3, dims=12, count=12):
    """A linear world whose points are all that far from the plane, and where the box never matters."""
    world = LinearWorld(dims=dims)
    x, _ = world.points(count)
    side = world.score(x).sign()
    x = (
        x
        + ((side * distance * world.w.norm() - world.score(x)) / world.w.square().sum()).unsqueeze(1)
        * world.w
    )
    assert float(x.min()) > 0.0 and float(x.max()) < 1.0 and float(side.sum().abs()) < count
    return world, x, (side > 0).long()


@pytest.mark.parametrize(
    ("attack", "norm", "worst"),
    [
        (cw, 2, 1.05),
        (ddn, 2, 1.05),
        (fmn, 2, 1.05),
        (deepfool, 2, 1.05),
        (partial(deepfool, norm=math.inf), math.inf, 1.05),
        (partial(fmn, norm=math.inf), math.inf, 1.05),
        (partial(fmn, norm=1), 1, 1.05),
        (ead, 1, 1.05),
        (partial(zoo, num_coordinates=12), 2, 1.05),
        (hop_skip_jump, 2, 1.05),
        (partial(hop_skip_jump, norm=math.inf), math.inf, 1.05),
    ],
)
def test_the_nearest_point_of_a_plane(attack, norm, worst):
    world, x, y = near_the_plane(0.05 if norm == 1 else 0.3)
    exact = world.score(x).abs() / torch.linalg.vector_norm(world.w, ord=DUAL[norm])
    x_adv = attack(world.plain(), x, y, seed=0)
    ratio = lp_norm(x_adv - x, norm) / exact
    assert bool((world.score(x_adv).sign() != world.score(x).sign()).all())
    assert float(ratio.min()) > 0.999
    assert float(ratio.max()) < worst


@pytest.mark.parametrize("attack", [ddn, fmn, deepfool])
def test_defaults_break_random_defenses(attack, random_digits):
    defense, (x, y) = random_digits
    assert share_right(defense, x, y) > 0.9
    assert share_right(defense, attack(defense, x, y, seed=0), y) <= 0.1


@pytest.mark.parametrize("attack", [cw, ead])
def test_bisected_attacks_break_a_random_defense(attack, digits_rse):
    defense, (x, y) = digits_rse
    x, y = x[:15], y[:15]
    assert (
        share_right(defense, attack(defense.samples(4), x, y, num_searches=5, init_c=0.1, seed=0), y) <= 0.1
    )


def test_points_of_the_surrogate_survive_without_settling(digits_rse):
    """The reason to settle: about half of the points on the boundary of frozen draws are right again."""
    defense, (x, y) = digits_rse
    torch.manual_seed(0)
    on_boundary = ddn(defense.freeze(16), x, y)
    assert share_right(defense, on_boundary, y) > 0.25
    settled = settle(defense, x, on_boundary, Goal(y, sure=True))
    assert share_right(defense, settled, y) <= 0.1
    farther = lp_norm(settled - x, 2) / lp_norm(on_boundary - x, 2).clamp_min(1e-9)
    assert 1.0 < float(farther.median()) < 1.5


def test_a_point_stays_where_it_is_if_no_length_of_its_ray_is_wrong():
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[4.0, 4.0], [0.0, 0.0]]))
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    assert torch.equal(settle(pd.deterministic(net), x, x + 0.1, Goal(y)), x)


def test_what_is_settled_is_surely_wrong_for_a_rule_of_one_draw():
    world = LinearWorld(sigma=0.05)
    x, y = world.points(6)
    torch.manual_seed(0)
    x_adv = ddn(world.noisy(), x, y, rule=pd.rules.single_draw)
    wrong = torch.where(y == 1, 1 - world.share_of_one(x_adv), world.share_of_one(x_adv))
    assert float(wrong.min()) > 0.93


@pytest.mark.parametrize(
    "attack",
    [*(partial(a, num_steps=60, num_searches=5, init_c=0.1) for a in (cw, ead)), ddn, fmn],
    ids=["cw", "ead", "ddn", "fmn"],
)
def test_the_targeted_form_reaches_the_class(attack, digits_net):
    net, (x, y) = digits_net[0], (part[:30] for part in digits_net[1])
    target = (y + 3) % 10
    x_adv = attack(pd.deterministic(net), x, y, target=target, seed=0)
    assert float((net(x_adv).argmax(1) == target).float().mean()) > 0.9
    untargeted = attack(pd.deterministic(net), x, y, seed=0)
    assert float(lp_norm(x_adv - x, 2).median()) > float(lp_norm(untargeted - x, 2).median())


@pytest.mark.parametrize("attack", [cw, ead, ddn, fmn, deepfool])
def test_a_random_function_without_freeze_is_refused(attack):
    world = LinearWorld()
    noisy, (x, y) = world.noisy(), world.points(2)
    with pytest.raises(ValueError, match=r"expected a LogitsFn with freeze\(num_samples\)"):
        attack(lambda points: noisy(points), x, y)


@pytest.mark.parametrize("attack", [partial(deepfool, norm=1), partial(hop_skip_jump, norm=1)])
def test_norms_without_a_form_are_refused(attack):
    world = LinearWorld()
    with pytest.raises(ValueError, match="expected norm 2 or math.inf"):
        attack(world.plain(), *world.points(2))


def test_an_example_that_is_wrong_already_stays():
    world, x, y = near_the_plane()
    for attack in (cw, ddn, ead, fmn, deepfool):
        torch.testing.assert_close(attack(world.plain(), x, 1 - y), x, rtol=0, atol=1e-3)


def test_every_example_bisects_its_own_constant(digits_net):
    """An easy neighbor must not stop the search of a hard one."""
    net, (x, y) = digits_net
    defense, few = pd.deterministic(net), partial(cw, num_steps=40, num_searches=4, init_c=0.1)
    hard = int(lp_norm(few(defense, x, y) - x, 2).argmax())
    alone = few(defense, x[hard : hard + 1], y[hard : hard + 1])
    together = few(defense, x, y)[hard : hard + 1]
    assert float(lp_norm(alone - together, 2)) < 0.02


def test_the_confidence_of_cw_is_a_margin_in_nats():
    world, x, y = near_the_plane()
    x_adv = cw_fixed(world.plain(), x, y, c=5.0, step_size=0.02, confidence=0.4)
    reached = -world.score(x_adv) * (2 * y - 1)
    assert float(reached.min()) > 0.3 and float(reached.max()) < 0.5


def test_the_fixed_constant_moves_along_the_weights_without_looking():
    world, x, y = near_the_plane()
    moved = [lp_norm(cw_fixed(world.plain(), x, y, c=c, num_steps=100) - x, 2).mean() for c in (1e-4, 1.0)]
    assert float(moved[0]) < 1e-3 < float(moved[1])
    gained = (world.score(x) - world.score(cw_fixed(world.plain(), x, y, c=1.0, num_steps=100))) * (2 * y - 1)
    assert float(gained.min()) > 0


def test_the_fixed_constant_tells_how_many_pixels_cannot_move(digits_net):
    net, (x, y) = digits_net
    stuck = float(((x == 0) | (x == 1)).float().mean())
    with pytest.warns(UserWarning, match=f"{stuck:.0%} of the pixels are at exactly 0 or 1"):
        x_adv = cw_fixed(pd.deterministic(net), x, y, c=1.0, num_steps=5)
    moved, inside = (x_adv - x).abs() > 1e-6, (x > 0) & (x < 1)
    assert not bool(moved[~inside].any()) and float(moved[inside].float().mean()) > 0.5
