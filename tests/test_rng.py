"""Keyed random numbers: right distributions, no dependence on the rest of the batch."""

import math

import pytest
import torch
from scipy import stats

from probdefense.rng import Stream, derive, forked, hash_keys, reseed
from tests.worlds import FAILURE_RATE


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (lambda s: s.uniform((50,)), stats.uniform),
        (lambda s: s.normal((50,)), stats.norm),
        (lambda s: s.integers(5, (50,)).double() / 5 + s.uniform((50,)).double() / 5, stats.uniform),
    ],
)
def test_goodness_of_fit(draw, distribution):
    numbers = draw(Stream(torch.arange(400))).flatten().double().numpy()
    assert stats.kstest(numbers, distribution.cdf).pvalue > FAILURE_RATE
    assert stats.kstest(1.1 * numbers, distribution.cdf).pvalue < FAILURE_RATE, "the test has no power"


def test_numbers_of_neighbors_are_unrelated():
    numbers = Stream(torch.arange(2000)).normal((20,)).double()
    across_keys = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    across_places = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1]
    limit = 4.3 / math.sqrt(numbers.numel())
    assert abs(float(across_keys)) < limit and abs(float(across_places)) < limit


def test_calls_and_splits_give_new_numbers():
    stream = Stream(torch.arange(3))
    first, second = stream.uniform((4,)), stream.uniform((4,))
    other = Stream(torch.arange(3)).split("other").uniform((4,))
    assert not torch.equal(first, second) and not torch.equal(first, other)


def test_subsets_see_the_same_numbers():
    everything = Stream(hash_keys(1, torch.arange(10))).normal((2, 3))
    some = Stream(hash_keys(1, torch.arange(10))).take(torch.tensor([3, 7])).normal((2, 3))
    assert torch.equal(everything[[3, 7]], some)


@pytest.mark.parametrize("seed", [5, torch.arange(4), torch.Generator().manual_seed(1), None])
def test_seeds_of_every_kind(seed):
    assert Stream.of(seed, torch.zeros(4, 2)).uniform().shape == (4,)


def test_one_seed_per_example_or_a_clear_error():
    with pytest.raises(ValueError, match="one seed per example"):
        Stream.of(torch.arange(3), torch.zeros(4, 2))


def test_forked_leaves_the_global_state():
    before = torch.get_rng_state()
    with forked(3):
        torch.rand(10)
    assert torch.equal(before, torch.get_rng_state())


def test_derived_seeds_differ_by_every_part_of_the_path():
    paths = [("a",), ("b",), ("ab",), ("a", "b"), ("a", 0), ("a", 1), (0, "a"), (0, 1), (1, 0)]
    assert len({derive(0, *path) for path in paths} | {derive(1, "a")}) == len(paths) + 1
    assert all(0 <= derive(seed, "x") < 2**62 for seed in (0, -5, 2**70))


def test_reseeding_is_manual_seed_on_the_cpu():
    reseed(5)
    fast = torch.randn(3)
    torch.manual_seed(5)
    assert torch.equal(fast, torch.randn(3))
