"""Draws of verdicts are made once per chunk, for clean inputs and every attack."""

from functools import partial

import torch

import probdefense as pd
from probdefense.core import streams
from probdefense.core.sites import NoiseSite
from probdefense.defenses import bayesian, rse
from tests.worlds import tiny_batch, tiny_net


def test_noise_is_drawn_once_for_clean_and_all_attacks(monkeypatch):
    drawn = []
    kept = NoiseSite.draw

    def noted(self, shape, generator=None):
        drawn.append(shape)
        return kept(self, shape, generator)

    monkeypatch.setattr(NoiseSite, "draw", noted)
    defense, data = rse(tiny_net()).eval(), tiny_batch(5)
    counts = []
    for number in (1, 3):
        drawn.clear()
        attacks = {f"null {k}": lambda logits_fn, x, y: x for k in range(number)}
        pd.evaluate(defense, data, attacks, eps=0.1, num_samples=10)
        counts.append(len(drawn))
    alone = counts[0]
    drawn.clear()
    pd.evaluate(defense, data, {f"null {k}": lambda f, x, y: x for k in range(3)}, num_samples=10)
    assert counts[1] == len(drawn) <= alone * 5  # the selection of the worst draws 32 more, once


def test_reports_do_not_depend_on_what_is_kept(monkeypatch):
    defense, data = rse(bayesian(tiny_net())).eval(), tiny_batch(7)
    attacks = {"pgd": partial(pd.attacks.pgd, num_steps=2), "fgsm": pd.attacks.fgsm}
    rows = []
    for size in (2**26, 0):
        monkeypatch.setattr(streams, "CACHE_BYTES", size)
        report = pd.evaluate(defense, data, attacks, eps=0.1, num_samples=12, chunk_size=4)
        rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in report.rows])
    assert str(rows[0]) == str(rows[1])
    assert torch.is_tensor(data[0])
