"""Values come late, from keys: the same numbers for any chunks, and memory that draws do not add to."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.core import streams
from probdefense.defenses import bayesian, random_transforms, rse, wca
from tests.worlds import tiny_batch, tiny_net

PEAK = """
import torch, probdefense as pd
torch.set_num_threads(1)
defense = pd.defenses.bayesian(pd.models.resnet18(), num_data=10).eval()
x = torch.rand(1, 3, 32, 32)
defense.mean()(x)
pd.predict(defense, x, {draws})
print(next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line))
"""


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    "build", [bayesian, lambda n: rse(n, before_linear=True), lambda n: rse(bayesian(n), before_linear=True)]
)
@pytest.mark.parametrize("kept", [0, 2**26])
def test_frozen_numbers_are_the_same_in_any_chunks(build, kept, monkeypatch):
    monkeypatch.setattr(streams, "CACHE_BYTES", kept)
    x, defense = torch.rand(5, 1, 4, 4), build(net())
    whole = defense.freeze(6, torch.Generator().manual_seed(3))
    again = defense.freeze(6, torch.Generator().manual_seed(3))
    again.max_batch = 2
    torch.testing.assert_close(whole(x), again(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole(x)[:, 3:], again(x[3:]), rtol=1e-5, atol=1e-5)
    assert whole(x).std(0).min() > 0


def test_a_frozen_function_stays_as_it_is_when_parameters_move(monkeypatch):
    monkeypatch.setattr(streams, "CACHE_BYTES", 0)  # nothing was drawn yet when they move
    x, defense = torch.rand(5, 1, 4, 4), bayesian(net())
    frozen = defense.freeze(3)
    before = frozen(x)
    with torch.no_grad():
        for parameter in defense.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(frozen(x), before, rtol=0, atol=0)


def test_what_is_kept_is_what_would_be_drawn_again(monkeypatch):
    x, defense = torch.rand(5, 1, 4, 4), rse(bayesian(net()), before_linear=True)
    kept = defense.freeze(4, torch.Generator().manual_seed(3))(x)
    monkeypatch.setattr(streams, "CACHE_BYTES", 0)
    torch.testing.assert_close(defense.freeze(4, torch.Generator().manual_seed(3))(x), kept)


@pytest.mark.slow
def test_the_peak_of_a_predictive_does_not_grow_with_draws():
    """Fifty draws of 11 million weights, held at once, would take 2.2 GB."""
    peaks = []
    for draws in (1, 50):
        code = [sys.executable, "-c", PEAK.format(draws=draws)]
        peaks.append(float(subprocess.run(code, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] <= 1.1 * peaks[0]


RECOMPUTED = """
import torch, probdefense as pd
torch.set_num_threads(1)
torch.manual_seed(0)
defense = pd.defenses.rse(pd.models.resnet20()).eval()
x = torch.rand(24, 3, 32, 32, requires_grad=True)
defense.mean()(x[:1].detach())
loss = pd.losses.predictive_cross_entropy(defense.samples({draws}, recompute=True)(x), torch.zeros(24).long())
torch.autograd.grad(loss.sum(), x)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line))
"""


def test_gradients_by_recomputing_are_those_of_the_same_draws():
    x, y = torch.rand(5, 1, 4, 4, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    defense = rse(bayesian(net()), before_linear=True)
    slopes = []
    for draws in ("independent", "antithetic"):
        for recompute in (True, False):
            torch.manual_seed(4)
            if recompute:
                logits = defense.samples(4, draws=draws, recompute=True)(x)
            else:
                logits = defense.drawn(x, 4, seed=int(torch.randint(2**62, ())), draws=draws)
            loss = pd.losses.predictive_cross_entropy(logits, y).sum()
            slopes.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(slopes[0], slopes[1])
    torch.testing.assert_close(slopes[2], slopes[3])
    assert not torch.allclose(slopes[0], slopes[2])


@pytest.mark.slow
def test_the_peak_of_a_recomputed_gradient_is_about_that_of_one_draw():
    peaks = []
    for draws in (1, 16):
        code = [sys.executable, "-c", RECOMPUTED.format(draws=draws)]
        peaks.append(float(subprocess.run(code, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] <= 1.5 * peaks[0]


@pytest.mark.parametrize("made", [rse, bayesian, wca, random_transforms], ids=lambda made: made.__name__)
def test_a_batch_without_examples_has_no_answers(made):
    defense, x = made(tiny_net()), tiny_batch()[0][:0]
    options = ({}, {"draws": "antithetic"}, {"recompute": True}, {"backend": "loop"})
    for logits in (
        *(defense(x, 4, **each) for each in options),
        defense.freeze(4)(x),
        defense(x, 1)[[0] * 4],
    ):
        assert logits.shape == (4, 0, 3)
