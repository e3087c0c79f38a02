"""Averages of weights: against averages by hand, for every builder, and what is refused."""

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense import training
from probdefense.training.averages import Average
from tests.contract import BUILDERS, defended
from tests.worlds import tiny_batch, tiny_net


class Walk(torch.optim.SGD):
    """Keeps the weights after every step."""

    def __init__(self, defense):
        super().__init__(defense.parameters(), lr=0.1)
        self.steps = []

    def step(self, closure=None):
        super().step(closure)
        self.steps.append([p.detach().clone() for group in self.param_groups for p in group["params"]])


def batches(size=50):
    """Three batches."""
    x, y = tiny_batch(size)
    return list(zip(x.split(size // 3 + 1), y.split(size // 3 + 1), strict=True))


def walk(defense, average, epochs=4, **options):
    """Trains and returns the weights after every step."""
    optimizer = Walk(defense)
    pd.fit(
        defense,
        batches(),
        epochs=epochs,
        optimizer=optimizer,
        average=average,
        seed=0,
        progress=False,
        **options,
    )
    return optimizer.steps


def by_hand(steps, shares):
    """The average of each weight, one after the other."""
    mean = [w.double() for w in steps[0]]
    for step, share in zip(steps[1:], shares, strict=True):
        mean = [(1 - share) * m + share * w for m, w in zip(mean, step, strict=True)]
    return mean


def assert_weights(defense, wanted):
    for found, value in zip(defense.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.double(), value.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_defense_ends_at_the_exponential_average_of_its_steps(builder):
    defense = defended(builder)
    steps = walk(defense, training.ema(0.7))
    assert_weights(defense, by_hand(steps, [max(0.3, 9 / (9 + t)) for t in range(2, 13)]))
    assert any(not torch.equal(p, w) for p, w in zip(defense.parameters(), steps[-1], strict=True))


def test_a_long_average_of_a_short_training_is_not_where_it_began():
    shares = [Average(0.9999).share(count) for count in (2, 91, 991)]
    assert shares == pytest.approx([9 / 11, 0.09, 0.009])


def test_swa_is_the_plain_average_of_the_last_epochs():
    defense = pd.defenses.bayesian(tiny_net(), num_data=50)
    steps = walk(defense, training.swa(1))
    assert_weights(defense, [sum(kept) / 3 for kept in zip(*(steps[i] for i in (5, 8, 11)), strict=True)])


@pytest.mark.parametrize("average", [training.ema(0.7), training.swa(2)])
def test_the_walk_itself_is_the_same(average):
    plain, averaged = (pd.defenses.rse(tiny_net(), scale="learned") for _ in range(2))
    averaged.load_state_dict(plain.state_dict())
    for a, b in zip(walk(plain, None), walk(averaged, average), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_validation_and_callbacks_see_the_average():
    defense, seen = pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 3))), []

    def look(*_):
        seen.append([p.detach().clone() for p in defense.parameters()])
        return 0.0

    steps = walk(defense, training.swa(1), epochs=3, validation=look, callbacks=[look])
    assert all(torch.equal(p, w) for k in (0, 1) for p, w in zip(seen[k], steps[2], strict=True))  # none yet
    for last in seen[4:]:
        for p, a, b in zip(last, steps[5], steps[8], strict=True):
            torch.testing.assert_close(p, (a + b) / 2)
    assert len(seen) == 6
    assert_weights(defense, seen[-1])


def test_running_statistics_are_averaged_and_counters_kept():
    defense, found = pd.deterministic(tiny_net()), []
    norm = next(m for m in defense.modules() if isinstance(m, nn.BatchNorm2d))
    hook = norm.register_forward_hook(lambda *_: found.append(norm.running_mean.clone()))
    walk(defense, training.swa(0), epochs=2)
    hook.remove()
    torch.testing.assert_close(norm.running_mean, (found[2] + found[5]) / 2)
    assert int(norm.num_batches_tracked) == 6


def test_an_interrupted_training_keeps_its_last_weights():
    defense = pd.deterministic(tiny_net())
    optimizer = Walk(defense)

    def stop(epoch, history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pd.fit(defense, batches(), epochs=2, optimizer=optimizer, average=training.ema(), callbacks=[stop])
    assert all(torch.equal(p, w) for p, w in zip(defense.parameters(), optimizer.steps[-1], strict=True))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: training.ema(1.0), ValueError, "expected 0 < decay < 1"),
        (lambda: training.ema(0), ValueError, "expected decay > 0"),
        (lambda: training.ema("much"), TypeError, "expected decay as a number"),
        (lambda: training.swa(-1), ValueError, "expected start >= 0"),
        (lambda: training.swa(1.5), TypeError, "start"),
        (
            lambda: 0.99,
            TypeError,
            r"expected average=training.ema\(decay\) or training.swa\(start\), got float",
        ),
        (lambda: training.ema, TypeError, "got function"),
        (lambda: training.swa(2), ValueError, "got start=2 of 2 epochs"),
    ],
)
def test_no_average_is_refused_before_any_work(make, error, match):
    defense = pd.deterministic(tiny_net())
    before = [p.detach().clone() for p in defense.parameters()]
    with pytest.raises(error, match=match):
        pd.fit(defense, batches(), epochs=2, average=make(), progress=False)
    assert all(torch.equal(p, q) for p, q in zip(before, defense.parameters(), strict=True))
