"""``seed=``: an integer, one per example, a generator or None, the same everywhere."""

from functools import partial

import numpy as np
import pytest
import torch

import probdefense as pd
from tests.border.table import Case, World, named, refused

ATTACKS = {
    "pgd": partial(pd.attacks.pgd, eps=0.1, num_steps=1),
    "square": partial(pd.attacks.square, eps=0.1, max_queries=10),
    "worst_of": partial(pd.attacks.worst_of([pd.attacks.fgsm]), eps=0.1),
    "transfer": lambda f, x, y, **kw: pd.attacks.transfer(pd.attacks.fgsm, f)(f, x, y, eps=0.1, **kw),
}

WRONG = {
    "a fraction": (1.5, TypeError),
    "a text": ("0", TypeError),
    "true": (True, TypeError),
    "negative": (-1, ValueError),
    "too large": (2**64, ValueError),
    "a list": ([1, 2, 3, 4], TypeError),
    "NaN": (float("nan"), TypeError),
    "floats": (torch.rand(4), TypeError),
    "booleans": (torch.ones(4, dtype=torch.bool), TypeError),
    "too few": (torch.arange(3), ValueError),
    "two axes": (torch.zeros(4, 1).long(), ValueError),
    "an array of floats": (np.zeros(4), TypeError),
    "a float of NumPy": (np.float64(1.0), TypeError),
}

PER_CALL = {
    "predict": lambda w, s: pd.predict(w.noisy, w.x, 2, seed=s),
    "certify": lambda w, s: pd.certify(w.noisy, w.x, n0=2, n=2, seed=s),
    "evaluate": lambda w, s: pd.evaluate(w.noisy, w.data, num_samples=2, seed=s),
    "checks.run": lambda w, s: pd.checks.run(
        w.plain, w.x, w.y, eps=0.1, num_gradients=2, num_verdict=2, seed=s
    ),
    "fit": lambda w, s: pd.fit(w.bayes, w.loader, epochs=1, seed=s, progress=False),
    "to_arviz": lambda w, s: pd.to_arviz(w.bayes, w.data, num_samples=2, seed=s),
    "guide_k_hat": lambda w, s: pd.analysis.guide_k_hat(w.bayes, w.data, num_samples=20, seed=s),
    "robustness_curve": lambda w, s: pd.analysis.robustness_curve(
        {"a": np.array([[False, False], [False, True]])}, [0.0, 0.1], num_samples=2, num_warmup=2, seed=s
    ),
    "nuts": lambda w, s: pd.numpyro.nuts(w.bayes, w.data, num_samples=2, num_warmup=2, seed=s),
    "last_layer_nuts": lambda w, s: pd.numpyro.last_layer_nuts(w.bayes, w.data, num_samples=2, seed=s),
    "compare_to_gold": lambda w, s: pd.numpyro.compare_to_gold(
        w.bayes, w.bayes, w.data, num_samples=2, seed=s
    ),
    "rmc": lambda w, s: pd.rmc(w.plain, w.data, attack=w.pgd, num_neighbors=8, seed=s),
}
"""Calls whose seed is one integer."""

SINGLE = {name: WRONG[name] for name in ("a fraction", "a text", "true", "negative", "too large", "a list")}
SINGLE |= {"floats": WRONG["floats"], "two axes": (torch.zeros(4, 1).long(), TypeError)}

CASES = [
    Case(f"{name}: {what}", lambda w, f=attack, s=seed: f(w.plain, *w.data, seed=s), kind, "expected .*seed")
    for name, attack in ATTACKS.items()
    for what, (seed, kind) in WRONG.items()
] + [
    Case(f"{name}: {what}", lambda w, f=call, s=seed: f(w, s), kind, "expected .*seed")
    for name, call in PER_CALL.items()
    for what, (seed, kind) in SINGLE.items()
]

RIGHT = [np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3), np.array(3)]


@pytest.mark.parametrize(**named(CASES))
def test_wrong_seeds_are_refused(case):
    refused(case)


@pytest.mark.parametrize(
    "seed", RIGHT, ids=lambda seed: f"{type(seed).__name__} {getattr(seed, 'dtype', '')}"
)
def test_every_integer_is_a_seed(seed):
    world = World()
    for attack in ATTACKS.values():
        wanted = attack(world.plain, *world.data, seed=3)
        torch.testing.assert_close(attack(world.plain, *world.data, seed=seed), wanted, rtol=0, atol=0)
    for name in ("predict", "certify"):
        found, wanted = PER_CALL[name](world, seed), PER_CALL[name](world, 3)
        first, second = ((p.log_probs if name == "predict" else p.share) for p in (found, wanted))
        assert torch.equal(first, second)
    assert PER_CALL["evaluate"](world, seed).rows == PER_CALL["evaluate"](world, 3).rows


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_seeds_per_example_are_integers_of_any_width(dtype):
    world, seeds = World(), torch.tensor([3, 1, 4, 1])
    wanted = ATTACKS["pgd"](world.plain, *world.data, seed=seeds)
    for given in (seeds.to(dtype), seeds.to(dtype).numpy()):
        assert torch.equal(ATTACKS["pgd"](world.plain, *world.data, seed=given), wanted)


def test_a_generator_and_the_word_generator_are_the_same():
    world = World()
    first = ATTACKS["pgd"](world.plain, *world.data, seed=torch.Generator().manual_seed(1))
    second = ATTACKS["pgd"](world.plain, *world.data, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, second)
