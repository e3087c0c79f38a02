"""The number of draws that share a pass, against the stored measurements."""

import pytest

from probdefense.core.costs import TABLE, Row, draws_at_once


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.net}-{row.random}-{row.batch}")
def test_no_path_is_chosen_that_costs_much_more_than_the_best(row: Row):
    chosen = draws_at_once(row.batch, row.widest, row.random == "weights")
    measured = max(count for count in row.cost if count <= chosen)
    assert row.cost[measured] <= 1.3 * min(row.cost.values())


def test_one_draw_at_a_time_would_not_do_and_neither_would_all():
    for always in (1, 16):
        costs = [row.cost.get(always, max(row.cost.values())) / min(row.cost.values()) for row in TABLE]
        assert max(costs) > 1.5
