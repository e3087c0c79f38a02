"""Smaller types, other layouts and compiled networks: the numbers of the plain path."""

import copy
from functools import partial

import pytest
import torch

import probdefense as pd
from probdefense.defenses import bayesian, rse
from tests.worlds import tiny_batch, tiny_net

BUILDS = [rse, partial(bayesian, num_data=6), lambda net: rse(bayesian(net, num_data=6)), pd.deterministic]


@pytest.mark.parametrize("build", BUILDS)
def test_an_evaluation_in_bfloat16_gives_nearly_the_same_numbers(build):
    defense, data = build(tiny_net()).eval(), tiny_batch(6)
    attacks = {"pgd": partial(pd.attacks.pgd, num_steps=2)}
    plain, cast = (
        pd.evaluate(defense, data, attacks, eps=0.1, num_samples=4, amp=amp) for amp in (None, torch.bfloat16)
    )
    probs = [r.arrays.at("log_probs", "defense", "clean", 0.0) for r in (plain, cast)]
    assert probs[1].dtype == probs[0].dtype
    assert 0 < abs(probs[0] - probs[1]).max() < 0.05
    assert cast.settings["amp"] == "bfloat16" and "amp" not in plain.settings


def test_an_attack_in_bfloat16_asks_in_it_and_climbs_in_double(monkeypatch):
    seen = []
    defense, (x, y) = rse(tiny_net()).eval(), tiny_batch(6)
    layer = next(m for m in defense.net.modules() if isinstance(m, torch.nn.Linear))
    layer.register_forward_hook(lambda *args: seen.append(args[2].dtype))

    def loss(logits, y):
        seen.append(logits.dtype)
        return pd.losses.expected_cross_entropy(logits, y)

    points = pd.attacks.pgd(defense, x, y, eps=0.1, num_steps=2, loss=loss, amp=torch.bfloat16)
    assert torch.bfloat16 in seen and torch.float64 in seen and points.dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected amp=torch\.bfloat16 or None"):
        pd.attacks.pgd(defense, x, y, eps=0.1, amp=torch.float16)


def test_a_pass_that_is_run_again_is_run_in_the_same_type():
    defense, (x, _) = rse(tiny_net()).eval(), tiny_batch(4)
    slopes = []
    for size in (None, 1):
        point = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = defense.drawn(point, 2, seed=0, max_batch=size)
        slopes.append(torch.autograd.grad(logits.float().sum(), point)[0])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("build", BUILDS)
def test_the_layout_with_channels_last_stays_and_gives_the_same_numbers(build):
    net = tiny_net()
    defense, (x, _) = build(net).eval(), tiny_batch(4)
    x = x.expand(-1, 1, -1, -1)
    expected = defense.freeze(3, torch.Generator().manual_seed(0))(x)
    other = copy.deepcopy(defense).to(memory_format=torch.channels_last)
    layouts = []
    for module in other.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    found = other.freeze(3, torch.Generator().manual_seed(0))(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)
    assert layouts


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_a_compiled_network_gives_the_same_numbers(build):
    torch._dynamo.reset()
    defense, (x, y) = build(tiny_net()), tiny_batch(6)
    plain = copy.deepcopy(defense)
    assert defense.compile(backend="aot_eager") is defense
    for one in (defense, plain):
        one.eval()
    generator = partial(torch.Generator().manual_seed, 0)
    torch.testing.assert_close(defense.freeze(3, generator())(x), plain.freeze(3, generator())(x))
    steps = []
    for one in (defense, plain):
        torch.manual_seed(1)
        loss = pd.objectives.elbo(one.train(), x, y)
        loss.backward()
        steps.append([loss.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    for found, expected in zip(*steps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    points = [pd.attacks.pgd(one.eval(), x, y, eps=0.1, num_steps=2, seed=0) for one in (defense, plain)]
    torch.testing.assert_close(*points)
    assert copy.deepcopy(defense).model.compiled.function is None


def test_own_programs_are_not_compiled():
    from pyro.nn import PyroModule

    class Own(PyroModule):
        def forward(self, x, y=None):
            return x

    with pytest.raises(ValueError, match="samples while it computes"):
        pd.core.Defense(Own(), Own()).compile()
