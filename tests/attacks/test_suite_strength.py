"""The suite beside the best of its parts at as many evaluations, on four defenses, with paired intervals."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks import apgd, mim, suite
from probdefense.logits.losses import margin, predictive_margin, probability_margin
from probdefense.logits.rules import mean_prob
from probdefense.prediction.drawing import draw_keyed
from tests.conftest import trained_on_digits
from tests.worlds import normal_quantile

BUDGET, EPS = 1000, 0.1

BUILDERS = {
    "plain": pd.deterministic,
    "rse": lambda net: pd.defenses.rse(net, sigma_init=0.3, sigma_inner=0.2, before_linear=True),
    "bayesian": lambda net: pd.defenses.bayesian(net, num_data=1437, init_scale=0.1),
    "dropout": lambda net: pd.defenses.mc_dropout(
        nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), rate=0.5
    ),
}


def left(defense, points, y):
    """Verdicts of four sets of 50 fresh draws, their mean by image."""
    logits = [draw_keyed(defense, points, 50, 100 + seed) for seed in range(4)]
    return torch.stack([(mean_prob(one).argmax(-1) == y).double() for one in logits]).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_no_part_is_stronger_beyond_its_interval(name):
    defense, (x, y) = trained_on_digits(BUILDERS[name], 100)
    many = probability_margin if defense.stochastic else predictive_margin
    parts = {
        "one draw": partial(apgd, num_steps=BUDGET),
        "momentum": partial(mim, loss=margin, momentum=0.9, step_size=2.5 * EPS / BUDGET, num_steps=BUDGET),
        "many draws": partial(apgd, loss=many, num_steps=BUDGET // 8),
    }
    cost = pd.counted(defense)
    whole = left(defense, suite(cost, x, y, eps=EPS, budget=BUDGET, seed=0), y)
    assert cost.queries <= BUDGET * len(x)
    for label, part in parts.items():
        seen = defense.samples(8 if label == "many draws" else 1)
        behind = whole - left(defense, part(seen, x, y, eps=EPS, seed=0), y)
        allowed = normal_quantile(0.05) * float(behind.std()) / math.sqrt(len(x))
        assert float(behind.mean()) <= allowed + 1e-9, (label, float(behind.mean()), allowed)
