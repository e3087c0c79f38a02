"""What decides is finite, has two classes or more, and says so before a number is made of it."""

import math

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.logits.rules import mean_prob, single_draw, vote
from tests.worlds import LinearWorld


class Answers(nn.Module):
    """A network whose answers for some examples are replaced."""

    def __init__(self, value, rows=slice(2, 4), columns=slice(None)):
        super().__init__()
        self.net, self.value, self.rows, self.columns = nn.Linear(4, 3), value, rows, columns

    def forward(self, x):
        logits = self.net(x)
        changed = torch.zeros_like(logits, dtype=torch.bool)
        changed[self.rows, self.columns] = True
        return logits.masked_fill(changed, self.value)


X, Y = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])

JUDGES = {
    "predict": lambda f: pd.predict(f, X),
    "predict, sequential": lambda f: pd.predict(f, X, 20, alpha=0.05),
    "evaluate": lambda f: pd.evaluate(f, (X, Y), rules=[mean_prob]),
    "evaluate, votes": lambda f: pd.evaluate(f, (X, Y), rules=[vote, single_draw]),
    "as_module": lambda f: f.as_module("vote", 3)(X),
    "checks": lambda f: pd.checks.run(f, X, Y, eps=0.1, num_gradients=4, num_samples=2, num_verdict=4),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("noisy", [False, True])
def test_no_number_is_made_of_answers_that_are_none(judge, value, noisy):
    net = Answers(value)
    defense = pd.defenses.rse(net, before_linear=True) if noisy else pd.deterministic(net)
    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite logits in .* for 2 of 6 examples, \[2, 3\]"
    ):
        JUDGES[judge](defense)


def test_a_certificate_is_not_made_of_nan():
    defense = pd.defenses.rse(Answers(math.nan), before_linear=True)
    with pytest.raises(FloatingPointError, match="the votes of a certificate for 2 of 6"):
        pd.certify(defense, X, n0=3, n=20)


def test_a_class_that_is_ruled_out_is_legitimate():
    net = Answers(-math.inf, rows=slice(None), columns=slice(0, 1))
    plain = pd.deterministic(net)
    prediction = pd.predict(plain, X)
    assert bool((prediction.label > 0).all()) and bool(torch.isfinite(prediction.predictive_entropy).all())
    assert float(prediction.probs[:, 0].max()) == 0
    noisy = pd.defenses.rse(net, before_linear=True, sigma_init=0.3)
    sequential = pd.predict(noisy, X, 200, alpha=0.05, seed=0)
    assert bool((sequential.label != 0).all()) and bool(torch.isfinite(sequential.predictive_entropy).all())
    report = pd.evaluate(noisy, (X, Y), {"pgd": pd.attacks.pgd}, rules=[mean_prob, vote], num_samples=9)
    wrong = torch.as_tensor(report.arrays["correct/defense/clean/0/mean_prob"])[0, Y == 0]
    assert not bool(wrong.any())
    assert bool((pd.certify(noisy, X, n0=20, n=200, seed=0).label != 0).all())


SINGLE = {
    "predict": lambda d: pd.predict(d, X),
    "predict, sequential": lambda d: pd.predict(d, X, 9, alpha=0.1),
    "evaluate": lambda d: pd.evaluate(d, (X, torch.zeros(6).long())),
    "certify": lambda d: pd.certify(d, X, n0=3, n=10),
    "fit": lambda d: pd.fit(d, [(X, torch.zeros(6).long())], epochs=1, progress=False),
    "call": lambda d: d(X, 2),
    "freeze": lambda d: d.freeze(2)(X),
    "mean": lambda d: d.mean()(X),
    "attack": lambda d: pd.attacks.pgd(d, X, torch.zeros(6).long(), eps=0.1),
    "checks": lambda d: pd.checks.run(d, X, torch.zeros(6).long(), eps=0.1),
}


@pytest.mark.parametrize("use", SINGLE)
@pytest.mark.parametrize("noisy", [False, True])
def test_one_logit_is_refused_with_the_way_out(use, noisy):
    net = nn.Linear(4, 1)
    defense = pd.defenses.rse(net, before_linear=True) if noisy else pd.deterministic(net)
    if use == "certify" and not noisy:
        return
    with pytest.raises(ValueError, match=r"at least two classes, got 1; .* probdefense.nn.TwoLogits\(net\)"):
        SINGLE[use](defense)


def test_two_logits_are_the_sigmoid_of_one():
    net = nn.Linear(4, 1)
    for shaped in (net, nn.Sequential(net, nn.Flatten(0))):
        probs = pd.predict(pd.deterministic(pd.nn.TwoLogits(shaped)), X).probs
        torch.testing.assert_close(probs[:, 1], torch.sigmoid(net(X)).squeeze(1).detach())
    world = LinearWorld(sigma=0.3)
    one = nn.Linear(world.dims, 1)
    with torch.no_grad():
        one.weight.copy_(world.w.unsqueeze(0))
        one.bias.fill_(float(world.b))
    x, _ = world.points(10)
    both = [
        pd.certify(pd.defenses.rse(n, before_linear=True, sigma_init=0.3), x, n0=50, n=500, seed=0).radius
        for n in (world.net, pd.nn.TwoLogits(one))
    ]
    torch.testing.assert_close(*both)
    with pytest.raises(ValueError, match="expected one logit per example"):
        pd.nn.TwoLogits(nn.Linear(4, 3))(X)


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    "wrap, error, message",
    [
        (lambda z: (z, z), TypeError, r"one float tensor, got tuple; wrap it .* net\(x\)\[0\]"),
        (lambda z: {"logits": z}, TypeError, "got dict"),
        (lambda z: z.argmax(-1), TypeError, "got torch.int64"),
        (lambda z: z.mean(-1), ValueError, r"logits \(6, classes\), got \(6,\)"),
        (lambda z: z.unsqueeze(0), ValueError, r"got \(1, 6, 3\)"),
        (lambda z: z.unflatten(1, (3, 1, 1)), ValueError, r"got \(6, 3, 1, 1\)"),
        (lambda z: z[:2], ValueError, r"got \(2, 3\)"),
    ],
)
def test_what_a_network_returns_is_checked_in_one_place(wrap, error, message):
    defense = pd.deterministic(Wrapped(wrap))
    for use in (
        lambda: defense(X),
        lambda: pd.predict(defense, X),
        lambda: pd.evaluate(defense, (X, Y)),
        lambda: pd.fit(defense, [(X, Y)], epochs=1, progress=False),
        lambda: pd.attacks.fgsm(defense, X, Y, eps=0.1),
        lambda: pd.defenses.bayesian(Wrapped(wrap), num_data=9)(X, 2),
    ):
        with pytest.raises(error, match=message):
            use()
