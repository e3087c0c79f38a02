"""The systems of the table, each as one recipe: what is random, what is minimized, what attacks it.

A recipe turns a `Workshop` (data, radius, epochs, seed) into a trained `LogitsFn`. The command
``probdefense compare`` is a loop over this table; to add a row, add a recipe.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from probdefense import attacks, defenses, models
from probdefense.adaptation.cleansing import rmc
from probdefense.core.defense import Defense, deterministic
from probdefense.data import Split
from probdefense.defenses.jump_relu import quantiles
from probdefense.objectives import (
    adversarial,
    distilled,
    elbo,
    gaussian_augmented,
    mixed,
    trades,
    warm_up,
)
from probdefense.rng import derive, forked
from probdefense.study import opponents
from probdefense.training.averages import ema
from probdefense.training.loop import fit
from probdefense.types import Attack, LogitsFn, Objective
from probdefense.validation import check_member

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

TEMPERATURE = 40.0
MEMBERS = 4


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
        notes: Prior and KL weight of Bayesian rows.
    """

    about: str
    make: Callable[[Workshop], LogitsFn]
    opponent: opponents.Opponent = opponents.step_control
    learning_rate: float | None = None
    cost: int = 1
    base: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def _none(shop: Workshop) -> LogitsFn:
    return shop.fit(shop.plain())


def _fgsm_retraining(shop: Workshop) -> LogitsFn:
    trained = copy.deepcopy(shop.make("none"))
    return shop.fit(trained, mixed(elbo, shop.warming(attacks.fgsm), probability=0.5))


def _distillation(shop: Workshop) -> LogitsFn:
    teacher = shop.fit(shop.plain(), distilled(None, TEMPERATURE))
    return shop.fit(shop.plain(), distilled(teacher, TEMPERATURE))


def _brelu(shop: Workshop) -> LogitsFn:
    return shop.fit(defenses.brelu(shop.net()), gaussian_augmented(elbo, sigma=shop.eps / 2))


def _madry(shop: Workshop) -> LogitsFn:
    return shop.fit(shop.plain(), adversarial(elbo, shop.inner_attack()))


def _fast(shop: Workshop) -> LogitsFn:
    one_step = partial(attacks.fgsm, random_start=True)
    return shop.fit(shop.plain(), adversarial(elbo, shop.warming(one_step)))


def _trades(shop: Workshop) -> LogitsFn:
    return shop.fit(shop.plain(), trades(shop.inner_attack(), beta=3.0))


def _rse(shop: Workshop) -> LogitsFn:
    return shop.fit(defenses.rse(shop.net()))


def _khan(shop: Workshop) -> LogitsFn:
    defense = defenses.bayesian(shop.net(), prior=None, num_data=shop.num_data)
    return shop.fit(defense, partial(elbo, kl_weight=0.0))


def _bayesian(shop: Workshop) -> LogitsFn:
    return shop.fit(defenses.bayesian(shop.net(), num_data=shop.num_data))


def _adv_bnn(shop: Workshop) -> LogitsFn:
    defense = defenses.bayesian(shop.net(), num_data=shop.num_data)
    return shop.fit(defense, adversarial(elbo, shop.inner_attack()))


def _pni(shop: Workshop) -> LogitsFn:
    return shop.fit(defenses.pni(shop.net()), mixed(elbo, shop.inner_attack(), weight=0.5))


def _mc_dropout(shop: Workshop) -> LogitsFn:
    return shop.fit(defenses.mc_dropout(shop.net(), rate=0.2))


def _ensemble(shop: Workshop) -> LogitsFn:
    return shop.fit(defenses.ensemble([shop.net() for _ in range(MEMBERS)]))


def _jump_relu(shop: Workshop) -> LogitsFn:
    trained, x = shop.make("madry"), shop.data.train.tensors[0]
    return defenses.jump_relu(trained, kappa=quantiles(trained, x, share=0.3)).eval()


