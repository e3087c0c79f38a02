"""Is anything better than well-tuned PGD training at equal CPU seconds? Compositions are searched.

    python examples/reproduce/better_than_pgd.py --scale cpu

Every candidate is trained for the CPU seconds that PGD training takes for its epochs: how many epochs that
buys follows from the cost of one, measured for all in turns. Candidates are first compared on a part of the
training set that no one trains on; the two best then face PGD training on the test set with three or more
training seeds. The judge is the worst of the suite, APGD on DLR and PGD on the margin, on fresh draws; the
search does without the suite.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks, defenses
from probdefense.evaluation.comparison import compare
from probdefense.objectives import elbo, trades
from probdefense.study.findings import joined

COMMON = {"batch_size": 64, "num_samples": 20}
DIGITS = {"data": "digits", "eps": 0.2, "train_images": None, "images": 360, "held_out": 287}
DIGITS |= {"epochs": 46, "rates": [8e-3, 16e-3], "learning_rate": 8e-3}
MNIST = {"data": "mnist-5k", "eps": 0.3, "train_images": None, "images": 400, "held_out": 300}
MNIST |= {"epochs": 14, "rates": [4e-3], "learning_rate": 4e-3, "warm_up": 0.3}
SCALES = {
    "smoke": {**COMMON, "seeds": [0], "budget": 1000, "search_budget": 400, "finalists": 1}
    | {
        "images": 20,
        "worlds": [DIGITS | {"train_images": 500, "images": 20, "held_out": 20, "epochs": 4}],
    },
    "cpu": {**COMMON, "seeds": list(range(7)), "budget": 1000, "search_budget": 400, "finalists": 2}
    | {"worlds": [DIGITS, MNIST]},
    "gpu": {**COMMON, "seeds": [0, 1, 2], "budget": 5000, "search_budget": 400, "finalists": 2}
    | {
        "worlds": [
            {"data": "cifar10", "eps": 8 / 255, "train_images": None, "images": 1000, "held_out": 1000}
            | {"epochs": 100, "rates": [8e-3, 16e-3], "learning_rate": 8e-3}
        ]
    },
}


def candidates(lab: Lab, num_data: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By name: how a defense is built and what it minimizes. The first is what all others are measured by."""

    def plain() -> Any:
        return pd.deterministic(lab.net())

    def noisy(**options: Any) -> Any:
        return defenses.rse(lab.net(), sigma_init=0.05, sigma_inner=0.05, scale="learned", **options)

    def bayesian(**options: Any) -> Any:
        return defenses.bayesian(lab.net(), prior=dist.Normal(0.0, 1.0), num_data=num_data, **options)

    small = partial(elbo, kl_weight=0.01)
    return {
        "pgd_training": (plain, lab.adversarial),
        "trades": (plain, lambda: trades(lab.inner_attack(), beta=6.0)),
        "noisy_trades": (noisy, lambda: trades(lab.inner_attack(), beta=6.0)),
        "learned_noise": (noisy, lab.adversarial),
        "correlated_noise": (partial(noisy, covariance="full"), lab.adversarial),
        "adv_bnn": (bayesian, lambda: lab.adversarial(small)),
        "low_rank": (partial(bayesian, rank=4), lambda: lab.adversarial(small)),
    }


