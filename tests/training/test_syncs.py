"""Loops that do not wait for the device: counted with a CPU that plays one."""

from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from benchmarks.syncs import counted_syncs
from probdefense.validation import watching

X, Y = torch.rand(24, 1, 8, 8), torch.arange(24) % 10


def fit(epochs, defense=None, optimizer=None):
    defense = pd.defenses.bayesian(pd.models.small_cnn(width=2), num_data=24) if defense is None else defense
    loader = [
        (X[k : k + 6], Y[k : k + 6]) for k in range(0, 24, 6)
    ]  # of its own a DataLoader asks for a seed
    return pd.fit(defense, loader, epochs=epochs, progress=False, optimizer=optimizer)


def test_an_epoch_of_training_waits_once():
    few, many = (counted_syncs(lambda n=n: fit(n)) for n in (1, 4))
    assert (many - few) / 3 <= 1


def per_step(attack, **options):
    net = pd.deterministic(pd.models.small_cnn(width=2)).eval()
    y = net(X)[0].argmax(-1)
    few, many = (
        counted_syncs(lambda n=n: attack(net, X, y, num_steps=n, seed=0, **options)) for n in (3, 13)
    )
    return (many - few) / 10


def test_a_step_of_an_attack_does_not_wait():
    assert per_step(pd.attacks.pgd, eps=0.1) == 0
    assert per_step(pd.attacks.mim, eps=0.1) == 0
    assert per_step(pd.attacks.fmn) <= 1


def test_a_random_defense_draws_without_waiting():
    for build in (pd.defenses.rse, pd.defenses.bayesian):
        defense = build(pd.models.small_cnn(width=2)).eval()
        defense(X, 3)
        assert (
            counted_syncs(lambda defense=defense: defense.drawn(X, 3, seed=0)) <= 3
        )  # tiles are on the host


def test_the_counter_counts():
    assert counted_syncs(lambda: bool(X.sum() > 0)) == 1
    assert counted_syncs(lambda: X[X > 2]) == 1


def test_both_ways_give_the_same_numbers():
    torch.manual_seed(0)
    expected = fit(2)
    with mock.patch.object(watching, "immediate", lambda _: False):
        torch.manual_seed(0)
        found = fit(2)
    for name in ("loss", "log_lik", "kl", "accuracy", "grad_norm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_is_not_finite_is_told_at_the_end_of_the_epoch_and_ruins_nothing(fused):
    defense = pd.deterministic(pd.models.small_cnn(width=2))
    optimizer = torch.optim.Adam(defense.param_groups(), lr=1e-3, fused=fused)
    steps = []

    def objective(defense, x, y):
        steps.append(len(x))
        return pd.objectives.elbo(defense, x, y) * (float("nan") if len(steps) == 2 else 1.0)

    loader = DataLoader(TensorDataset(X, Y), 6)
    with (
        mock.patch.object(watching, "immediate", lambda _: False),
        pytest.raises(FloatingPointError, match="became nan in epoch 0, step 1"),
    ):
        pd.fit(defense, loader, epochs=2, objective=objective, optimizer=optimizer, progress=False)
    assert len(steps) == 4
    assert all(torch.isfinite(parameter).all() for parameter in defense.parameters())


def test_an_attack_tells_of_numbers_that_are_not_finite_at_its_end():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).sum(1), (x.flatten(1).sum(1) * 0).sqrt() * 1e30], 1)

    with (
        mock.patch.object(watching, "immediate", lambda _: False),
        pytest.raises(FloatingPointError, match="NaN or infinite gradient in pgd, step 0 for examples"),
    ):
        pd.attacks.pgd(pd.deterministic(Broken()), X[:2], Y[:2] % 2, eps=0.1, num_steps=3)
