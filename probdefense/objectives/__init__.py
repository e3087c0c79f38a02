r"""What training minimizes, in nats per example: ``objective(defense, x, y) -> scalar``.

An objective sees a defense through `Defense.step` alone, so every objective trains every defense.
`elbo` is an objective; every other name here takes settings and returns one. Keyword arguments given
to a returned objective pass through to the one inside, so a schedule reaches the ELBO in the middle.
"""

from probdefense.objectives.adversarial import adversarial, mixed, warm_up
from probdefense.objectives.augmentation import gaussian_augmented
from probdefense.objectives.distillation import distilled
from probdefense.objectives.elbo import Schedule, elbo, multi_sample
from probdefense.objectives.information import information_gain
from probdefense.objectives.module import LossModule
from probdefense.objectives.rewards import alignment, entropy, harmonic, rewarded, root_scale
from probdefense.objectives.smoothing import consistency, smooth_adversarial, stability
from probdefense.objectives.svgd import stein_direction, svgd
from probdefense.objectives.trades import trades

__all__ = [
    "LossModule",
    "Schedule",
    "adversarial",
    "alignment",
    "consistency",
    "distilled",
    "elbo",
    "entropy",
    "gaussian_augmented",
    "harmonic",
    "information_gain",
    "mixed",
    "multi_sample",
    "rewarded",
    "root_scale",
    "smooth_adversarial",
    "stability",
    "stein_direction",
    "svgd",
    "trades",
    "warm_up",
]
