"""Accuracy against queries and answers: budgets are kept, rows name them, and the curve of answers is exact."""

import itertools
import math

import numpy as np
import pytest
import torch

import probdefense as pd
from probdefense.evaluation.queries import query_curve, resubmission_curve
from tests.worlds import LinearWorld

BUDGETS = [20, 80, 320]


@pytest.fixture(scope="module")
def noisy():
    world = LinearWorld(sigma=0.05)
    x, y = world.points(40)
    attacks = {
        "square": pd.attacks.square,
        "averaged": pd.with_draws(pd.attacks.square, 2),
        "fgsm": pd.attacks.fgsm,
    }
    report = pd.evaluate(world.noisy(), (x, y), attacks, eps=0.1, num_samples=20, max_queries=BUDGETS, seed=3)
    return world, (x, y), report


def test_every_budget_has_its_rows(noisy):
    report = noisy[2]
    asked = {row["attack"]: row.get("max_queries") for row in report.rows}
    assert asked == {
        "clean": None,
        **{f"{name}@{n}": n for name in ("square", "averaged") for n in BUDGETS},
        "fgsm": None,
        "worst": None,
    }


def test_no_attack_asks_more_than_its_budget(noisy):
    for row in noisy[2].rows:
        if "max_queries" in row:
            assert 0 < row["queries"] <= row["max_queries"] * row["num_examples"]
            assert row["attack_samples"] == (2 if row["attack"].startswith("averaged") else 1)


def test_more_queries_leave_less(noisy):
    for name in ("square", "averaged"):
        curve = query_curve(noisy[2], name, "single_draw")
        assert [row["max_queries"] for row in curve] == [0, *BUDGETS]
        assert curve[0]["accuracy"] > curve[-1]["accuracy"] + 0.1


def test_a_budget_alone_gives_the_same_row(noisy):
    world, data, report = noisy
    alone = pd.evaluate(
        world.noisy(), data, {"square": pd.attacks.square}, eps=0.1, num_samples=20, max_queries=[80], seed=3
    )
    wanted = {"attack": "square@80", "rule": "mean_prob"}
    assert alone.row(**wanted) == report.row(**wanted)


def test_reports_of_shards_keep_the_budget(noisy):
    world, (x, y), _ = noisy
    shards = [
        pd.evaluate(
            world.noisy(),
            (x[i : i + 20], y[i : i + 20]),
            {"square": pd.attacks.square},
            eps=0.1,
            num_samples=4,
            max_queries=[30],
            chunk_size=20,
            first=i,
        )
        for i in (0, 20)
    ]
    assert query_curve(pd.Report.merge(shards), "square", "mean_prob")[1]["max_queries"] == 30


def test_the_curve_of_answers_is_the_share_of_right_tuples(noisy):
    report = noisy[2]
    table = report.arrays.at("correct", "defense", "square@320", 0.1, "single_draw").astype(bool)[:6]
    report.arrays["correct/defense/square@320/0.1/single_draw"] = table
    for row in resubmission_curve(report, "square@320", answers=(1, 2, 3, 6, 9)):
        tuples = [table[list(each)].all(0) for each in itertools.combinations(range(6), row["answers"])]
        assert row["accuracy"] == pytest.approx(np.mean(tuples))
        assert row["low"] - 1e-9 <= row["accuracy"] <= row["high"]


def test_answers_of_a_known_world(noisy):
    """Each answer to a point errs by itself with the closed probability."""
    world, (x, y), report = noisy
    right = torch.where(y == 1, world.share_of_one(x), 1 - world.share_of_one(x)).double()
    for row in resubmission_curve(report, "clean", answers=(1, 2, 4)):
        exact = float((right ** row["answers"]).mean())
        spread = math.sqrt(float((right * (1 - right)).sum())) * row["answers"] / len(y) / math.sqrt(20)
        assert abs(row["accuracy"] - exact) < 5 * spread + 1e-3


def test_budgets_without_an_attack_by_queries_are_refused():
    world = LinearWorld()
    with pytest.raises(ValueError, match="expected an attack that takes max_queries, .* got fgsm"):
        pd.evaluate(world.plain(), world.points(4), {"fgsm": pd.attacks.fgsm}, max_queries=[10])
    with pytest.raises(TypeError, match="max_queries"):
        pd.evaluate(world.plain(), world.points(4), {"square": pd.attacks.square}, max_queries=10)


def test_the_curve_is_drawn(noisy):
    from matplotlib import pyplot

    ax = pd.analysis.accuracy_against_queries(noisy[2], "square", rule="single_draw")
    drawn = ax.lines[0].get_xydata()
    curve = query_curve(noisy[2], "square", "single_draw")
    assert drawn[:, 0].tolist() == [1, *BUDGETS] and drawn[:, 1].tolist() == [
        row["accuracy"] for row in curve
    ]
    pyplot.close(ax.figure)


def test_an_attack_with_the_name_of_another_and_its_budget_is_refused():
    data, net = (torch.rand(4, 4), torch.zeros(4).long()), pd.deterministic(torch.nn.Linear(4, 3))
    for attacks in (
        {"square": pd.attacks.square, "square@5": pd.attacks.fgsm},
        {"square@5": pd.attacks.fgsm, "square": pd.attacks.square},
    ):
        with pytest.raises(ValueError, match="differ from those of budgets, got 'square@5'"):
            pd.evaluate(net, data, attacks, max_queries=[5])


def test_answers_are_several_numbers():
    defense = pd.defenses.rse(torch.nn.Linear(4, 3), before_linear=True)
    report = pd.evaluate(defense, (torch.rand(4, 4), torch.zeros(4).long()), num_samples=4)
    with pytest.raises(TypeError, match="expected answers as list"):
        resubmission_curve(report, "clean", answers=3)
