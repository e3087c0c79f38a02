"""Seeded calls in two threads answer as each does alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import probdefense as pd
from tests.contract import defended
from tests.core.test_own_programs import autoguided, batch
from tests.worlds import tiny_batch


def together(*calls):
    """The answers of calls that start at one moment, each in a thread of its own."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def attack(defense, seed):
    x, y = tiny_batch(8)
    return pd.attacks.pgd(defense.samples(2), x, y, eps=0.1, num_steps=20, seed=seed)


@pytest.mark.parametrize("builder", ["rse", "bayesian on rse", "mc_dropout", "pni", "ensemble"])
def test_two_attacks_in_two_threads(builder):
    defenses = [defended(builder) for _ in range(2)]
    calls = [partial(attack, defense, seed) for seed, defense in enumerate(defenses)]
    alone = [call() for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(together(*calls), alone, strict=True))


def test_two_evaluations_in_two_threads():
    attacks = {
        "pgd": partial(pd.attacks.pgd, num_steps=5),
        "square": partial(pd.attacks.square, max_queries=400),
    }

    def rows(defense, seed):
        return pd.evaluate(defense, tiny_batch(8), attacks, num_samples=8, seed=seed).rows

    calls = [partial(rows, defended("bayesian on rse"), seed) for seed in range(2)]
    alone = [call() for call in calls]
    assert together(*calls) == alone


def test_a_pair_of_pyro_modules_in_two_threads():
    defenses, data = [autoguided() for _ in range(2)], batch()

    def evaluated(defense):
        return pd.evaluate(defense, data, {"fgsm": pd.attacks.fgsm}, num_samples=8).rows

    calls = [partial(evaluated, defense) for defense in defenses]
    alone = [call() for call in calls]
    for _ in range(3):
        assert together(*calls) == alone


@pytest.mark.parametrize("builder", ["rse", "bayesian", "pni", "ensemble"])
def test_one_defense_shared_by_threads(builder):
    defense, (x, _) = defended(builder), tiny_batch(8)
    frozen = defense.freeze(4)
    expected = frozen(x)
    answers = together(
        *[lambda: [frozen(x) for _ in range(30)]] * 2, *[lambda: [defense(x, 4) for _ in range(30)]] * 2
    )
    assert all(torch.equal(answer, expected) for answer in [*answers[0], *answers[1]])
    assert all(bool(torch.isfinite(answer).all()) for answer in [*answers[2], *answers[3]])
