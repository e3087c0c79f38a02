"""`compare`: paired differences, what they are about, and how sure one can be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.evaluation.comparison import paired
from probdefense.evaluation.report import Report
from tests.evaluation.test_intervals import coverage


def report(correct, name="a", seed=0, rule="mean_prob", labels=None, **settings):
    """A report of the given verdicts ``(verdicts, batch)`` on clean inputs."""
    correct = np.atleast_2d(np.asarray(correct, dtype=bool))
    rows = [{"defense": name, "attack": "clean", "eps": 0.0, "rule": rule, "num_examples": correct.shape[1]}]
    labels = np.zeros(correct.shape[1], dtype=int) if labels is None else labels
    arrays = {f"labels/{name}": labels, f"correct/{name}/clean/0/{rule}": correct}
    settings = {"norm": "inf", "num_samples": 50, "seed": seed, "estimand": "population", **settings}
    return Report(rows, settings, arrays)


def bits(share, count, seed=0, rows=1):
    return np.random.default_rng(seed).random((rows, count)) < share


def test_one_pair_by_hand():
    """10 of 100 examples favor A, 4 favor B: with a pseudo-example for each the mean is 6 / 102."""
    a = np.zeros(100, dtype=bool)
    b = a.copy()
    a[:10], b[10:14] = True, True
    row = pd.compare(report(a, "a"), report(b, "b")).rows[0]
    differences = np.concatenate([a.astype(float) - b, [1, -1]])
    error = differences.std(ddof=1) / 102**0.5
    half = 1.98373 * error  # Student's quantile with 101 degrees of freedom
    assert row["difference"] == pytest.approx(0.06)
    assert (row["low"], row["high"]) == pytest.approx((6 / 102 - half, 6 / 102 + half), rel=1e-4)
    assert row["accuracy_a"] == pytest.approx(0.1) and row["accuracy_b"] == pytest.approx(0.04)
    assert row["p"] == pytest.approx(2 * (1 - row["probability"])) and row["p_holm"] == row["p"]
    assert 0.9 < row["probability"] < 0.96


def test_a_defense_beside_itself_is_a_tie_that_is_not_certain():
    one = report(bits(0.7, 200))
    row = pd.compare(one, one).rows[0]
    assert (
        row["difference"] == 0 and row["probability"] == pytest.approx(0.5) and row["p"] == pytest.approx(1)
    )
    assert row["low"] == -row["high"] and 0 < row["high"] < 0.03


def test_a_report_given_twice_is_not_two_seeds():
    """Two copies look like two trainings that agree, with the narrowest interval there is."""
    data = torch.rand(20, 4), torch.randint(3, (20,))
    a, b, again = (
        pd.evaluate(pd.deterministic(net), data, name=name)
        for net, name in zip([nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)], "aba", strict=True)
    )
    copy = replace(a, rows=[dict(row) for row in a.rows])
    for twice in ([a, a], [a, copy], [a, again, copy]):
        with pytest.raises(ValueError, match="got the same report twice; give each once"):
            pd.compare(twice, [b] * len(twice))
    with pytest.raises(ValueError, match="training of a, b, got the same report twice"):
        pd.compare_all([a + b, a + b])
    assert pd.compare([a, again], [again, a]).rows[0]["difference"] == 0


def test_pairing_sees_what_two_intervals_do_not():
    base = bits(0.5, 300)
    better = base | bits(0.12, 300, seed=1)
    a, b = report(better, "a"), report(base, "b")
    row = pd.compare(a, b).rows[0]
    assert row["low"] > 0 and row["probability"] > 0.999
    shuffled = report(np.random.default_rng(3).permuted(base, axis=1), "b")
    assert pd.compare(a, shuffled).rows[0]["low"] < row["low"]


def test_one_seed_is_about_networks_and_several_about_methods():
    sides = [
        [report(bits(p, 80, seed), name, seed) for seed in range(4)] for name, p in (("a", 0.8), ("b", 0.5))
    ]
    one, several = pd.compare(sides[0][0], sides[1][0]), pd.compare(*sides)
    assert one.scope.startswith("one training seed: about these networks, not these methods")
    assert several.scope == "4 training seeds: about these methods, trained anew"
    assert one.table().startswith(one.scope) and several.rows[0]["num_seeds"] == 4
    sure = replace(one, rows=[row | {"p_holm": 1e-24, "probability": 1 - 1e-9} for row in one.rows])
    assert "< 0.001  > 0.999" in sure.table() and "<td>&lt; 0.001</td><td>&gt; 0.999" in sure._repr_html_()
    assert several.rows[0]["high"] - several.rows[0]["low"] < one.rows[0]["high"] - one.rows[0]["low"]


def test_seeds_that_disagree_widen_the_interval_beyond_the_examples():
    """Every network is 10 points better or worse on all images: 4 seeds, not 400 images, are the sample."""

    def side(name, shares):
        return [report(np.arange(100) < share, name, seed) for seed, share in enumerate(shares)]

    row = pd.compare(side("a", (80, 60, 80, 60)), side("b", (65, 65, 65, 65))).rows[0]
    assert row["high"] - row["low"] > 0.25
    steady = pd.compare(side("a", (70, 70, 70, 70)), side("b", (65, 65, 65, 65))).rows[0]
    assert steady["difference"] == pytest.approx(row["difference"])
    assert steady["high"] - steady["low"] < 0.15


def test_shared_draws_of_one_seed_take_the_place_of_seeds():
    draws = bits(0.5, 60, rows=20)
    row = pd.compare(
        report(draws, "a", rule="single_draw"), report(draws[:, ::-1], "b", rule="single_draw")
    ).rows[0]
    one = pd.compare(
        report(draws, "a", rule="single_draw"), report(bits(0.5, 60, 5), "b", rule="single_draw")
    )
    assert row["num_examples"] == 60 and -1 < row["low"] < row["high"] < 1
    assert one.rows[0]["difference"] == pytest.approx(draws.mean() - bits(0.5, 60, 5).mean())


def test_the_interval_covers_where_seeds_and_examples_are_both_samples():
    rng, hits, repeats = np.random.default_rng(0), np.zeros(2), 600
    for _ in range(repeats):
        table, truth = coverage.difference_table(rng, seeds=5, spread=0.15)
        center, found = paired(table)
        single = paired(table.mean(0, keepdims=True))[1]
        hits += [abs(center - truth) <= spread.half_width() for spread in (found, single)]
    assert hits[0] / repeats > 0.92 - 0.04
    assert hits[1] / repeats < 0.85, "seeds must count"


def test_the_posterior_probability_is_uniform_where_nothing_differs():
    found = []
    for seed in range(600):
        center, spread = paired(bits(0.4, 80, seed).astype(float) - bits(0.4, 80, 1000 + seed))
        found.append(1 - spread.p_value(center))
    for level in (0.1, 0.5, 0.9):
        tolerance = 4.3 * (level * (1 - level) / 600) ** 0.5
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=tolerance)


def test_all_pairs_are_adjusted_together():
    names = ("a", "b", "c")
    reports = [
        report(bits(share, 100, i), name)
        for i, (name, share) in enumerate(zip(names, (0.6, 0.6, 0.9), strict=True))
    ]
    total = reports[0] + reports[1] + reports[2]
    found = pd.compare_all(total)
    assert [(row["a"], row["b"]) for row in found.rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(row["p_holm"] >= row["p"] for row in found.rows)
    assert max(row["p_holm"] / row["p"] for row in found.rows) > 2
    with pytest.raises(ValueError, match="unknown rule 'vote'; known: mean_prob"):
        pd.compare_all(total, rule="vote")
    with pytest.raises(ValueError, match="at least two defenses, got 1"):
        pd.compare_all(total.only("a"))


def test_real_reports_compare_on_every_row_that_they_share():
    data = torch.rand(30, 4), torch.randint(3, (30,))
    nets = [pd.deterministic(nn.Linear(4, 3)), pd.defenses.bayesian(nn.Linear(4, 3))]
    a, b = (
        pd.evaluate(net, data, {"fgsm": pd.attacks.fgsm}, name=name, num_samples=10)
        for net, name in zip(nets, "ab", strict=True)
    )
    rows = pd.compare(a, b).rows
    assert [(r["attack"], r["rule"]) for r in rows] == [(r["attack"], r["rule"]) for r in a.rows]
    for row in rows:
        where = {"attack": row["attack"], "rule": row["rule"]}
        assert row["difference"] == pytest.approx(a.row(**where)["accuracy"] - b.row(**where)["accuracy"])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([report(bits(0.5, 9))], [], "expected one report per seed on both sides, got 1 and 0"),
        (report(bits(0.5, 9)), report(bits(0.5, 9), seed=1), "cannot be paired: seed differ"),
        (report(bits(0.5, 9)), report(bits(0.5, 9), num_samples=1), "cannot be paired: num_samples differ"),
        (report(bits(0.5, 9)), report(bits(0.5, 9), labels=np.arange(9)), "they are about other examples"),
        (report(bits(0.5, 9)), report(bits(0.5, 9), rule="vote"), "share no attack, eps and rule"),
        (report(bits(0.5, 9)) + report(bits(0.5, 9), "b"), report(bits(0.5, 9)), "pick one with report.only"),
    ],
)
def test_reports_that_do_not_belong_together_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        pd.compare(a, b)


def test_two_seeds_are_widened_until_they_cover():
    """They covered 87 % with the degrees of freedom of more."""
    rng, hits, widths = np.random.default_rng(1), 0, {2: [], 3: []}
    for _ in range(600):
        table, truth = coverage.difference_table(rng, seeds=2, spread=0.15)
        center, spread = paired(table)
        hits += abs(center - truth) <= spread.half_width()
        widths[2].append(spread.half_width())
        widths[3].append(paired(coverage.difference_table(rng, seeds=3, spread=0.15)[0])[1].half_width())
    assert 0.90 < hits / 600 < 0.99
    assert np.median(widths[2]) > 2 * np.median(widths[3]), (
        "a third seed is worth more than half of the width"
    )


def test_rows_say_how_far_seeds_are_apart_and_what_they_are_about():
    sides = [
        [report(np.arange(100) < share, name, seed) for seed, share in enumerate(shares)]
        for name, shares in (("a", (70, 90)), ("b", (60, 60)))
    ]
    two, one = pd.compare(*sides), pd.compare(sides[0][0], sides[1][0])
    assert two.rows[0]["seed_spread"] == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert one.rows[0]["seed_spread"] is None and two.rows[0]["estimand"] == "population"
    assert two.scope.startswith("2 training seeds: about these methods") and "give three or more" in two.scope


def test_equal_labels_of_other_examples_cannot_be_paired():
    x, y = torch.rand(8, 4), torch.zeros(8).long()
    one, other = (
        pd.evaluate(pd.deterministic(nn.Linear(4, 3)), (x, y), name=str(first), chunk_size=8, first=first)
        for first in (0, 8)
    )
    with pytest.raises(ValueError, match="they are about other examples"):
        pd.compare(one, other)
