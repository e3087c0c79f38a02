"""The same numbers on a GPU, and on it no waiting; skipped where there is none."""

import copy

import pytest
import torch

import probdefense as pd
from probdefense.defenses import bayesian, ensemble, rse
from tests.worlds import tiny_batch, tiny_net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BUILDS = [
    rse,
    lambda net: bayesian(net, num_data=6),
    lambda net: ensemble([net, tiny_net()]),
    pd.deterministic,
]


@pytest.mark.parametrize("build", BUILDS)
def test_given_draws_give_the_same_logits(build):
    defense, (x, _) = build(tiny_net()).eval(), tiny_batch(6)
    there = copy.deepcopy(defense).cuda()
    draws = defense.draw(x)
    moved = {name: value.cuda() if value.is_floating_point() else value for name, value in draws.items()}
    expected, found = defense.at(draws)(x), there.at(moved)(x.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there.mean()(x.cuda()).cpu(), defense.mean()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", BUILDS)
def test_draws_of_a_key_are_the_same_in_any_passes(build):
    defense, (x, _) = build(tiny_net()).eval().cuda(), tiny_batch(6)
    x = x.cuda()
    whole = defense.drawn(x, 4, seed=1)
    torch.testing.assert_close(defense.drawn(x, 4, seed=1, max_batch=2), whole, rtol=1e-3, atol=1e-4)
    frozen = defense.freeze(3)
    torch.testing.assert_close(frozen(x)[:, 2:], frozen(x[2:]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", BUILDS)
def test_training_attacks_and_evaluation_run(build):
    defense, (x, y) = build(tiny_net()).cuda(), tiny_batch(6)
    history = pd.fit(defense, [(x, y)], epochs=2, progress=False)
    assert len(history.loss) == 2 and all(isinstance(value, float) for value in history.loss)
    data = (x.cuda(), y.cuda())
    report = pd.evaluate(defense.eval(), data, {"pgd": pd.attacks.pgd}, eps=0.1, num_samples=4)
    assert report.rows


def test_a_call_and_its_gradient_do_not_wait():
    defense, (x, y) = rse(tiny_net()).eval().cuda(), tiny_batch(6)
    x, y = x.cuda(), y.cuda()
    pd.attacks.pgd(defense.samples(2), x, y, eps=0.1, num_steps=2)
    logits_fn = defense.samples(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits_fn(x.requires_grad_()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
