"""Is anything better than well-tuned PGD training at equal CPU seconds? Compositions are searched.

    python examples/reproduce/better_than_pgd.py --scale cpu

Every candidate is trained for the same CPU seconds on one thread: its number of epochs follows from the
measured cost of one. Candidates are first compared on a part of the training set that no one trains on; the
two best then face PGD training on the test set with three or more training seeds.
The judge is the worst of the suite, APGD on DLR and PGD on the margin, on fresh draws.
"""

import sys
import time
from collections.abc import Callable, Iterator
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

COMMON = {"batch_size": 64, "learning_rate": 8e-3, "num_samples": 20}
SCALES = {
    "smoke": {**COMMON, "data": "digits", "eps": 0.2, "train_images": 500, "images": 20, "seconds": 1.0}
    | {"epochs": 4, "held_out": 20, "seeds": [0], "budget": 1000, "rates": [8e-3], "finalists": 1},
    "cpu": {**COMMON, "data": "digits", "eps": 0.2, "train_images": None, "images": 360, "seconds": 40.0}
    | {
        "epochs": 46,
        "held_out": 287,
        "seeds": [0, 1, 2],
        "budget": 1000,
        "rates": [8e-3, 16e-3],
        "finalists": 2,
    },
    "gpu": {**COMMON, "data": "cifar10", "eps": 8 / 255, "train_images": None, "images": 1000}
    | {"seconds": 36_000.0, "epochs": 100, "held_out": 1000, "seeds": [0, 1, 2], "budget": 5000}
    | {"rates": [8e-3, 16e-3], "finalists": 2},
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
        "learned_noise": (noisy, lab.adversarial),
        "correlated_noise": (partial(noisy, covariance="full"), lab.adversarial),
        "adv_bnn": (bayesian, lambda: lab.adversarial(small)),
        "low_rank": (partial(bayesian, rank=4), lambda: lab.adversarial(small)),
    }


def judges(lab: Lab, defense: Any) -> dict[str, Any]:
    """The suite, APGD on DLR and PGD on the margin."""
    draws = 8 if defense.stochastic else 1
    steps = max(10, lab.budget // (2 * draws))
    named = {
        "apgd_dlr": partial(attacks.apgd, loss=pd.losses.dlr),
        "pgd_margin": partial(attacks.pgd, loss=pd.losses.margin),
    }
    found = {name: pd.with_draws(partial(attack, num_steps=steps), draws) for name, attack in named.items()}
    return {"suite": partial(attacks.suite, budget=lab.budget), **found}


def epochs_for(lab: Lab, name: str, rate: float) -> int:
    """Epochs that fit into the seconds, from the CPU time of one."""
    place = lab.work / f"epochs-{name}.txt"
    if not place.exists():
        build, objective = candidates(lab, lab.num_data)[name]
        start = time.process_time()
        lab.trained(f"first-{name}", 0, build, objective(), epochs=1, learning_rate=rate)
        spent = max(0.01, time.process_time() - start)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(str(max(2, round(lab.seconds / spent))))
    return int(place.read_text())


def kept_apart(lab: Lab) -> tuple[TensorDataset, tuple[Any, Any]]:
    """The training set without its last images, and those."""
    x, y = lab.split.train.tensors
    return TensorDataset(x[: -lab.held_out], y[: -lab.held_out]), (x[-lab.held_out :], y[-lab.held_out :])


def worst(report: pd.Report) -> Row:
    """The row that counts."""
    return report.row(attack="worst", rule="mean_prob")


def searched(lab: Lab) -> Iterator[tuple[str, float, Row]]:
    """Every candidate with every rate, on images kept apart from the training set."""
    part, held = kept_apart(lab)
    for name, (build, objective) in candidates(lab, len(part)).items():
        for rate in lab.rates:
            label = f"search-{name}-{rate:g}"
            lab.sizes = {**lab.sizes, "epochs": epochs_for(lab, name, rate)}
            defense = lab.trained(label, 0, build, objective(), learning_rate=rate, train=part)
            yield name, rate, worst(lab.judged(defense, label, judges(lab, defense), data=held))


def rows(lab: Lab) -> Iterator[Row]:
    """The search, then the finalists on the test set."""
    best: dict[str, tuple[float, float]] = {}
    for name, rate, row in searched(lab):
        yield figure("Search on held-out training images", name, row, learning_rate=rate, seed=0)
        best[name] = max(best.get(name, (0.0, 0.0)), (row["accuracy"], rate))
    others = sorted((name for name in best if name != "pgd_training"), key=lambda name: -best[name][0])
    reports: dict[str, list[pd.Report]] = {}
    for name in ["pgd_training", *others[: lab.finalists]]:
        build, objective = candidates(lab, lab.num_data)[name]
        lab.sizes = {**lab.sizes, "epochs": epochs_for(lab, name, best[name][1])}
        for seed in lab.seeds:
            defense = lab.trained(f"final-{name}", seed, build, objective(), learning_rate=best[name][1])
            report = lab.judged(
                defense, name, judges(lab, defense), journal=lab.work / f"final-{name}-{seed}"
            )
            reports.setdefault(name, []).append(report)
        together = joined(reports[name])
        for attack in ("clean", "worst"):
            row = together.row(attack=attack, rule="mean_prob")
            yield figure("Finalists on the test set", name, row, epochs=lab.epochs)
    for name in others[: lab.finalists]:
        compared = compare(reports[name], reports["pgd_training"])
        for row in compared.rows:
            if row["attack"] in ("clean", "worst"):
                yield figure("Difference to PGD training", name, row)


if __name__ == "__main__":
    run("better_than_pgd", __doc__, rows, SCALES)
