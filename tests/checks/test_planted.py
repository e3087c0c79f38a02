"""Every planted fault is found, or the budget is called too small; refusals and stillness are named."""

import pytest
import torch

import probdefense as pd
from probdefense.checks.refusals import Answering, Tally
from probdefense.checks.results import MORE_BUDGET
from tests.checks.planted import PLANTED, Changed, outcome
from tests.conftest import trained_on_digits

SMALL = {"eps": 0.1, "num_gradients": 32, "num_samples": 4, "num_verdict": 10}


@pytest.fixture(scope="module")
def digits():
    defense, data = trained_on_digits(pd.deterministic, 100)
    return defense.net, data


def test_there_are_thirty_of_them():
    assert len(PLANTED) >= 30


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_not_passed_over(name, digits):
    net, data = digits
    found = pd.checks.run(PLANTED[name].make(net), *data, **SMALL)
    assert outcome(found, PLANTED[name]) != "not found", found.table()
    assert all(check.advice for check in [*found.fired, *found.unsure])


def test_a_function_that_does_not_move_cannot_be_told(digits):
    net, data = digits
    still = pd.deterministic(Changed(net, after=lambda z: 0 * z + torch.arange(10.0)))
    found = pd.checks.run(still, *data, **SMALL)["stable loss"]
    assert found.verdict == "cannot tell" and "does not move" in found.advice
    assert not found.fired and found.evidence["moves"] == 0.0


def test_refusals_are_named(digits):
    net, data = digits
    advice = {
        name: pd.checks.run(PLANTED[name].make(net), *data, **SMALL)["logits"].advice
        for name in ("NaN as a refusal", "a constant as a refusal", "a class for refusals")
    }
    assert "NaN" in advice["NaN as a refusal"]
    assert "constant" in advice["a constant as a refusal"]
    assert "class 10, which is no label" in advice["a class for refusals"]


def test_answers_of_nan_are_counted_and_cannot_be_climbed():
    tally = Tally()

    def half_nan(x, num_samples=None):
        return x.masked_fill(x[:, :1] > 0.5, torch.nan).sqrt().unsqueeze(0)

    x = torch.tensor([[0.9, 0.2], [0.1, 0.3]], requires_grad=True)
    half_nan.stochastic = False
    logits = Answering(half_nan, tally)(x)
    assert torch.equal(logits[0, 0], torch.zeros(2)) and tally.refused == 1 and tally.asked == 2
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert torch.equal(slope[0], torch.zeros(2)) and bool((slope[1] > 0).all())


def test_few_examples_make_a_gap_a_doubt(digits):
    """What a hundred examples show surely, a dozen do not: that is said, and nothing fires."""
    net, (x, y) = digits
    weak = PLANTED["logits over 1e4"].make(net)
    many, few = (pd.checks.run(weak, x[:n], y[:n], **SMALL)["loss plateau"] for n in (100, 12))
    assert many.fired
    assert few.verdict == "cannot tell" and MORE_BUDGET in few.advice, few


def scaled(net, factor):
    return pd.deterministic(Changed(net, after=lambda z: factor * z))


HONEST = {
    "plain": pd.deterministic,
    "half the logits": lambda net: scaled(net, 0.5),
    "twice the logits": lambda net: scaled(net, 2.0),
    "log-probabilities": lambda net: pd.deterministic(Changed(net, after=lambda z: z.log_softmax(-1))),
    "noise on the input": lambda net: pd.defenses.rse(
        net, sigma_init=0.2, sigma_inner=0.0, before_linear=True
    ),
    "noise inside": lambda net: pd.defenses.rse(net, sigma_init=0.1, sigma_inner=0.1, before_linear=True),
    "random weights": lambda net: pd.defenses.bayesian(net, init_scale=0.03),
    "dropout": lambda net: pd.defenses.mc_dropout(net, rate=0.1),
    "a ceiling": lambda net: pd.defenses.brelu(net, ceiling=4.0),
    "a bare callable": lambda net: lambda x: net(x + 0.05 * torch.randn_like(x)).unsqueeze(0),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_nets_fire_nothing(name, digits):
    net, data = digits
    found = pd.checks.run(HONEST[name](net), *data, **SMALL)
    assert found.fired == [], found.table()
