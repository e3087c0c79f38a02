"""Attacks made for one kind of defense."""

import pytest
import torch

import probdefense as pd
from probdefense.logits.adapters import counted
from probdefense.nn import transforms as kinds
from probdefense.study import opponents
from tests.worlds import tiny_batch, tiny_net


@pytest.mark.parametrize(
    "transforms", [[kinds.BitDepth(0.3), kinds.Jpeg(0.1)], [kinds.Shift(0.2), kinds.Color(0.5)]]
)
def test_momentum_passes_every_transform_within_its_budget(transforms):
    defense, (x, y) = pd.defenses.random_transforms(tiny_net(), transforms).eval(), tiny_batch()
    attack = opponents.with_momentum(defense, 64)
    assert (attack.num_samples, attack.draws) == (2, "antithetic")
    x_adv = attack(defense, x, y, eps=0.1, seed=0)
    assert float((x_adv - x).abs().amax((1, 2, 3)).min()) == pytest.approx(0.1, abs=1e-5)
    assert torch.equal(x_adv, attack(defense, x, y, eps=0.1, seed=0))
    watched = counted(defense)
    attack(watched, x, y, eps=0.1, seed=0)
    assert watched.gradients == 64 * len(x)


def test_rounding_is_passed_by_its_surrogate():
    rounding, (x, y) = pd.defenses.random_transforms(tiny_net(), [kinds.BitDepth(0.3)]).eval(), tiny_batch()
    assert not torch.equal(opponents.named_attack("bpda", rounding, 16)(rounding, x, y, eps=0.1, seed=0), x)
    slope = pd.attacks.bim(rounding, x, y, eps=0.1, num_steps=2, seed=0)
    assert torch.equal(slope, x), "without it there is no gradient to follow"
