"""SWAG: the covariance of its iterates, by hand and on a quadratic where it is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.training import Checkpoints, History, Swag
from tests.worlds import monte_carlo_tolerance, tiny_batch, tiny_net


def collected(rows, max_rank=20, start=0, every=1):
    """What SWAG makes of given iterates of two weights."""
    defense = pd.deterministic(nn.Linear(1, 2, bias=False))
    swag = Swag(start=start, every=every, max_rank=max_rank)
    swag.begin(defense)
    for epoch, row in enumerate(rows):
        with torch.no_grad():
            defense.net.weight.copy_(row.view(2, 1))
        swag(epoch, History())
    return swag


def covariance_of(defense):
    q = defense.guide.posteriors["weights"]()
    return (torch.diag(q.scale**2) + q.factor @ q.factor.T).detach()


def test_three_iterates_by_hand():
    swag = collected(torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, -2.0]]))
    q = swag.defense().guide.posteriors["weights"]()
    assert q.loc.tolist() == [2.0, 0.0]
    # variances 8/3 and 8/3; deviations from the running means (0, 0), (1, 1), (2, 0)
    torch.testing.assert_close(q.scale.detach() ** 2, torch.tensor([4 / 3, 4 / 3]))
    deviations = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, -2.0]]).T
    torch.testing.assert_close(q.factor.detach(), deviations / 2)


def test_on_a_quadratic_it_has_the_covariance_of_the_iterates():
    """SGD with rate a and noise s on h w^2 / 2: a stationary variance of a s^2 / (h (2 - a h))."""
    hessian, rate, noise = np.array([0.5, 4.0]), 0.2, 0.5
    turn, rng = np.array([[0.8, -0.6], [0.6, 0.8]]), np.random.default_rng(0)
    w, rows = np.zeros(2), []
    for step, slope in enumerate(noise * rng.standard_normal((120_200, 2))):
        w = w - rate * (hessian * w + slope)
        if step >= 200 and step % 20 == 0:
            rows.append(turn @ w)
    known = turn @ np.diag(rate * noise**2 / (hessian * (2 - rate * hessian))) @ turn.T
    swag = collected(torch.tensor(np.stack(rows)).float(), max_rank=6000)
    wanted = torch.tensor((np.diag(known.diagonal()) + known) / 2).float()
    tolerance = 1.2 * monte_carlo_tolerance(known.max() * math.sqrt(2), len(rows))  # some are correlated
    assert float((covariance_of(swag.defense()) - wanted).abs().max()) < tolerance
    assert abs(float(wanted[0, 1])) > 2 * tolerance, "the test has no power"


def test_its_draws_have_that_covariance():
    generator = torch.Generator().manual_seed(1)
    swag = collected(torch.randn(50, 2, generator=generator) @ torch.tensor([[1.0, 0.7], [0.0, 0.3]]))
    defense = swag.defense()
    with torch.no_grad():
        draws = defense(torch.ones(1, 1), 20_000)[:, 0]
    wanted = covariance_of(defense)
    tolerance = monte_carlo_tolerance(float(wanted.max()) * math.sqrt(2), 20_000)
    assert float((draws.T.cov() - wanted).abs().max()) < tolerance


def test_start_every_and_rank_choose_what_is_collected():
    rows = torch.arange(20.0).view(10, 2)
    swag = collected(rows, start=3, every=3, max_rank=2)
    assert swag.count == 3 and len(swag.deviations) == 2
    assert swag.mean.tolist() == rows[[3, 6, 9]].mean(0).tolist()


def test_fit_gives_it_the_defense_first_and_all_weights_become_random():
    net, (x, y) = tiny_net(), tiny_batch()
    swag, defense = Swag(start=1, every=1, max_rank=3), pd.deterministic(net)
    optimizer = torch.optim.SGD(defense.parameters(), lr=0.1)
    pd.fit(defense, [(x, y)], epochs=6, optimizer=optimizer, callbacks=[swag], progress=False)
    made = swag.defense().eval()
    assert swag.count == 5
    assert {n for names in made.sites["weights"].names for n in names} == {
        n for n, _ in net.named_parameters()
    }
    assert not torch.equal(made(x), made(x))
    pd.recalibrate(made, [(x, y)])
    noisy = pd.defenses.rse(made)
    assert next(iter(noisy.sites)) == "weights" and len(noisy.sites) == 3


def test_it_comes_back_from_a_file(tmp_path):
    swag = collected(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    made, x = swag.defense(), torch.rand(3, 1)
    pd.save(made, tmp_path / "swag.safetensors")
    again = pd.load(tmp_path / "swag.safetensors", net=nn.Linear(1, 2, bias=False))
    ours, theirs = (d.freeze(4, torch.Generator().manual_seed(0))(x) for d in (made, again))
    assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_what_was_collected(tmp_path):
    (x, y), states = tiny_batch(), []
    for epochs in ((6,), (3, 6)):
        torch.manual_seed(0)
        folder = tmp_path / str(len(epochs))
        for until in epochs:
            defense, swag = pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 3))), Swag(1, 1, 3)
            with torch.no_grad():
                defense.net[1].weight.fill_(0.1)
                defense.net[1].bias.zero_()
            pd.fit(
                defense,
                [(x, y)],
                epochs=until,
                callbacks=[swag],
                checkpoints=Checkpoints(folder),
                seed=0,
                progress=False,
            )
        states.append(swag.state_dict())
    assert states[0]["count"] == states[1]["count"] == 5
    torch.testing.assert_close(states[0]["mean"], states[1]["mean"])
    torch.testing.assert_close(states[0]["deviations"], states[1]["deviations"])


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="expected at least two collected states, got 1"):
        collected(torch.zeros(1, 2)).defense()
    with pytest.raises(ValueError, match="expected max_rank >= 2"):
        Swag(0, 1, 1)
    with pytest.raises(ValueError, match="found none has begun"):
        Swag(0)(0, History())
