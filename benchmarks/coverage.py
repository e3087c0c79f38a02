"""How often intervals hold the truth, and how often checks cry wolf, in worlds where it is known.

    python benchmarks/coverage.py [--quick] [intervals] [differences] [sequential] [alarms]

Verdicts are made as $1[\\mu + a_i + b_s + e_{si} > 0]$ with normal effects of examples $a$, shared draws $b$
and the rest $e$, of variances that sum to one, so that the accuracy is $\\Phi(\\mu)$.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from torch import nn
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.evaluation.comparison import paired
from probdefense.evaluation.intervals import accuracy_interval, wilson
from probdefense.objectives import adversarial, elbo

ACCURACIES = (0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98)
SIZES = ((100, 50), (500, 50), (50, 10))
"""Examples and draws."""

WORLDS = {"independent": (0.6, 0.0), "shared": (0.6, 0.05), "shared, all alike": (0.3, 0.2)}
"""Variances that examples and shared draws explain."""


def wilson_coverage(accuracy: float, examples: int) -> float:
    """Exact coverage of Wilson's interval with one verdict per example."""
    right = np.arange(examples + 1)
    low, high = np.array([wilson(int(k), examples) for k in right]).T
    return float(binom.pmf(right, examples, accuracy)[(low <= accuracy) & (accuracy <= high)].sum())


def verdict_table(
    rng: np.random.Generator, accuracy: float, size: tuple[int, int], explained: tuple[float, float]
) -> tuple[np.ndarray, float, float]:
    """Verdicts ``(draws, examples)``, the population's accuracy, and that of these examples."""
    (examples, draws), (by_example, by_draw) = size, explained
    score = ndtri(accuracy) + rng.normal(size=examples) * math.sqrt(by_example)
    table = (
        score
        + rng.normal(size=(draws, 1)) * math.sqrt(by_draw)
        + rng.normal(size=(draws, examples)) * math.sqrt(1 - by_example - by_draw)
    )
    return table > 0, accuracy, float(ndtr(score / math.sqrt(1 - by_example)).mean())


def interval_coverage(
    accuracy: float, size: tuple[int, int], world: str, estimand: str = "population", repeats: int = 1000
) -> float:
    """How often `accuracy_interval` covers the truth of its estimand."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repeats):
        table, population, test_set = verdict_table(rng, accuracy, size, WORLDS[world])
        low, high = accuracy_interval(table, crossed=world != "independent", estimand=estimand)
        hits += low <= (population if estimand == "population" else test_set) <= high
    return float(hits / repeats)


def bootstrap(rng: np.random.Generator, table: np.ndarray, repeats: int = 400) -> tuple[float, float]:
    """The percentile interval of a pigeonhole bootstrap, over rows and columns alike."""
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), repeats) / n for n in table.shape)
    low, high = np.quantile(np.einsum("br,rc,bc->b", rows, table, columns, optimize=True), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_coverage(accuracy: float, size: tuple[int, int], world: str, repeats: int = 1000) -> float:
    """The same for the bootstrap, about the population."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repeats):
        table, truth, _ = verdict_table(rng, accuracy, size, WORLDS[world])
        low, high = bootstrap(rng, table.astype(float))
        hits += low <= truth <= high
    return float(hits / repeats)


def difference_table(rng: np.random.Generator, seeds: int, spread: float) -> tuple[np.ndarray, float]:
    """Differences ``(seeds, examples)`` of two methods whose scores training moves, and their mean."""
    examples, scores = rng.normal(size=200) * math.sqrt(0.7), (0.3, 0.4)
    a, b = (
        score
        + examples
        + rng.normal(size=(seeds, 1)) * spread
        + rng.normal(size=(seeds, 200)) * math.sqrt(0.3)
        for score in scores
    )
    truth = [float(ndtr(score / math.hypot(1, spread))) for score in scores]
    return (a > 0).astype(float) - (b > 0), truth[0] - truth[1]


