"""Intervals hold the truth as often as they say, by simulation in worlds where it is known."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from probdefense.evaluation.intervals import accuracy_interval, holm, mean_spread, wilson

SPEC = importlib.util.spec_from_file_location(
    "coverage_benchmark", Path(__file__).parent.parent.parent / "benchmarks" / "coverage.py"
)
coverage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(coverage)

REPEATS = 500
NOISE = 4.3 * (0.95 * 0.05 / REPEATS) ** 0.5
"""What simulation may add to a coverage, at the common failure rate."""


def bounds(accuracy):
    """Coverage that is promised."""
    return (0.93, 0.97) if 0.1 <= accuracy <= 0.9 else (0.92, 1.0)


@pytest.mark.parametrize("examples", [100, 360, 1000])
def test_wilson_covers_exactly_what_is_promised(examples):
    for accuracy in (0.02, 0.05, *np.linspace(0.1, 0.9, 81), 0.95, 0.98):
        low, high = bounds(accuracy)
        assert low <= coverage.wilson_coverage(accuracy, examples) <= high, accuracy


def test_wilson_by_hand_and_at_the_ends():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    # With no success the bounds are 0 and z^2 / (n + z^2).
    assert wilson(0, 20) == pytest.approx((0, 3.8415 / 23.8415), abs=1e-5)
    assert wilson(20, 20) == pytest.approx((20 / 23.8415, 1), abs=1e-5)


@pytest.mark.parametrize("world", coverage.WORLDS)
@pytest.mark.parametrize("estimand", ["population", "test set"])
def test_intervals_cover_with_shared_and_independent_draws(world, estimand):
    for accuracy in (0.05, 0.3, 0.9):
        low, high = bounds(accuracy)
        found = coverage.interval_coverage(accuracy, (100, 20), world, estimand, REPEATS)
        assert low - NOISE <= found <= high + NOISE, (accuracy, found)


def test_shared_draws_taken_for_independent_ones_do_not_cover():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(REPEATS):
        table, truth, _ = coverage.verdict_table(rng, 0.7, (200, 10), (0.3, 0.2))
        low, high = accuracy_interval(table, crossed=False)
        hits += low <= truth <= high
    assert hits / REPEATS < 0.8


def test_no_interval_is_degenerate_where_there_is_something_to_know():
    for crossed in (False, True):
        for share in (0.0, 1.0):
            low, high = accuracy_interval(np.full((50, 100), share), crossed=crossed)
            assert high - low > 0.03
        table = np.zeros((50, 100))
        table[:, 0] = 1
        low, high = accuracy_interval(table, crossed=crossed)
        assert low < 0.01 < high and high - low > 0.03
    one = np.array([[True, False, True, True]])
    assert accuracy_interval(one, random=False, estimand="test set") == (0.75, 0.75)
    assert accuracy_interval(one) == wilson(3, 4) == accuracy_interval(one.T)


def test_unknown_estimands_are_refused():
    with pytest.raises(ValueError, match="unknown estimand 'all'; known: population, test set"):
        accuracy_interval(np.ones((1, 4)), estimand="all")


def test_the_spread_of_a_table_is_that_of_its_parts():
    """The mean of many tables varies as the spread says, and one row is a plain standard error."""
    rng = np.random.default_rng(0)
    tables = [
        rng.normal(size=(6, 1)) + 2 * rng.normal(size=(1, 30)) + rng.normal(size=(6, 30)) for _ in range(4000)
    ]
    exact = 1 / 6 + 4 / 30 + 1 / 180
    found = np.mean([mean_spread(table, crossed=True).variance for table in tables])
    assert np.var([table.mean() for table in tables]) == pytest.approx(exact, rel=0.1)
    assert found == pytest.approx(exact, rel=0.05)
    assert np.mean([mean_spread(t, crossed=False).variance for t in tables]) < 0.6 * exact
    row = rng.normal(size=(1, 50))
    spread = mean_spread(row, crossed=True)
    assert spread.variance == pytest.approx(row.var(ddof=1) / 50) and spread.dof == 49


def test_a_tie_of_all_rows_is_no_evidence():
    spread = mean_spread(np.zeros((3, 10)), crossed=True)
    assert spread.p_value(0.0) == 1.0 and spread.half_width() == 0.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("trials", [1, 7, 360, 1437.5])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_interval_holds_its_share_to_the_last_bit(share, trials):
    for dof in (math.inf, 2.0, 13.7):
        low, high = wilson(share * trials, trials, dof=dof)
        assert low <= share <= high
