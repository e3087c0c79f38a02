"""When the learning rate moves: by steps or by epochs, and on which loss; against a loop written by hand."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import probdefense as pd
from probdefense.training import PerStep
from tests.worlds import tiny_batch


class Endless(IterableDataset):
    """Two batches, and nobody knows it."""

    def __iter__(self):
        return iter([tiny_batch(4), tiny_batch(4)])


def world():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        defense = pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    return defense, torch.optim.SGD(defense.parameters(), lr=0.1)


def batches():
    return DataLoader(TensorDataset(*tiny_batch(20)), batch_size=8)


def rates_of(make, epochs=4, **options):
    """The learning rate of every step of `fit`."""
    defense, optimizer = world()
    seen = []

    def objective(defense, x, y):
        seen.append(optimizer.param_groups[0]["lr"])
        return pd.objectives.elbo(defense, x, y)

    schedule = make(optimizer)
    pd.fit(
        defense,
        batches(),
        epochs=epochs,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        progress=False,
        **options,
    )
    return seen


def by_hand(make, per_step, epochs=4, watch=lambda epoch: ()):
    """The same by torch alone."""
    _, optimizer = world()
    schedule, seen = make(optimizer), []
    for epoch in range(epochs):
        for _ in range(3):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if per_step:
                schedule.step()
        if not per_step:
            schedule.step(*watch(epoch))
    return seen


@pytest.mark.parametrize(
    ("make", "per_step"),
    [
        (lambda o: rates.OneCycleLR(o, max_lr=1.0, total_steps=12), True),
        (lambda o: rates.OneCycleLR(o, max_lr=1.0, epochs=4, steps_per_epoch=3), True),
        (lambda o: rates.CyclicLR(o, base_lr=0.1, max_lr=1.0, step_size_up=2), True),
        (lambda o: rates.StepLR(o, 1, gamma=0.5), False),
        (lambda o: rates.CosineAnnealingLR(o, 4), False),
        (
            lambda o: rates.SequentialLR(o, [rates.LinearLR(o), rates.ExponentialLR(o, 0.5)], milestones=[2]),
            False,
        ),
        (lambda o: rates.ChainedScheduler([rates.LinearLR(o), rates.ExponentialLR(o, 0.5)]), False),
    ],
)
def test_a_schedule_moves_when_torch_means_it_to(make, per_step):
    expected = by_hand(make, per_step)
    assert rates_of(make) == pytest.approx(expected)
    assert len(set(expected)) > 2


def test_any_schedule_moves_by_steps_when_marked():
    def cosine(optimizer):
        return rates.CosineAnnealingLR(optimizer, 12)

    assert rates_of(lambda o: PerStep(cosine(o))) == pytest.approx(by_hand(cosine, per_step=True))


def test_a_plateau_is_one_of_the_loss_or_of_the_validation():
    def plateau(optimizer):
        return rates.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    falling = rates_of(plateau)
    assert falling == [0.1] * 12, "the loss falls, so the rate stays"
    numbers = iter([1.0, 2.0, 3.0, 2.0])
    watched = rates_of(plateau, validation=lambda defense: next(numbers))
    assert watched == by_hand(plateau, False, watch=lambda epoch: [(1.0, 2.0, 3.0, 2.0)[epoch]])
    assert watched == [0.1] * 6 + [0.05] * 3 + [0.025] * 3


def test_a_plateau_may_wait_for_an_accuracy():
    shares = iter([0.1, 0.2, 0.2, 0.2])
    seen = rates_of(
        lambda o: rates.ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0),
        validation=lambda defense: next(shares),
    )
    assert seen == [0.1] * 9 + [0.05] * 3


def test_validation_is_recorded_and_sees_evaluation_mode():
    defense, optimizer = world()
    modes = []

    def validate(defense):
        modes.append((defense.training, defense.net.training))
        return torch.tensor(len(modes))

    history = pd.fit(
        defense, batches(), epochs=2, optimizer=optimizer, validation=validate, progress=False, seed=0
    )
    assert history.validation == [1.0, 2.0] and modes == [(False, False)] * 2
    assert defense.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: rates.OneCycleLR(o, 1.0, total_steps=4), "12 steps left, .* got 4; .*total_steps=12"),
        (lambda o: rates.StepLR(world()[1], 1), "StepLR moves the rate of another optimizer"),
        (lambda o: PerStep(rates.StepLR(world()[1], 1)), "StepLR moves the rate of another optimizer"),
        (lambda o: rates.ReduceLROnPlateau(o, mode="max"), "expected ReduceLROnPlateau with mode='min'"),
        (lambda o: rates.StepLR, "expected schedule as a torch learning-rate scheduler, got type"),
        (lambda o: o, "expected schedule as a torch learning-rate scheduler, got SGD"),
        (lambda o: "cosine", "expected schedule as a torch learning-rate scheduler, got str 'cosine'"),
        (lambda o: lambda epoch: 0.1, "expected schedule as a torch learning-rate scheduler, got function"),
    ],
)
def test_schedules_that_would_not_work_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rates_of(make)


def test_a_cycle_of_an_optimizer_that_is_not_passed_and_one_without_a_length():
    defense, optimizer = world()
    schedule = rates.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="pass the one that it was made for as optimizer="):
        pd.fit(defense, batches(), epochs=1, schedule=schedule)
    cycle = rates.OneCycleLR(optimizer, 1.0, total_steps=4)
    loader = DataLoader(Endless(), batch_size=None)
    with pytest.raises(
        ValueError, match="OneCycleLR needs the number of steps, and this loader has no length"
    ):
        pd.fit(defense, loader, epochs=1, optimizer=optimizer, schedule=cycle)
    pd.fit(defense, loader, epochs=2, optimizer=optimizer, schedule=PerStep(schedule), progress=False)
    assert schedule.last_epoch == 4
