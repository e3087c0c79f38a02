"""Early exit: the worst case as without it, for fewer gradients."""

from functools import partial

import pytest
import torch

import probdefense as pd
from probdefense.defenses import rse
from tests.worlds import LinearWorld, tiny_net


def data():
    x, y = LinearWorld().points(40)
    y[:6] = 1 - y[:6]  # wrong without an attack
    return x, y


def reports(attacks, **options):
    defense = LinearWorld().plain()
    return [
        pd.evaluate(defense, data(), attacks, eps=(0.02, 0.05), chunk_size=16, until_broken=early, **options)
        for early in (False, True)
    ]


def test_the_worst_case_is_exact_and_costs_less():
    attacks = {"pgd": partial(pd.attacks.pgd, num_steps=3), "fgsm": pd.attacks.fgsm, "again": pd.attacks.bim}
    whole, early = reports(attacks)
    for rule in ("mean_prob", "single_draw"):
        for eps in (0.02, 0.05):
            wanted = {"attack": "worst", "eps": eps, "rule": rule}
            full, short = whole.row(**wanted), early.row(**wanted)
            assert full["accuracy"] == short["accuracy"]
            assert short["gradients"] < full["gradients"] and "conditional" not in short
    assert whole.row(attack="clean", rule="mean_prob") == early.row(attack="clean", rule="mean_prob")


def test_rows_of_attacks_are_conditional_and_cumulative():
    attacks = {"pgd": partial(pd.attacks.pgd, num_steps=3), "null": lambda logits_fn, x, y, *, eps: x}
    whole, early = reports(attacks)
    wanted = {"eps": 0.05, "rule": "mean_prob"}
    assert "conditional" not in whole.row(attack="null", **wanted)
    row = early.row(attack="null", **wanted)
    assert row["conditional"] is True and row["accuracy"] == early.row(attack="pgd", **wanted)["accuracy"]
    assert row["accuracy"] < whole.row(attack="null", **wanted)["accuracy"]


def test_what_stands_keeps_its_seed():
    seen: list[tuple[int, torch.Tensor]] = []

    def noted(logits_fn, x, y, *, eps, seed=None):
        seen.extend(zip(seed.tolist(), x, strict=True))
        return x

    defense = LinearWorld().plain()
    pd.evaluate(defense, data(), {"noted": noted}, eps=0.1)
    seeds = dict(seen)
    seen.clear()
    pd.evaluate(defense, data(), {"noted": noted}, eps=0.1, until_broken=True)
    assert len(seen) == 34 and all(torch.equal(seeds[number], image) for number, image in seen)


def test_a_journal_goes_on(tmp_path):
    attacks = {"pgd": partial(pd.attacks.pgd, num_steps=2), "fgsm": pd.attacks.fgsm}
    expected = reports(attacks)[1].rows
    for journal in (tmp_path, tmp_path):
        ask = partial(pd.evaluate, LinearWorld().plain(), data(), attacks, eps=(0.02, 0.05), chunk_size=16)
        assert ask(until_broken=True, journal=journal).rows == expected


def test_a_setting_for_every_example_is_not_cut():
    target = 1 - data()[1]
    attacks = {"toward": partial(pd.attacks.pgd, num_steps=1, target=target), "fgsm": pd.attacks.fgsm}
    found = pd.evaluate(LinearWorld().plain(), data(), attacks, eps=0.05, until_broken=True)
    assert found.row(attack="toward", rule="mean_prob")["gradients"] == 40


def test_random_defenses_are_refused():
    x, y = torch.rand(3, 1, 6, 6), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="until_broken=False"):
        pd.evaluate(rse(tiny_net()), (x, y), {"fgsm": pd.attacks.fgsm}, until_broken=True)
