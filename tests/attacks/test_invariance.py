"""Minimum-norm attacks ask where decisions change: logits times a constant plus another one move nothing."""

import copy
import math
from functools import partial

import pytest
import torch

import probdefense as pd
from probdefense.ops import lp_norm

ATTACKS = {
    "ddn": (partial(pd.attacks.ddn, num_steps=30), 2),
    "fmn": (partial(pd.attacks.fmn, num_steps=30), 2),
    "fmn l-inf": (partial(pd.attacks.fmn, num_steps=30, norm=math.inf), math.inf),
    "fmn L1": (partial(pd.attacks.fmn, num_steps=30, norm=1), 1),
    "deepfool": (pd.attacks.deepfool, 2),
    "cw": (partial(pd.attacks.cw, num_steps=20, num_searches=4, init_c=0.1), 2),
}
MAPS = [(1e-3, 0.0), (1.0, 40.0), (50.0, -7.0)]


class Mapped:
    """A function whose logits are multiplied and shifted."""

    def __init__(self, function, scale, shift):
        self.function, self.scale, self.shift = function, scale, shift
        self.stochastic = function.stochastic

    def __call__(self, x, num_samples=None):
        return self.scale * self.function(x, num_samples) + self.shift

    def freeze(self, num_samples=None):
        return Mapped(self.function.freeze(num_samples), self.scale, self.shift)


@pytest.mark.parametrize("kind", ["plain", "votes"])
@pytest.mark.parametrize("name", ATTACKS)
def test_distances_do_not_depend_on_scale_and_shift(name, kind, digits_net, digits_rse):
    """In double precision, in which a shift costs no digits that matter."""
    attack, norm = ATTACKS[name]
    if kind == "plain":
        defense, rule = pd.deterministic(digits_net[0]), pd.rules.mean_prob
    else:
        defense, rule = digits_rse[0], pd.rules.vote
    defense = copy.deepcopy(defense).double()
    x, y = digits_net[1][0][:4].double(), digits_net[1][1][:4]
    options = {} if name == "deepfool" and kind == "plain" else {"rule": rule}
    usual = attack(defense, x, y, seed=0, **options)
    assert float(lp_norm(usual - x, norm).min()) > 0
    for scale, shift in MAPS:
        found = attack(Mapped(defense, scale, shift), x, y, seed=0, **options)
        torch.testing.assert_close(lp_norm(found - x, norm), lp_norm(usual - x, norm), rtol=0, atol=1e-3)