def judges(defense: Any, budget: int) -> dict[str, Any]:
    """The suite, APGD on DLR and PGD on the margin."""
    draws = 8 if defense.stochastic else 1
    steps = max(10, budget // (2 * draws))
    named = {
        "apgd_dlr": partial(attacks.apgd, loss=pd.losses.dlr),
        "pgd_margin": partial(attacks.pgd, loss=pd.losses.margin),
    }
    found = {name: pd.with_draws(partial(attack, num_steps=steps), draws) for name, attack in named.items()}
    return {"suite": partial(attacks.suite, budget=budget), **found}


def equal_epochs(lab: Lab) -> dict[str, int]:
    """By candidate, the epochs that cost the CPU seconds of PGD training's: least of three, interleaved."""
    place = lab.work / "epochs.json"
    if not place.exists():
        costs: dict[str, float] = {}
        for turn in range(3):
            for name, (build, objective) in candidates(lab, lab.num_data).items():
                label = f"{lab.data}-cost-{name}-{turn}"
                lab.trained(label, 0, build, objective(), epochs=1)
                costs[name] = min(costs.get(name, math.inf), lab.trained_seconds[f"{label}-0"])
        unit = lab.epochs * costs["pgd_training"]
        place.write_text(json.dumps({name: max(2, round(unit / cost)) for name, cost in costs.items()}))
    found: dict[str, int] = json.loads(place.read_text())
    return found


def kept_apart(lab: Lab) -> tuple[TensorDataset, tuple[Any, Any]]:
    """The training set without its last images, and those."""
    x, y = lab.split.train.tensors
    return TensorDataset(x[: -lab.held_out], y[: -lab.held_out]), (x[-lab.held_out :], y[-lab.held_out :])


def worst(report: pd.Report) -> Row:
    """The row that counts."""
    return report.row(attack="worst", rule="mean_prob")


def searched(lab: Lab, epochs: dict[str, int]) -> Iterator[tuple[str, float, Row]]:
    """Every candidate with every rate, on images kept apart from the training set."""
    part, held = kept_apart(lab)
    for name, (build, objective) in candidates(lab, len(part)).items():
        for rate in lab.rates:
            label = f"{lab.data}-search-{name}-{rate:g}"
            lab.sizes = {**lab.sizes, "epochs": epochs[name]}
            defense = lab.trained(label, 0, build, objective(), learning_rate=rate, train=part)
            against = judges(defense, lab.search_budget)
            del against["suite"]
            yield name, rate, worst(lab.judged(defense, label, against, data=held))


def final(lab: Lab, name: str, rate: float, epochs: dict[str, int]) -> list[pd.Report]:
    """A finalist on the test set, by training seed."""
    build, objective = candidates(lab, lab.num_data)[name]
    lab.sizes = {**lab.sizes, "epochs": epochs[name]}
    reports = []
    for seed in lab.seeds:
        label = f"{lab.data}-final-{name}"
        defense = lab.trained(label, seed, build, objective(), learning_rate=rate)
        reports.append(lab.judged(defense, label, judges(defense, lab.budget), seed=seed))
    return reports


def on(lab: Lab) -> Iterator[Row]:
    """The search on one data set, then the finalists on its test set."""
    best: dict[str, tuple[float, float]] = {}
    epochs = equal_epochs(lab)
    for name, rate, row in searched(lab, epochs):
        title = f"{lab.data}: search on held-out training images"
        yield figure(title, name, row, learning_rate=rate, epochs=lab.epochs, seed=0)
        best[name] = max(best.get(name, (0.0, 0.0)), (row["accuracy"], rate))
    others = sorted((name for name in best if name != "pgd_training"), key=lambda name: -best[name][0])
    reports = {}
    for name in ["pgd_training", *others[: lab.finalists]]:
        reports[name] = final(lab, name, best[name][1], epochs)
        for attack in ("clean", "worst"):
            row = joined(reports[name]).row(attack=attack, rule="mean_prob")
            yield figure(f"{lab.data}: finalists on the test set", name, row, epochs=lab.epochs)
    for name in others[: lab.finalists]:
        for row in compare(reports[name], reports["pgd_training"]).rows:
            if row["attack"] in ("clean", "worst"):
                yield figure(f"{lab.data}: difference to PGD training", name, row)


def rows(lab: Lab) -> Iterator[Row]:
    """One data set after the other."""
    for world in lab.worlds:
        yield from on(replace(lab, sizes={**lab.sizes, **world}, work=lab.work / world["data"]))


if __name__ == "__main__":
    run("better_than_pgd", __doc__, rows, SCALES)
