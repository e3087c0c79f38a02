"""Which draws should a gradient listen to? Averages, weights, votes and momentum at equal gradients.

    python benchmarks/selective.py [images] [gradients]

Differences are paired by image: accuracy left by plain EOT minus that left by the variant, in points with the
95 % interval; above zero the variant is the stronger attack. Nothing but the aggregation of draws differs.
"""

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import probdefense as pd
from probdefense.attacks import mim, pgd
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.logits.adapters import Samples
from probdefense.logits.losses import expected_cross_entropy, margin, probability_margin
from probdefense.logits.rules import mean_prob, score_margin
from probdefense.ops import Ball
from probdefense.prediction.drawing import draw_keyed
from probdefense.rng import Stream
from probdefense.types import Inputs, Labels, LogitsFn

EPS, DRAWS, MEMBERS = 0.1, 16, 4
Variant = Callable[[LogitsFn, Inputs, Labels, int], Inputs]


def toward_fooled(logits: Tensor, y: Labels) -> Tensor:
    """EM over draws: responsibilities by margin weigh the cross-entropy of every draw."""
    fooled = (-score_margin(logits, y)).detach().softmax(0)
    return -(
        fooled * logits.log_softmax(-1).gather(-1, y.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
    ).sum(0)


def averaged(loss: Callable = expected_cross_entropy, draws: int = DRAWS) -> Variant:
    return lambda f, x, y, gradients: pgd(
        Samples(f, draws), x, y, eps=EPS, loss=loss, num_steps=gradients // draws, seed=0
    )


def momentum(f: LogitsFn, x: Inputs, y: Labels, gradients: int) -> Inputs:
    """One draw a step, a linear loss, momentum 0.9 (Sitawarin et al., 2022)."""
    step = 2.5 * EPS / gradients
    return mim(
        Samples(f, 1), x, y, eps=EPS, loss=margin, momentum=0.9, step_size=step, num_steps=gradients, seed=0
    )


def votes(f: LogitsFn, x: Inputs, y: Labels, gradients: int) -> Inputs:
    """The signs of the gradients of single draws vote."""
    ball, one, steps = Ball(x, EPS, math.inf), Samples(f, 1), gradients // DRAWS
    points = ball.start(Stream.of(0, x))
    for _ in range(steps):
        slopes = [
            input_gradient(one, points, climb(expected_cross_entropy, y)).gradient for _ in range(DRAWS)
        ]
        direction = torch.stack(slopes).sign().sum(0).sign()
        points = ball.project(points + 2.5 * EPS / steps * direction)
    return points


VARIANTS: dict[str, Variant] = {
    "one draw": averaged(draws=1),
    "every member once": averaged(draws=MEMBERS),
    "weights toward fooled draws": averaged(toward_fooled),
    "probability margin": averaged(probability_margin),
    "votes of signs": votes,
    "one draw, linear, momentum": momentum,
}


def defenses() -> dict[str, pd.Defense]:
    """One of every kind of randomness, trained on digits."""
    train, _ = pd.data.digits()
    made = {
        "noise (rse)": pd.defenses.rse(pd.models.small_cnn(width=8)),
        "transforms": pd.defenses.random_transforms(pd.models.small_cnn(width=8)),
        "ensemble of 4": pd.defenses.ensemble([pd.models.small_cnn(width=8) for _ in range(MEMBERS)]),
        "mixture: dropout": pd.defenses.mc_dropout(
            nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
            rate=0.5,
        ),
    }
    for defense in made.values():
        loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
        pd.fit(defense, loader, epochs=10, optimizer=optimizer, progress=False)
        defense.eval()
    return made


def left(defense: pd.Defense, points: Inputs, y: Labels) -> np.ndarray:
    """Whether the mean of 50 fresh draws is right, the mean of four such verdicts."""
    logits = [draw_keyed(defense, points, 50, 1000 + seed) for seed in range(4)]
    return torch.stack([(mean_prob(one).argmax(-1) == y).double() for one in logits]).mean(0).numpy()


def main(count: int = 200, gradients: int = 160) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = (part[:count] for part in pd.data.digits()[1].tensors)
    print(f"{count} digits, l-inf, eps {EPS}, {gradients} gradients; plain EOT has {DRAWS} draws a step")
    for name, defense in defenses().items():
        torch.manual_seed(0)
        plain = left(defense, averaged()(defense, x, y, gradients), y)
        print(f"{name}: plain EOT leaves {100 * plain.mean():.1f} %", flush=True)
        for label, variant in VARIANTS.items():
            gain = plain - left(defense, variant(defense, x, y, gradients), y)
            half = 1.96 * gain.std(ddof=1) / math.sqrt(count)
            print(f"  {label:30s} {100 * gain.mean():+6.1f} +- {100 * half:.1f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
