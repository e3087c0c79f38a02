"""The worst over norms against verdicts counted by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.evaluation.intervals import wilson
from tests.worlds import tiny_batch, tiny_net

RADII = {1: 1.0, 2: 0.3, math.inf: 0.06}


def reports(defense, data, attacks=None, **options):
    attacks = attacks or {
        "pgd": lambda f, x, y, eps, norm: pd.attacks.pgd(f, x, y, eps=eps, norm=norm, num_steps=3)
    }
    options = {"num_samples": 6, "seed": 0, "name": "net"} | options
    return [pd.evaluate(defense, data, attacks, norm=n, eps=eps, **options) for n, eps in RADII.items()]


def test_an_example_counts_where_it_holds_at_every_norm():
    data = tiny_batch(60)
    several = reports(pd.deterministic(tiny_net().eval()), data)
    (row,) = [row for row in pd.worst_over_norms(several) if row["rule"] == "mean_prob"]
    tables = [
        report.arrays.at("correct", "net", "pgd", eps, "mean_prob")
        for report, eps in zip(several, RADII.values(), strict=True)
    ]
    by_hand = np.logical_and.reduce(tables).mean()
    assert row["accuracy"] == by_hand and by_hand <= min(table.mean() for table in tables)
    assert (row["low"], row["high"]) == pytest.approx(wilson(round(60 * by_hand), 60))
    assert row["eps"] == "l1 1, l2 0.3, l-inf 0.06" and row["attack"] == "worst over norms"
    assert row["estimand"] == "population" and row["num_examples"] == 60


def test_of_single_draws_the_norm_with_the_fewest_right_counts():
    several = reports(
        pd.defenses.rse(tiny_net(), sigma_init=0.3), tiny_batch(20), rules=[pd.rules.single_draw]
    )
    (row,) = pd.worst_over_norms(several)
    means = np.stack(
        [
            report.arrays.at("correct", "net", "pgd", eps, "single_draw").mean(0)
            for report, eps in zip(several, RADII.values(), strict=True)
        ]
    )
    assert (
        row["accuracy"] == pytest.approx(means.min(0).mean()) and row["low"] < row["accuracy"] < row["high"]
    )


def test_several_attacks_count_by_their_worst_case():
    net, data = pd.deterministic(nn.Linear(4, 3)), (torch.rand(30, 4), torch.randint(3, (30,)))
    several = reports(net, data, {"fgsm": pd.attacks.fgsm, "mim": pd.attacks.mim})
    assert [row["rule"] for row in pd.worst_over_norms(several)] == [
        row["rule"] for row in several[0].rows if row["attack"] == "clean"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:1], "at least two reports of different norms"),
        (lambda r: [r[0], r[0]], "at least two reports of different norms"),
        (lambda r: [r[0], *reports(NET, tiny_batch(5), num_samples=7)[1:]], "differ in more than the norm"),
        (lambda r: [r[0], *reports(NET, tiny_batch(6))[1:]], "differ in more than the norm"),
    ],
)
def test_reports_that_do_not_belong_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pd.worst_over_norms(change(reports(NET, tiny_batch(5))))


def test_several_radii_are_refused():
    data, attacks = tiny_batch(5), {"fgsm": pd.attacks.fgsm}
    several = [pd.evaluate(NET, data, attacks, norm=n, eps=[0.1, 0.2], name="net") for n in (2, math.inf)]
    with pytest.raises(ValueError, match="at one radius each, got 2 at norm 2"):
        pd.worst_over_norms(several)


def test_something_else_than_reports_is_refused():
    for other in (3, [3], "reports"):
        with pytest.raises(TypeError, match=r"expected (every )?reports? as"):
            pd.worst_over_norms(other)


NET = pd.deterministic(tiny_net().eval())


def test_reports_of_other_examples_or_of_another_network_do_not_belong_together():
    x, y, net = torch.rand(8, 4), torch.zeros(8).long(), pd.deterministic(nn.Linear(4, 3))
    attacks = {"fgsm": pd.attacks.fgsm}

    def seen(norm, defense=net, inputs=x, first=0):
        return pd.evaluate(defense, (inputs, y), attacks, norm=norm, eps=0.1, chunk_size=8, first=first)

    assert pd.worst_over_norms([seen(2), seen(math.inf)])
    others = {"defense": pd.deterministic(nn.Linear(4, 3)), "inputs": x.flip(1), "first": 8}
    for name, other in others.items():
        with pytest.raises(ValueError, match="of the same defenses, examples"):
            pd.worst_over_norms([seen(2), seen(math.inf, **{name: other})])
