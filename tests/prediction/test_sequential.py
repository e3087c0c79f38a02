"""Labels that are settled: how rarely they err, what they cost, and what is left open."""

import pytest
import torch

import probdefense as pd
from probdefense.prediction.sequential import Race
from tests.contract import defended
from tests.worlds import LinearWorld, tiny_batch

COUNT = 4000


def draws_of(kind, count=COUNT, classes=3):
    """A function whose draws have the mean probabilities (.36, .34, .30), in all examples."""
    mean = torch.tensor([0.36, 0.34, 0.30])

    def votes(x, num_samples):
        picked = torch.multinomial(mean, len(x), replacement=True)
        return 50.0 * torch.nn.functional.one_hot(picked, classes).float().unsqueeze(0)

    def soft(x, num_samples):
        return (mean.log() + 0.5 * torch.randn(len(x), classes)).unsqueeze(0)

    def rare(x, num_samples):
        """Class 1 by a little nearly always; class 0 by a lot, rarely enough to mislead, often enough to win."""
        seldom = torch.rand(len(x), 1) < 0.1
        return torch.where(seldom, torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.0, 0.08, -3.0])).unsqueeze(
            0
        )

    return {"votes": votes, "soft": soft, "rare": rare}[kind]


@pytest.mark.parametrize("kind", ["votes", "soft", "rare"])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_a_settled_label_errs_at_most_at_the_level(kind, alpha):
    """Class 0 is the label of infinitely many draws in all three worlds, by design hard to see."""
    found = pd.predict(draws_of(kind), torch.rand(COUNT, 2), 60, alpha=alpha, seed=0)
    wrong = float((found.settled & (found.label != 0)).double().mean())
    assert wrong <= alpha + 4.3 * (alpha * (1 - alpha) / COUNT) ** 0.5


def test_settling_on_the_first_leader_would_err():
    first = pd.predict(draws_of("rare"), torch.rand(COUNT, 2), 5, seed=0).label
    assert float((first != 0).double().mean()) > 0.3, "the world has no power"


def test_the_linear_world_settles_what_is_clear_and_leaves_open_what_is_not():
    world = LinearWorld(slope=50.0, sigma=0.1)
    x, _ = world.points(2000)
    share = world.share_of_one(x)
    found = pd.predict(world.noisy(), x, 50, alpha=0.05, seed=0)
    truth = (share > 0.5).long()
    assert float((found.settled & (found.label != truth)).double().mean()) <= 0.05
    clear, close = (share - 0.5).abs() > 0.4, (share - 0.5).abs() < 0.02
    assert int(close.sum()) > 20 and int(clear.sum()) > 50
    assert float(found.settled[clear].double().mean()) > 0.95
    assert float(found.settled[close].double().mean()) < 0.4
    assert float(found.num_samples[clear].double().mean()) < 15
    assert bool((found.num_samples[~found.settled] == 50).all()) and bool(
        (found.label[~found.settled] == -1).all()
    )


def test_sure_draws_settle_after_as_many_as_a_bet_needs():
    """The first draw bets nothing; at a stake of .95 capital grows by 1.95 until it passes 20."""
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    race = Race(logits, alpha=0.05)
    while len(race.running):
        race.see(logits[: len(race.running)])
    assert race.drawn == 6 and race.label.tolist() == [0]
    small = Race(logits, alpha=0.001)
    while len(small.running):
        small.see(logits)
    assert small.drawn == 12


def test_real_networks_settle_cheaply_and_agree_with_many_draws(random_digits):
    defense, (x, _) = random_digits
    found = pd.predict(defense, x, 50, alpha=0.05, seed=0)
    many = pd.predict(defense, x, 1000, seed=1).label
    assert float(found.num_samples.double().mean()) <= 20
    assert float((~found.settled).double().mean()) < 0.2
    assert float((found.settled & (found.label != many)).double().mean()) <= 0.05


def test_what_is_predicted_is_the_mean_over_the_draws_that_were_seen():
    """Members of an ensemble alternate within a call; single draws are independent, and so is the bet."""
    defense, (x, _) = defended("ensemble"), tiny_batch()
    calls = []

    def watched(x, num_samples):
        calls.append(defense(x, num_samples))
        return calls[-1]

    found = pd.predict(watched, x, 4, alpha=1e-9, seed=0)
    assert found.num_samples.tolist() == [4] * 6 and not bool(found.settled.any())
    assert [len(call) for call in calls] == [1] * 4
    torch.testing.assert_close(found.log_probs, pd.rules.mean_prob(torch.cat(calls)).detach())


def test_a_function_without_randomness_is_settled_by_one_answer():
    defense, (x, _) = defended("deterministic"), tiny_batch()
    found = pd.predict(defense, x, 50, alpha=0.05)
    assert found.num_samples == 1 and bool(found.settled.all())
    assert torch.equal(found.label, defense(x)[0].argmax(-1))


def test_a_seed_fixes_the_race():
    defense, (x, _) = defended("bayesian on rse"), tiny_batch()
    a, b = (pd.predict(defense, x, 20, alpha=0.1, seed=2) for _ in range(2))
    assert torch.equal(a.label, b.label) and torch.equal(a.num_samples, b.num_samples)
    assert torch.equal(a.log_probs, b.log_probs)
