"""Logits times a constant: the same decisions, so the same points, wherever an attack compares margins."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks.tools.selection import STANDARD, Goal
from probdefense.attacks.tools.tradeoff import hinge
from probdefense.logits.losses import dlr, margin
from probdefense.logits.rules import spread
from probdefense.ops import lp_norm

pytestmark = pytest.mark.slow

attacks = pd.attacks
MIN_NORM = {
    "cw": (partial(attacks.cw, num_steps=20, num_searches=4, init_c=0.1), 2),
    "ead": (partial(attacks.ead, num_steps=20, num_searches=4, init_c=0.1), 1),
    "ddn": (partial(attacks.ddn, num_steps=30), 2),
    "fmn": (partial(attacks.fmn, num_steps=30), 2),
    "fmn l-inf": (partial(attacks.fmn, num_steps=30, norm=math.inf), math.inf),
    "fmn L1": (partial(attacks.fmn, num_steps=30, norm=1), 1),
    "deepfool": (attacks.deepfool, 2),
    "zoo": (partial(attacks.zoo, max_queries=2500, num_searches=2), 2),
    "hop_skip_jump": (partial(attacks.hop_skip_jump, max_queries=1500, num_directions=30), 2),
}
BUDGETED = {
    "square": partial(attacks.square, eps=0.1, max_queries=150),
    "nes": partial(attacks.nes, eps=0.1, max_queries=500),
    "spsa": partial(attacks.spsa, eps=0.1, max_queries=500),
    "arc": partial(attacks.arc, eps=0.1, num_steps=3),
    "mim, margin": partial(attacks.mim, eps=0.1, loss=margin),
    "pgd, margin, L2": partial(attacks.pgd, eps=0.5, norm=2, loss=margin, num_steps=10),
    "pgd, margin, restarts": partial(
        attacks.pgd, eps=0.1, loss=margin, num_steps=5, num_restarts=2, rule=pd.rules.vote
    ),
    "apgd, dlr": partial(attacks.apgd, eps=0.1, loss=dlr, num_steps=10),
    "apgd, margin, L2": partial(attacks.apgd, eps=0.5, norm=2, loss=margin, num_steps=10),
    "apgd, targets": partial(attacks.apgd, eps=0.1, loss=dlr, num_targets=2, num_steps=5),
}
SCALES = (1e-8, 1e-4, 1e4, 1e8)
COUNT = 6


class Scaled:
    """A function whose logits are multiplied by a constant."""

    def __init__(self, function, scale):
        self.function, self.scale = function, scale
        self.stochastic = function.stochastic

    def __call__(self, x, num_samples=None):
        return self.function(x, num_samples) * self.scale

    def freeze(self, num_samples=None):
        return Scaled(self.function.freeze(num_samples), self.scale)

    def mean(self):
        return Scaled(self.function.mean(), self.scale)


def points(attack, defense, data, scale, rule=None):
    x, y = (part[:COUNT] for part in data)
    x = x.to(next(defense.parameters()).dtype)
    options = {} if rule is None else {"rule": rule}
    return attack(Scaled(defense, scale), x, y, seed=0, **options), x, y


def share_right(defense, rule, x, y):
    logits = (
        defense(x) if not defense.stochastic else defense.freeze(200, torch.Generator().manual_seed(1))(x)
    )
    return float((rule(logits).argmax(-1) == y).float().mean())


@pytest.mark.parametrize("name", MIN_NORM)
def test_minimum_norm_on_a_plain_network(name, digits_net):
    (attack, norm), defense = MIN_NORM[name], pd.deterministic(digits_net[0])
    usual, x, y = points(attack, defense, digits_net[1], 1.0)
    assert share_right(defense, pd.rules.mean_prob, usual, y) == 0
    for scale in (*SCALES, 1e-30, 1e30):
        found, _, _ = points(attack, defense, digits_net[1], scale)
        assert share_right(defense, pd.rules.mean_prob, found, y) == 0, scale
        torch.testing.assert_close(lp_norm(found - x, norm), lp_norm(usual - x, norm), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MIN_NORM)
def test_minimum_norm_on_a_random_defense_that_votes(name, digits_rse):
    """In double precision: on the boundary of votes one rounding error may change a step of the climb."""
    (attack, norm), defense = MIN_NORM[name], copy.deepcopy(digits_rse[0]).double()
    usual, x, y = points(attack, defense, digits_rse[1], 1.0, pd.rules.vote)
    for scale in SCALES:
        found, _, _ = points(attack, defense, digits_rse[1], scale, pd.rules.vote)
        torch.testing.assert_close(lp_norm(found - x, norm), lp_norm(usual - x, norm), rtol=0, atol=1e-3)
        left = share_right(defense, pd.rules.vote, found, y)
        assert left == share_right(defense, pd.rules.vote, usual, y)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("kind", ["plain", "random"])
def test_budgeted_attacks_climb_to_the_same_points(name, kind, digits_net, digits_rse):
    defense, data = (pd.deterministic(digits_net[0]), digits_net[1]) if kind == "plain" else digits_rse
    usual, _, y = points(BUDGETED[name], defense, data, 1.0)
    for scale in (*SCALES, 1e30):
        found, _, _ = points(BUDGETED[name], defense, data, scale)
        rule = pd.rules.mean_prob if kind == "plain" else pd.rules.vote
        assert share_right(defense, rule, found, y) == share_right(defense, rule, usual, y), scale
        if scale <= 1e8 and "targets" not in name:
            torch.testing.assert_close(found, usual, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "random"])
def test_the_suite_leaves_the_same_accuracy(kind, digits_net, digits_rse):
    defense, data = (pd.deterministic(digits_net[0]), digits_net[1]) if kind == "plain" else digits_rse
    rule = pd.rules.mean_prob if kind == "plain" else pd.rules.vote
    attack, left = partial(attacks.suite, eps=0.12), []
    for scale in (1.0, *SCALES):
        found, _, y = points(attack, defense, data, scale, rule)
        left.append(share_right(defense, rule, found, y))
    assert len(set(left)) == 1 and left[0] < 1, left


def test_the_confidence_of_a_hinge_stays_in_nats_of_the_network():
    logits = torch.tensor([[[0.0, 1.5, -9.0]]])
    for unit in (logits, 50 * logits):
        goal = Goal(torch.tensor([0]), loss=margin).measured(unit)
        assert float(hinge(goal, 1.0, 1.4, logits)) == 0.0
        assert float(hinge(goal, 1.0, 2.0, logits)) == pytest.approx(-0.5 * STANDARD / float(goal.unit))


def test_a_goal_measures_in_the_spread_of_the_logits():
    logits = torch.tensor([[[3.0, 1.0, -2.0, -torch.inf]]])
    goal = Goal(torch.tensor([0]), loss=margin)
    for scale in (1e-20, 1.0, 1e20):
        measured = goal.measured(scale * logits)
        assert float(measured.remaining(scale * logits)) == pytest.approx(2 / 5 * STANDARD)
        assert float(measured.climbed(scale * logits)) == pytest.approx(-2 / 5 * STANDARD)


def test_masks_of_large_numbers_are_not_part_of_the_spread():
    for mask in (-1e9, -1e30, -torch.inf, float(torch.finfo(torch.float32).min)):
        assert float(spread(torch.tensor([3.0, 1.0, -2.0, mask, mask]))) == 5.0
    assert float(spread(torch.tensor([1.0, -torch.inf]))) == 0.0


class Masked(nn.Module):
    def __init__(self, net, mask):
        super().__init__()
        self.net, self.mask = net, mask

    def forward(self, x):
        logits = self.net(x)
        return torch.cat([logits, torch.full_like(logits, self.mask)], dim=1)


@pytest.mark.parametrize("name", ["cw", "ddn", "fmn", "deepfool", "zoo"])
def test_masked_classes_do_not_move_the_boundary(name, digits_net):
    net, data = digits_net
    (attack, _), (usual, _, _) = MIN_NORM[name], points(MIN_NORM[name][0], pd.deterministic(net), data, 1.0)
    for mask in (-1e9, -torch.inf):
        found, _, _ = points(attack, pd.deterministic(Masked(net, mask)), data, 1.0)
        torch.testing.assert_close(found, usual, rtol=0, atol=1e-3)
