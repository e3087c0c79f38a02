"""Random self-ensemble (Liu et al., 2018): the paper's figures and tables, and what later attacks leave.

    python examples/reproduce/rse.py --scale cpu

The paper attacks VGG16 on CIFAR-10 with the fixed-c protocol of Carlini and Wagner's attack, one draw per
step, 300 short steps, the last point as it is. Here a small network on 28 x 28 digits, whose pixels are moved
into [0.05, 0.95], because that protocol cannot move pixels at 0 or 1; the order is to be compared, not the
figures. Then the same networks face what was made since: EOT-APGD, C&W settled on fresh draws, Square, ZOO.
"""

import sys
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks, defenses, objectives

COMMON = {"learning_rate": 2e-3, "batch_size": 64, "num_samples": 50, "seeds": [0], "eps": 0.1}
SCALES = {
    "smoke": {**COMMON, "data": "digits", "train_images": 400, "images": 20, "epochs": 8, "num_samples": 10}
    | {"steps": 20, "constants": [0.01, 0.1], "sigmas": [0.1], "queries": [1000], "budget": 1000},
    "cpu": {**COMMON, "data": "mnist-5k", "train_images": None, "images": 200, "epochs": 12}
    | {
        "steps": 300,
        "constants": [0.01, 0.03, 0.06, 0.1, 0.2, 1.0, 5.0],
        "sigmas": [0.0, 0.05, 0.1, 0.2, 0.4],
    }
    | {"queries": [100, 1000, 10_000], "budget": 1000},
    "gpu": {**COMMON, "data": "cifar10", "train_images": None, "images": 1600, "epochs": 200}
    | {"steps": 300, "constants": [0.01, 0.03, 0.06, 0.1, 0.2], "sigmas": [0.0, 0.1, 0.2, 0.4]}
    | {"queries": [100, 1000, 10_000], "budget": 3200},
}

PAPER = {
    "none": {0.01: 30.38, 0.03: 8.93, 0.06: 5.06, 0.1: 3.56, 0.2: 2.19},
    "rse": {0.01: 90.00, 0.03: 86.06, 0.06: 79.44, 0.1: 67.19, 0.2: 34.75},
    "distillation": {0.01: 49.88, 0.03: 17.69, 0.06: 4.56, 0.1: 3.13, 0.2: 1.44},
    "brelu": {0.01: 75.06, 0.03: 47.93, 0.06: 30.94, 0.1: 20.69, 0.2: 13.50},
    "fgsm_retraining": {0.01: 27.00, 0.03: 9.81, 0.06: 4.13, 0.1: 3.69, 0.2: 1.44},
}
"""Table 2: accuracy in percent on CIFAR-10 with VGG16, by the constant c."""

DISTORTION = {"none": 3.41, "rse": 15.80, "distillation": 6.18, "brelu": 9.44, "fgsm_retraining": 3.33}
"""Table 3: squared L2, the mean over the nine other classes of one image of a ship."""

FAR = 28.0
"""An L2 radius within which every point of [0, 1] lies: points count wherever they are."""


class Inside(Lab):
    """The data with pixels in [0.05, 0.95]."""

    @cached_property
    def split(self) -> pd.data.Split:
        """As they are, moved inside."""
        whole = super().split
        parts = [(0.05 + 0.9 * part.tensors[0], part.tensors[1]) for part in whole]
        return pd.data.Split(*(TensorDataset(*part) for part in parts))


def rse(lab: Lab, inner: float = 0.1, init: float = 0.2, when: Any = "always") -> Any:
    """Noise before every convolution."""
    return defenses.rse(lab.net(), sigma_init=init, sigma_inner=inner, when=when)


def five(lab: Lab) -> dict[str, Any]:
    """The defenses of Table 2."""

    def plain() -> Any:
        return pd.deterministic(lab.net())

    none = lab.trained("none", 0, plain)
    hot = lab.trained("teacher", 0, plain, objectives.distilled(none, temperature=20.0))
    augmented = objectives.gaussian_augmented(objectives.elbo, 0.05)
    mixed = objectives.mixed(objectives.elbo, partial(attacks.fgsm, eps=lab.eps), probability=0.5)
    return {
        "none": none,
        "rse": lab.trained("rse", 0, partial(rse, lab)),
        "distillation": lab.trained("distillation", 0, plain, objectives.distilled(hot, temperature=20.0)),
        "brelu": lab.trained("brelu", 0, lambda: defenses.brelu(lab.net()), augmented),
        "fgsm_retraining": lab.trained("fgsm_retraining", 0, plain, mixed),
    }


def fixed(lab: Lab, c: float) -> Any:
    """The attack of the paper, one draw per step."""
    return pd.with_draws(partial(attacks.cw_fixed, c=c, num_steps=lab.steps), 1)


def by_constant(lab: Lab, title: str, name: str, defense: Any, **more: Any) -> Iterator[Row]:
    """Accuracy at every constant, and on clean images."""
    constants = lab.constants if title == "Table 2" else lab.constants[-3::2]
    named = {f"cw_fixed c={c:g}": fixed(lab, c) for c in constants}
    report = lab.judged(defense, f"{title}-{name}", named, norm=2, eps=FAR, **more)
    for row in report.rows:
        if row["attack"] != "worst":
            c = 0.0 if row["attack"] == "clean" else float(row["attack"].partition("=")[2])
            known = PAPER.get(name, {}).get(c) if title == "Table 2" else None
            yield figure(title, name, row, paper=known, c=c)


