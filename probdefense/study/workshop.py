"""What recipes are made of: the workshop that they share, their table, and the decorator that adds a row.

A recipe is a function that turns a `Workshop` (data, radius, epochs, seed) into a trained `LogitsFn`. The
command ``probdefense compare`` is a loop over the table.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from probdefense import attacks
from probdefense.core.defense import Defense, deterministic
from probdefense.data import Split, augmented
from probdefense.evaluation.examples import gather
from probdefense.objectives import elbo, warm_up
from probdefense.rng import derive, forked
from probdefense.study.nets import Facts, facts_of, net_of
from probdefense.study.opponents import Opponent, step_control
from probdefense.study.plans import PLANS, SMOKE, UNTUNED, Plan
from probdefense.training import History, loop
from probdefense.training.averages import ema
from probdefense.training.loop import fit
from probdefense.types import Attack, Inputs, LogitsFn, Norm, Objective
from probdefense.validation import check_member

Make = TypeVar("Make", bound=Callable[..., Any])

DIGITS = PLANS["digits"]
BATCH, INNER_STEPS, DECAY, WARM_UP = (
    DIGITS.batch_size,
    DIGITS.inner_steps,
    DIGITS.weight_average,
    DIGITS.warm_up,
)
"""Of the training on digits."""

VALIDATION = (
    "learning rates are the best of 0.004, 0.008, 0.016 and 0.032 by the mean of clean accuracy and accuracy "
    "under the suite on 287 of the training digits, after 24 epochs on the others "
    "(benchmarks/tuning.py)"
)
"""How the learning rates of the table were found."""


def _no_notes(**_: Any) -> dict[str, Any]:
    return {}


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
        attacked: Whether it trains under attack, which may take other epochs and another rate.
    """

    about: str
    make: Callable[..., LogitsFn]
    opponent: Opponent = step_control
    learning_rate: float | None = None
    cost: int = 1
    base: str | None = None
    notes: Callable[..., dict[str, Any]] = _no_notes
    attacked: bool = False

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
    notes: Callable[..., dict[str, Any]] = _no_notes,
    attacked: bool = False,
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
        attacked: Whether it trains under attack, which on some data takes other epochs and another rate.

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
        RECIPES[name] = Recipe(about, make, opponent, learning_rate, cost, base, notes, attacked)
        return make

    return registered


def _place(make: Callable[..., Any]) -> tuple[str, str]:
    """Where a function was written: a file that is run again replaces its recipes."""
    return make.__module__, make.__qualname__


class Variant(NamedTuple):
    """A recipe or an attack with arguments of its own, under a name of its own."""

    of: str
    arguments: dict[str, Any]
    epochs: int | None = None
    learning_rate: float | None = None


def learning_rates(data: str) -> dict[str, float]:
    """By recipe, of those that train: the best of the sweep on digits, that of the plan on other data."""
    plan = PLANS.get(data, SMOKE)
    return {
        name: plan.rate(recipe.learning_rate, recipe.attacked)
        for name, recipe in RECIPES.items()
        if recipe.learning_rate is not None
    }