def difference_coverage(seeds: int, spread: float, repeats: int = 1000) -> tuple[float, float]:
    """Coverage of `compare`'s interval and of the bootstrap over seeds and examples."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(repeats):
        table, truth = difference_table(rng, seeds, spread)
        center, found = paired(table)
        low, high = bootstrap(rng, table)
        hits += [abs(center - truth) <= found.half_width(), low <= truth <= high]
    return float(hits[0] / repeats), float(hits[1] / repeats)


def intervals(repeats: int) -> None:
    print("accuracy".ljust(42), *(f"{a:6.2f}" for a in ACCURACIES))
    for examples in (50, 100, 500):
        print(
            f"one verdict, {examples} examples".ljust(42),
            *_percent(wilson_coverage(a, examples) for a in ACCURACIES),
        )
    for world in WORLDS:
        for size in SIZES:
            ways: dict[str, Callable[..., float]] = {
                "population": interval_coverage,
                "test set": partial(interval_coverage, estimand="test set"),
                "bootstrap": bootstrap_coverage,
            }
            for name, cover in ways.items():
                title = f"{world}, {size[0]} x {size[1]}, {name}"
                print(title.ljust(42), *_percent(cover(a, size, world, repeats=repeats) for a in ACCURACIES))


def differences(repeats: int) -> None:
    print("\ncoverage; training seeds, spread of their scores: compare, bootstrap over seeds and examples")
    for seeds in (2, 3, 5, 10):
        for spread in (0.0, 0.05, 0.15):
            print(f"{seeds:3d} {spread:.2f}", *_percent(difference_coverage(seeds, spread, repeats)))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def honest_models(seed: int, epochs: int) -> dict[str, pd.Defense]:
    """One trained model of every kind on digits."""
    train, _ = pd.data.digits()
    torch.manual_seed(seed)
    robust = adversarial(elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=3, step_size=0.05))
    noisy = partial(pd.defenses.rse, before_linear=True, sigma_init=0.1, sigma_inner=0.05)
    random = partial(pd.defenses.bayesian, num_data=len(train))
    kinds: dict[str, tuple[Callable[..., pd.Defense], Any]] = {
        "plain": (pd.deterministic, elbo),
        "adversarially trained": (pd.deterministic, robust),
        "rse": (noisy, elbo),
        "bayesian": (random, elbo),
        "adversarially trained bayesian": (random, robust),
    }
    models = {}
    for name, (build, objective) in kinds.items():
        defense = build(small_net())
        optimizer = torch.optim.Adam(defense.param_groups(), lr=0.01)
        pd.fit(
            defense,
            DataLoader(train, 64, shuffle=True),
            epochs=epochs,
            objective=objective,
            optimizer=optimizer,
        )
        models[name] = defense.eval()
    return models


def sequential(trainings: int, epochs: int = 10) -> None:
    """Draws until the label is settled, clean and attacked."""
    x, y = pd.data.digits().test.tensors
    print("\nlabels settled at 5 %, at most 50 draws: draws, unsettled, disagree with 2000 draws; attacked")
    for seed in range(trainings):
        for name, defense in honest_models(seed, epochs).items():
            x_adv = pd.attacks.pgd(defense.samples(4), x, y, eps=0.1, num_steps=10, seed=0)
            line = []
            for points in (x, x_adv):
                found = pd.predict(defense, points, alpha=0.05, seed=0)
                label = pd.predict(defense, points, 2000, seed=1).label
                wrong = (found.label != label) & found.settled
                draws = torch.as_tensor(found.num_samples).double().mean()
                shares = _percent([float((~found.settled).double().mean()), float(wrong.double().mean())])
                line += [f"{float(draws):6.1f}", *shares]
            print(name.ljust(32), *line)


def alarms(trainings: int, epochs: int = 10) -> None:
    """Checks of honest models, each trained anew."""
    x, y = (part[:150] for part in pd.data.digits().test.tensors)
    runs, fired, start = 0, [], time.perf_counter()
    for seed in range(trainings):
        for name, defense in honest_models(seed, epochs).items():
            found = pd.checks.run(
                defense, x, y, eps=0.1, num_gradients=64, num_samples=4, num_verdict=20, seed=seed
            )
            runs += 1
            fired += [(name, seed, check.name, check.verdict, check.evidence) for check in found.fired]
    seconds = (time.perf_counter() - start) / runs
    print(
        f"\n{runs} runs of the checks on honest models, {seconds:.1f} s each with training: "
        f"{len(fired)} alarms"
    )
    print(*fired, sep="\n")


def _percent(shares: Iterable[float]) -> list[str]:
    return [f"{100 * share:6.1f}" for share in shares]


def main(arguments: list[str]) -> None:
    quick = "--quick" in arguments
    parts = {
        "intervals": partial(intervals, 50 if quick else 1000),
        "differences": partial(differences, 50 if quick else 1000),
        "sequential": partial(sequential, 1 if quick else 3),
        "alarms": partial(alarms, 1 if quick else 20),
    }
    chosen = [name for name in arguments if name in parts] or list(parts)
    for name in chosen:
        parts[name]()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
