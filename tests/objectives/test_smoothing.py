"""Objectives for certificates, against tiny cases worked by hand."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import probdefense as pd
from probdefense.objectives import adversarial, consistency, elbo, mixed, smooth_adversarial, stability
from probdefense.objectives.smoothing import ENTROPY_WEIGHT
from tests.contract import defended
from tests.worlds import LinearWorld, tiny_batch


def members():
    """Two members that are three times surer of one class than of the other, and disagree."""
    answers = []
    for logits in ([math.log(3.0), 0.0], [0.0, math.log(3.0)]):
        net = nn.Linear(2, 2)
        nn.init.zeros_(net.weight)
        with torch.no_grad():
            net.bias.copy_(torch.tensor(logits))
        answers.append(net)
    return pd.defenses.ensemble(answers, num_data=4)


POINT, LABEL = torch.full((1, 2), 0.5), torch.tensor([0])


def test_consistency_of_two_members_by_hand():
    """Draws that agree have no divergence; those that do not have the mean (1/2, 1/2)."""

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    apart = -math.log(2) - (math.log(0.75) + math.log(0.25)) / 2
    exact = {
        -math.log(0.75) + ENTROPY_WEIGHT * entropy(0.75),
        -math.log(0.25) + ENTROPY_WEIGHT * entropy(0.75),
        -(math.log(0.75) + math.log(0.25)) / 2 + 10.0 * apart + ENTROPY_WEIGHT * math.log(2),
    }
    objective = consistency(elbo, num_samples=2, weight=10.0)
    values = {round(float(objective(members(), POINT, LABEL).detach()), 4) for _ in range(40)}
    assert values == {round(value, 4) for value in exact}


def test_consistency_pulls_draws_together():
    defense, (x, y) = defended("rse"), tiny_batch(20)
    optimizer = torch.optim.Adam(defense.parameters(), 0.01)

    def spread():
        with torch.no_grad():
            return float(defense.eval()(x, 64).softmax(-1).var(0).mean())

    before, objective = spread(), consistency(lambda d, x, y: 0 * elbo(d, x, y), 2, 1.0)
    for _ in range(30):
        optimizer.zero_grad()
        objective(defense.train(), x, y).backward()
        optimizer.step()
    assert spread() < before / 2


def test_the_attack_sees_the_mean_probability_of_the_draws_that_are_trained():
    world = LinearWorld(sigma=0.5)
    defense, (x, y) = world.noisy(), world.points(7)
    seen = {}

    def shifting(f, x, y, *, loss):
        assert not f.stochastic and f(x).shape == (3, 7, 2) and torch.equal(f(x), f(x))
        assert not f(x).requires_grad or all(p.grad is None for p in defense.parameters())
        seen.update(logits=f(x + 0.1), loss=loss)
        return x + 0.1

    found = smooth_adversarial(elbo, shifting, num_samples=3)(defense, x, y)
    by_hand = torch.stack([cross_entropy(draw, y) for draw in seen["logits"]]).mean()
    torch.testing.assert_close(found, by_hand)
    assert seen["loss"] is pd.losses.predictive_cross_entropy
    once = smooth_adversarial(consistency(elbo, 3, 2.0), shifting, num_samples=3)(defense, x, y)
    probs = seen["logits"].softmax(-1)
    mean = probs.mean(0)
    apart = (mean * (mean.log() - probs.log())).sum(-1).mean()
    wanted = torch.stack([cross_entropy(draw, y) for draw in seen["logits"]]).mean()
    wanted = wanted + 2.0 * apart - ENTROPY_WEIGHT * (mean * mean.log()).sum(-1).mean()
    torch.testing.assert_close(once, wanted, rtol=1e-5, atol=1e-5)


def test_the_attack_of_smooth_adversarial_lowers_the_mean_probability():
    defense, (x, y) = defended("rse").eval(), tiny_batch(8)
    draws = [defense.draw(x) for _ in range(8)]
    points = []

    def attack(f, x, y, *, loss):
        points.append(pd.attacks.pgd(f, x, y, loss=loss, norm=2, eps=0.5, num_steps=5))
        return points[0]

    smooth_adversarial(elbo, attack, num_samples=8)(defense, x, y)
    with torch.no_grad():
        clean, moved = (
            torch.cat([defense.at(d)(z) for d in draws]).softmax(-1).mean(0)[torch.arange(8), y]
            for z in (x, points[0])
        )
    assert bool((moved < clean).all())


def test_stability_asks_a_noisy_copy_for_the_clean_answer():
    defense, (x, y) = defended("bayesian").eval(), tiny_batch()
    torch.manual_seed(0)
    alone = stability(elbo, 0.2, 0.0)(defense, x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(alone, elbo(defense, x, y))
    torch.manual_seed(0)
    found = stability(elbo, 0.2, 3.0)(defense, x, y)
    torch.manual_seed(0)
    draws = defense.draw(x)
    moved = defense.at(draws)(x + 0.2 * torch.randn_like(x))[0].log_softmax(-1)
    still = defense.at(draws)(x)[0].log_softmax(-1)
    apart = (still.exp() * (still - moved)).sum(-1).mean()
    torch.testing.assert_close(found, alone + 3.0 * apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "inner",
    [
        elbo,
        partial(elbo, num_particles=2),
        mixed(elbo, partial(pd.attacks.fgsm, eps=0.1), weight=0.5),
        adversarial(elbo, partial(pd.attacks.fgsm, eps=0.1), bn_stats="clean"),
    ],
)
def test_any_objective_goes_inside(inner):
    defense, (x, y) = defended("bayesian on rse"), tiny_batch()
    attack = partial(pd.attacks.pgd, norm=2, eps=0.3, num_steps=1)
    outer = (consistency(inner, 2, 1.0), smooth_adversarial(inner, attack), stability(inner, 0.1, 1.0))
    for objective in outer:
        loss = objective(defense, x, y, kl_weight=0.1)
        loss.backward()
        assert bool(torch.isfinite(loss))
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in defense.parameters())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: consistency(elbo, 1, 1.0), ValueError, "expected num_samples >= 2"),
        (lambda: consistency(elbo, 2, -1.0), ValueError, "expected weight >= 0"),
        (lambda: consistency(3, 2, 1.0), TypeError, "objective"),
        (lambda: stability(elbo, 0.0, 1.0), ValueError, "expected sigma > 0"),
        (lambda: smooth_adversarial(elbo, pd.attacks.pgd, num_samples=0), ValueError, "num_samples >= 1"),
        (lambda: smooth_adversarial(elbo, 0.1), TypeError, "attack"),
    ],
)
def test_bad_settings_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
