"""What recipes are made of: the workshop that they share, their table, and the decorator that adds a row.

A recipe is a function that turns a `Workshop` (data, radius, epochs, seed) into a trained `LogitsFn`. The
command ``probdefense compare`` is a loop over the table.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from probdefense import attacks, models
from probdefense.core.defense import Defense, deterministic
from probdefense.data import Split
from probdefense.objectives import elbo, warm_up
from probdefense.rng import derive, forked
from probdefense.study.opponents import Opponent, step_control
from probdefense.training.averages import ema
from probdefense.training.loop import fit
from probdefense.types import Attack, LogitsFn, Objective
from probdefense.validation import check_member

Make = TypeVar("Make", bound=Callable[..., Any])

BATCH = 64
INNER_STEPS = 4
DECAY = 0.99
"""Of the average of weights that every recipe ends with."""

WARM_UP = 5 / 46
"""Share of the training in which the radius of its attack grows: 5 of the 46 epochs on digits."""

UNTUNED = 4e-3
"""Learning rate of every recipe on data that no sweep was made on: what suits digits may be too high."""

VALIDATION = (
    "learning rates are the best of 0.004, 0.008, 0.016 and 0.032 by the mean of clean accuracy and accuracy "
    "under the suite on 287 of the training digits, after 24 epochs on the others "
    "(benchmarks/tuning.py)"
)
"""How the learning rates of the table were found."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        about: What it is, in one line.
        make: Trains it.
        opponent: The attack made for it.
        learning_rate: Of its training on digits: the best of one sweep, the same for all
            (``benchmarks/tuning.py``); None if it trains nothing itself.
        cost: Gradients per training step, so that the longest trainings start first.
        base: The recipe that it goes on from.
        notes: From its arguments to what its rows of a report say besides: prior and KL weight.
    """

    about: str
    make: Callable[..., LogitsFn]
    opponent: Opponent = step_control
    learning_rate: float | None = None
    cost: int = 1
    base: str | None = None
    notes: Callable[..., dict[str, Any]] = dict

    @property
    def arguments(self) -> dict[str, Any]:
        """What its function takes after the workshop, with the values by default."""
        taken = list(inspect.signature(self.make).parameters.values())[1:]
        return {each.name: each.default for each in taken if each.kind is not each.VAR_KEYWORD}


RECIPES: dict[str, Recipe] = {}
"""By name, in the order of the catalog."""


def recipe(
    name: str,
    *,
    about: str,
    opponent: Opponent = step_control,
    learning_rate: float | None = UNTUNED,
    cost: int = 1,
    base: str | None = None,
    notes: Callable[..., dict[str, Any]] = dict,
) -> Callable[[Make], Make]:
    """Makes a function a recipe of ``probdefense compare``, a defense that can be named there.

    The function takes a `Workshop` (``shop.net()`` is a fresh network, ``shop.fit(defense, objective)``
    trains, ``shop.inner_attack()`` is the attack of adversarial training, ``shop.make("madry")`` another
    recipe's defense) and returns a trained `LogitsFn`. Further arguments have defaults, which study files
    may change.

    Args:
        name: What it is called; rows of reports have it.
        about: What it is, in one line, for the catalog.
        opponent: From a defense and a number of gradients per image to the attack made for it, which
            ``--attacks adaptive`` runs.
        learning_rate: Of its training; None if it trains nothing itself.
        cost: Gradients per training step, so that the longest trainings start first.
        base: The recipe that it goes on from.
        notes: From its arguments to what its rows say besides.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        ValueError: a name that is taken, or that no option could hold.

    Examples:
        >>> import probdefense as pd
        >>> @recipe("quiet_rse", about="RSE with half the noise")
        ... def quiet_rse(shop, sigma_init=0.1):
        ...     return shop.fit(pd.defenses.rse(shop.net(), sigma_init=sigma_init, sigma_inner=0.05))
        >>> RECIPES["quiet_rse"].arguments
        {'sigma_init': 0.1}
        >>> del RECIPES["quiet_rse"]
    """
    if not isinstance(name, str) or not name.isidentifier() or name == "all":
        raise ValueError(
            f"expected the name of a recipe as letters, digits and underscores, got {name!r}; it is used "
            "after --defenses"
        )

    def registered(make: Make) -> Make:
        known = RECIPES.get(name)
        if known is not None and _place(known.make) != _place(make):
            raise ValueError(
                f"expected a new name for a recipe, got {name!r}, which is {known.about!r}; choose another"
            )
        RECIPES[name] = Recipe(about, make, opponent, learning_rate, cost, base, notes)
        return make

    return registered


def _place(make: Callable[..., Any]) -> tuple[str, str]:
    """Where a function was written: a file that is run again replaces its recipes."""
    return make.__module__, make.__qualname__


def learning_rates(data: str) -> dict[str, float]:
    """By recipe, of those that train: the best of the sweep on digits, one for all on other data."""
    rates = {name: recipe.learning_rate for name, recipe in RECIPES.items()}
    return {name: rate if data == "digits" else UNTUNED for name, rate in rates.items() if rate is not None}


@dataclass
class Workshop:
    """What recipes share: the data, the threat model, the time to spend, and what is made already.

    Attributes:
        data: Training and test set.
        eps: Radius of adversarial training, l-inf, in pixels.
        epochs: Of every training.
        seed: Of every training; each recipe has its own stream.
        rates: Learning rates by recipe; those for digits where absent.
        made: What is trained already, by recipe.
        rate: The learning rate of the recipe that is being made.
    """

    data: Split
    eps: float
    epochs: int
    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0

    @property
    def num_data(self) -> int:
        """Size of the training set."""
        return len(self.data.train)

    def make(self, name: str) -> Any:
        """The defense of a recipe, trained once; what is trained does not depend on the order."""
        if name not in self.made:
            check_member("defense", name, RECIPES)
            rate = self.rates.get(name, RECIPES[name].learning_rate or 0.0)
            with forked(derive(self.seed, "recipe", name)):
                self.made[name] = RECIPES[name].make(replace(self, rate=rate))
        return self.made[name]

    def net(self) -> nn.Module:
        """A fresh network for the data."""
        x, y = self.data.train.tensors
        return models.small_cnn(in_channels=x.shape[1], num_classes=int(y.max()) + 1)

    def plain(self) -> Defense:
        """A fresh network without randomness."""
        return deterministic(self.net())

    def fit(self, defense: Defense, objective: Objective = elbo) -> Defense:
        """Trains a defense by Adam with a cosine schedule and an average of weights, as every recipe does."""
        loader = DataLoader(self.data.train, batch_size=BATCH, shuffle=True)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=self.rate, fused=True)
        fit(
            defense,
            loader,
            epochs=self.epochs,
            objective=objective,
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs),
            average=ema(DECAY),
        )
        return defense.eval()

    def warming(self, attack: Attack) -> Attack:
        """An attack of one training, whose radius grows in its first steps."""
        steps = WARM_UP * self.epochs * math.ceil(self.num_data / BATCH)
        return warm_up(attack, eps=self.eps, num_steps=max(1, round(steps)))

    def inner_attack(self) -> Attack:
        """The inner maximization of adversarial training, from a random start."""
        return self.warming(partial(attacks.pgd, num_steps=INNER_STEPS))