def places(lab: Lab) -> Iterator[Row]:
    """Figure 2: noise in training and at test, in either, in none."""
    for name, when in {"train and test": "always", "train only": "train", "test only": "test"}.items():
        defense = lab.trained(f"noise-{when}", 0, partial(rse, lab, when=when))
        yield from by_constant(lab, "Figure 2", name, defense)
    yield from by_constant(
        lab, "Figure 2", "none", lab.trained("none", 0, lambda: pd.deterministic(lab.net()))
    )


def sweep(lab: Lab) -> Iterator[Row]:
    """Figure 3: the scale of the inner noise."""
    for sigma in lab.sigmas:
        defense = lab.trained(f"sigma-{sigma:g}", 0, partial(rse, lab, inner=sigma or 1e-6))
        yield from by_constant(lab, "Figure 3", f"sigma_inner {sigma:g}", defense)


def draws(lab: Lab, defense: Any) -> Iterator[Row]:
    """Figures 4 and 5: one draw against many."""
    for count in (1, 2, 5, 10, 20, 50):
        report = lab.judged(
            defense, f"draws-{count}", {"cw_fixed": fixed(lab, 0.1)}, norm=2, eps=FAR, num_samples=count
        )
        for row in report.rows[:2]:
            yield figure("Figures 4 and 5", f"{count} draws", row)


def today(lab: Lab, named: dict[str, Any]) -> Iterator[Row]:
    """What attacks that were made since leave of the same networks, l-inf."""
    steps = max(1, lab.budget // 16)
    for name, defense in named.items():
        apgd = pd.with_draws(partial(attacks.apgd, num_steps=steps if defense.stochastic else lab.budget), 16)
        report = lab.judged(
            defense, f"today-{name}", {"eot_apgd": apgd, "suite": partial(attacks.suite, budget=lab.budget)}
        )
        for row in report.rows:
            yield figure("Today's attacks", name, row)
    for name in ("none", "rse"):
        settled = {"cw": pd.with_draws(partial(attacks.cw, num_steps=max(5, lab.budget // 16)), 4)}
        report = lab.judged(named[name], f"settled-{name}", settled, norm=2, eps=1.0)
        for row in report.rows:
            yield figure("C&W settled on fresh draws, L2", name, row)


def queries(lab: Lab, named: dict[str, Any]) -> Iterator[Row]:
    """Square and ZOO against the number of queries: single answers, and averages of ten."""
    few = tuple(part[:100] for part in lab.test)
    for name, averaged in (("none", 1), ("rse", 1), ("rse", 10)):
        for count in lab.queries:
            asked = {"square": (attacks.square, torch.inf, lab.eps), "zoo": (attacks.zoo, 2, 2.0)}
            for label, (attack, norm, eps) in asked.items():
                if label == "zoo" and count < 1000 * averaged:
                    continue  # does not pay for one step of a search
                chosen = {label: pd.with_draws(partial(attack, max_queries=count), averaged)}
                key = f"{label}-{name}-{count}-{averaged}"
                row = lab.judged(named[name], key, chosen, norm=norm, eps=eps, data=few).rows[1]
                title = f"{name}, {averaged} answers averaged" if averaged > 1 else name
                yield figure("Queries", title, row, queries=count)


def targeted(lab: Lab, named: dict[str, Any]) -> Iterator[Row]:
    """Table 3: how far targeted points lie, squared L2 in pixels."""
    x, y = (part[:20] for part in lab.test)
    target, points = (y + 1) % 10, {"clean": x}
    for name, defense in named.items():
        draws = 4 if defense.stochastic else 1
        found = attacks.cw(
            defense.freeze(draws),
            x,
            y,
            target=target,
            num_steps=max(5, lab.budget // 8),
            seed=0,
        )
        points[name] = found
        squared = (found - x).flatten(1).square().sum(1).double()
        reached = squared[squared > 0]
        if len(reached) < 2:
            continue
        half = 1.96 * float(reached.std()) / len(reached) ** 0.5
        mean = float(reached.mean())
        shown = {"value": mean, "low": max(0.0, mean - half), "high": mean + half}
        note = f"squared L2 of the {len(reached)} of {len(x)} images that reach the next class"
        told = {"attack": "cw, targeted", "unit": "pixels squared", "note": note}
        yield figure("Table 3", name, shown, paper=DISTORTION[name], **told)
    lab.drawn({name: images[:8] for name, images in points.items()})


def rows(lab: Lab) -> Iterator[Row]:
    """Everything, from the paper's protocol to today's."""
    lab = Inside(lab.item, lab.scale, lab.sizes, lab.work, lab.trained_seconds)
    named = five(lab)
    for name, defense in named.items():
        yield from by_constant(lab, "Table 2", name, defense)
    yield from places(lab)
    yield from sweep(lab)
    yield from draws(lab, named["rse"])
    yield from targeted(lab, named)
    yield from today(lab, named)
    yield from queries(lab, named)


if __name__ == "__main__":
    run("rse", __doc__, rows, SCALES)
