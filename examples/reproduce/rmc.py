"""Runtime masking and cleansing (Wu et al., 2020): static transfer, FPA and GMSA, beside the static base.

    python examples/reproduce/rmc.py --scale cpu

The defense refines itself on neighbors of every input. Points made for the static base flatter it; attacks
that simulate the refinement (Chen et al., 2022) do not. The stream is replayed in order, with unseen seeds.
"""

import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks

COMMON = {"learning_rate": 4e-3, "batch_size": 64, "num_samples": 1, "eps": 0.3, "seeds": [0], "warm_up": 0.3}
SCALES = {
    "smoke": {**COMMON, "data": "digits", "eps": 0.2, "train_images": 400, "images": 6, "epochs": 4}
    | {"neighbors": 32, "steps": 8, "rounds": 1, "group": 6, "max_epochs": 3},
    "cpu": {**COMMON, "data": "mnist-5k", "train_images": None, "images": 200, "epochs": 14, "inner_steps": 5}
    | {"neighbors": 128, "steps": 40, "rounds": 2, "group": 50, "max_epochs": 20},
    "gpu": {**COMMON, "data": "mnist", "train_images": None, "images": 1000, "epochs": 50, "inner_steps": 40}
    | {"neighbors": 1024, "steps": 100, "rounds": 9, "group": 1, "max_epochs": 100},
}


def adapted(lab: Lab, attack: Any, **settings: Any) -> Any:
    """FPA or GMSA whose inner attack is PGD within the radius."""
    inner = partial(attacks.pgd, num_steps=lab.steps)

    def simulating(f: Any, x: Any, y: Any, *, eps: float, norm: Any = math.inf, seed: Any = None) -> Any:
        within = partial(inner, eps=eps, norm=norm)
        return attack(f, x, y, attack=within, num_rounds=lab.rounds, seed=seed, **settings)

    return simulating


def static_transfer(lab: Lab, base: Any) -> Any:
    """Points made for the static base."""
    pgd = partial(attacks.pgd, num_steps=lab.steps)

    def transfer(f: Any, x: Any, y: Any, *, eps: float, norm: Any = math.inf, seed: Any = None) -> Any:
        return pgd(base, x, y, eps=eps, norm=norm, seed=seed)

    return transfer


def rows(lab: Lab) -> Iterator[Row]:
    """A plain base and an adversarially trained one, static and adaptive."""
    x, y = lab.split.train.tensors
    pgd = partial(attacks.pgd, num_steps=lab.steps)
    for label, objective in {"plain base": pd.objectives.elbo, "PGD-trained base": lab.adversarial()}.items():
        base = lab.trained(label.replace(" ", "-"), 0, lambda: pd.deterministic(lab.net()), objective)
        eps = lab.eps if "PGD" in label else lab.eps / 3
        static = {"pgd": pgd, "suite": partial(attacks.suite, budget=1000)}
        for row in lab.judged(base, f"static-{label}", static, eps=eps).rows:
            yield figure(label, "static base", row)
        settings = {"num_neighbors": lab.neighbors, "group": lab.group, "max_epochs": lab.max_epochs}
        defense = pd.rmc(base, (x, y), attack=partial(pgd, eps=eps), **settings)
        named = {"static transfer": static_transfer(lab, base), "fpa": adapted(lab, attacks.fpa)}
        named |= {
            "gmsa_avg": adapted(lab, attacks.gmsa),
            "gmsa_min": adapted(lab, attacks.gmsa, combine="min"),
        }
        for row in lab.judged(defense, f"rmc-{label}", named, eps=eps, journal=None).rows:
            yield figure(label, "rmc", row)
        yield figure(
            "CPU seconds per input", label, cost(defense, lab), note="least, middle and most of three"
        )


def cost(defense: Any, lab: Lab) -> Row:
    """CPU seconds per input of answering clean images in stream order, three times from the same state."""
    found, seconds, inputs = defense.state(), [], lab.test[0][: lab.group]
    for replay in range(3):
        start = time.process_time()
        defense.respond(inputs, seed=replay)
        seconds.append((time.process_time() - start) / len(inputs))
        defense.restore(found)
    low, value, high = sorted(seconds)
    return {"value": value, "low": low, "high": high}


if __name__ == "__main__":
    run("rmc", __doc__, rows, SCALES)
