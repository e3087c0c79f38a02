"""Noise on inputs and activations."""

from typing import Literal

from probdefense import defenses
from probdefense.study import opponents
from probdefense.study.workshop import Workshop, recipe
from probdefense.types import LogitsFn


@recipe(
    "rse",
    about="Random Self-Ensemble: noise before every convolution (Liu et al., 2018)",
    opponent=opponents.matched_loss,
    learning_rate=32e-3,
)
def rse(
    shop: Workshop,
    sigma_init: float = 0.2,
    sigma_inner: float = 0.1,
    scale: Literal["fixed", "learned", "variational"] = "fixed",
) -> LogitsFn:
    """Trained under its own noise."""
    made = defenses.rse(
        shop.net(), num_data=shop.num_data, sigma_init=sigma_init, sigma_inner=sigma_inner, scale=scale
    )
    return shop.fit(made)