@dataclass
class Workshop:
    """What recipes share: the data, the threat model, the time to spend, and what is made already.

    Attributes:
        data: Training and test set.
        eps: Radius of adversarial training, l-inf, in pixels.
        epochs: Of every training.
        seed: Of every training; each recipe has its own stream.
        rates: Learning rates by recipe; those for digits where absent.
        made: What is trained already, by name.
        rate: The learning rate of the recipe that is being made.
        plan: The rest of the training.
        variants: Recipes with arguments of their own, by the name of their rows.
        norm: Of the threat model.
        fabric: The processes that train together, None for this one.
        device: Where defenses are trained; where they are made if None.
        attacked_epochs: Of trainings under attack; `epochs` if None.
        length: The epochs of the recipe that is being made; `epochs` if 0.
        facts: The shape of an image and the number of classes, read from the data.
    """

    data: Split
    eps: float
    epochs: int
    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    plan: Plan = DIGITS
    variants: Mapping[str, Variant] = field(default_factory=dict)
    norm: Norm = math.inf
    fabric: Any = None
    device: torch.device | None = None
    attacked_epochs: int | None = None
    length: int = 0
    facts: Facts = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.facts = self.facts or facts_of(self.data.train)

    @property
    def num_data(self) -> int:
        """Size of the training set."""
        return len(self.data.train)

    def make(self, name: str) -> Any:
        """The defense of a recipe, trained once; what is trained does not depend on the order."""
        if name not in self.made:
            asked = self.variants.get(name, Variant(name, {}))
            check_member("defense", asked.of, RECIPES)
            recipe = RECIPES[asked.of]
            rate = asked.learning_rate or self.rates.get(asked.of, recipe.learning_rate or 0.0)
            length = asked.epochs or (recipe.attacked and self.attacked_epochs) or self.epochs
            with forked(derive(self.seed, "recipe", name)):
                self.made[name] = recipe.make(replace(self, rate=rate, length=length), **asked.arguments)
        return self.made[name]

    def net(self) -> nn.Module:
        """A fresh network for the data."""
        return net_of(self.plan.net, self.facts)

    def images(self, count: int = 2000) -> Inputs:
        """Training images, so many at most, for what looks at activations."""
        x = gather(Subset(self.data.train, range(min(count, self.num_data))))[0]
        return x if self.device is None else x.to(self.device)

    def plain(self) -> Defense:
        """A fresh network without randomness."""
        return deterministic(self.net())

    def fit(self, defense: Defense, objective: Objective = elbo) -> Defense:
        """Trains a defense by Adam with a cosine schedule and an average of weights, as every recipe does."""
        plan, loader, epochs = self.plan, self.batches(), self.length or self.epochs
        if self.device is not None:
            defense.to(self.device)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=self.rate, fused=True)
        fit(
            defense,
            loader,
            epochs=epochs,
            objective=objective,
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
            average=ema(plan.weight_average) if plan.weight_average else None,
            **({} if self.fabric is None else {"fabric": self.fabric}),
        )
        return defense.eval()

    def batches(self) -> DataLoader[Any]:
        """The training set in batches."""
        plan, train = self.plan, self.data.train
        if plan.crop or plan.flip:
            train = augmented(train, crop=plan.crop, flip=plan.flip)
        return DataLoader(train, batch_size=plan.batch_size, shuffle=True, num_workers=plan.workers)

    def walk(self, defense: Defense, callback: Any, *, epochs: int, rate: float) -> None:
        """Goes on from a trained defense by SGD at a constant rate; a callback sees the end of each epoch."""
        optimizer = torch.optim.SGD(defense.param_groups(), lr=rate, momentum=0.9)
        options = {} if self.fabric is None else {"fabric": self.fabric}
        loop.fit(defense, self.batches(), epochs=epochs, optimizer=optimizer, callbacks=[callback], **options)

    def warming(self, attack: Attack) -> Attack:
        """An attack of one training, whose radius grows in its first steps."""
        epochs, batches = self.length or self.epochs, math.ceil(self.num_data / self.plan.batch_size)
        steps = max(1, round(self.plan.warm_up * epochs * batches))
        return warm_up(partial(attack, norm=self.norm), eps=self.eps, num_steps=steps)

    def inner_attack(self) -> Attack:
        """The inner maximization of adversarial training, from a random start."""
        return self.warming(partial(attacks.pgd, num_steps=self.plan.inner_steps))


class Rehearsal(Workshop):
    """A workshop that trains nothing: whether a recipe takes its arguments shows before any work."""

    def fit(self, defense: Defense, objective: Objective = elbo) -> Defense:
        """The defense as it is."""
        return defense.eval()

    def walk(self, defense: Defense, callback: Any, *, epochs: int, rate: float) -> None:
        """Stands still."""
        callback.begin(defense)
        for epoch in range(epochs):
            callback(epoch, History())