def _rmc(shop: Workshop) -> LogitsFn:
    return rmc(
        shop.make("madry"),
        shop.data.train,
        attack=partial(attacks.pgd, eps=shop.eps, num_steps=10, step_size=shop.eps / 5),
        num_neighbors=64,
        max_epochs=5,
        learning_rate=1e-3,
        group=10,
        seed=shop.seed,
    )


BAYES = {"prior": "Normal(0, 1)", "kl_weight": 1.0}

RECIPES: dict[str, Recipe] = {
    "none": Recipe("no defense: a plain network", _none, learning_rate=8e-3),
    "fgsm_retraining": Recipe(
        "a trained network, trained on with FGSM half the time (Goodfellow et al., 2015)",
        _fgsm_retraining,
        base="none",
        learning_rate=16e-3,
    ),
    "distillation": Recipe(
        "defensive distillation at T = 40 (Papernot et al., 2016)",
        _distillation,
        opponents.scale_free,
        cost=2,
        learning_rate=32e-3,
    ),
    "brelu": Recipe(
        "bounded ReLU and Gaussian augmentation (Zantedeschi et al., 2017)",
        _brelu,
        opponents.past_ceilings,
        learning_rate=16e-3,
    ),
    "madry": Recipe("PGD adversarial training (Madry et al., 2018)", _madry, cost=5, learning_rate=16e-3),
    "fast": Recipe(
        "adversarial training by one random FGSM step (Wong et al., 2020)", _fast, cost=2, learning_rate=16e-3
    ),
    "trades": Recipe(
        "TRADES: clean loss and KL to attacked answers (Zhang et al., 2019)",
        _trades,
        cost=6,
        learning_rate=8e-3,
    ),
    "rse": Recipe(
        "Random Self-Ensemble: noise before every convolution (Liu et al., 2018)",
        _rse,
        opponents.matched_loss,
        learning_rate=32e-3,
    ),
    "khan": Recipe(
        "every weight a learned distribution, no prior (Khan et al., 2019)",
        _khan,
        opponents.matched_loss,
        notes={"prior": "none", "kl_weight": 0.0},
        learning_rate=16e-3,
    ),
    "bayesian": Recipe(
        "Bayes by backprop: mean-field weights (Blundell et al., 2015)",
        _bayesian,
        opponents.matched_loss,
        notes=BAYES,
        learning_rate=8e-3,
    ),
    "adv_bnn": Recipe(
        "mean-field weights, adversarial ELBO (Liu et al., 2019)",
        _adv_bnn,
        opponents.matched_loss,
        cost=5,
        notes=BAYES,
        learning_rate=4e-3,
    ),
    "pni": Recipe(
        "trained weight noise, half adversarial (He et al., 2019)",
        _pni,
        opponents.matched_loss,
        cost=6,
        learning_rate=8e-3,
    ),
    "mc_dropout": Recipe(
        "dropout masks at test time (Gal and Ghahramani, 2016)",
        _mc_dropout,
        opponents.matched_loss,
        learning_rate=8e-3,
    ),
    "ensemble": Recipe(
        "four networks, averaged (Lakshminarayanan et al., 2017)",
        _ensemble,
        opponents.member_by_member,
        cost=MEMBERS,
        learning_rate=8e-3,
    ),
    "jump_relu": Recipe(
        "JumpReLU on the Madry network (Erichson et al., 2020)",
        _jump_relu,
        opponents.through_jumps,
        base="madry",
    ),
    "rmc": Recipe(
        "runtime masking and cleansing on the Madry network (Wu et al., 2020)",
        _rmc,
        opponents.greedy_models,
        base="madry",
    ),
}


def learning_rates(data: str) -> dict[str, float]:
    """By recipe, of those that train: the best of the sweep on digits, one for all on other data."""
    rates = {name: recipe.learning_rate for name, recipe in RECIPES.items()}
    return {name: rate if data == "digits" else UNTUNED for name, rate in rates.items() if rate is not None}
