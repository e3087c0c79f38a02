"""The systems of the table, each as one recipe: what is random, what is minimized, what attacks it.

A recipe turns a `Workshop` (data, radius, epochs, seed) into a trained `LogitsFn`. The command
``probdefense compare`` is a loop over this table; to add a row, add a recipe.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
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
)
from probdefense.rng import derive, forked
from probdefense.study import opponents
from probdefense.training.loop import fit
from probdefense.types import Attack, LogitsFn, Objective
from probdefense.validation import check_member

BATCH = 64
LEARNING_RATE = 4e-3
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
    """

    data: Split
    eps: float
    epochs: int
    seed: int = 0
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def num_data(self) -> int:
        """Size of the training set."""
        return len(self.data.train)

    def make(self, name: str) -> Any:
        """The defense of a recipe, trained once; what is trained does not depend on the order."""
        if name not in self.made:
            check_member("defense", name, RECIPES)
            with forked(derive(self.seed, "recipe", name)):
                self.made[name] = RECIPES[name].make(self)
        return self.made[name]

    def net(self) -> nn.Module:
        """A fresh network for the data."""
        x, y = self.data.train.tensors
        return models.small_cnn(in_channels=x.shape[1], num_classes=int(y.max()) + 1)

    def plain(self) -> Defense:
        """A fresh network without randomness."""
        return deterministic(self.net())

    def fit(self, defense: Defense, objective: Objective = elbo) -> Defense:
        """Trains a defense by Adam with a cosine schedule."""
        loader = DataLoader(self.data.train, batch_size=BATCH, shuffle=True)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=LEARNING_RATE, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        fit(defense, loader, epochs=self.epochs, objective=objective, optimizer=optimizer, schedule=schedule)
        return defense.eval()

    def inner_attack(self, num_steps: int = 4) -> Attack:
        """The inner maximization of adversarial training, from a random start."""
        return partial(attacks.pgd, eps=self.eps, num_steps=num_steps, step_size=2 * self.eps / num_steps)


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        about: What it is, in one line.
        make: Trains it.
        opponent: The attack made for it.
        notes: Prior and KL weight of Bayesian rows.
    """

    about: str
    make: Callable[[Workshop], LogitsFn]
    opponent: opponents.Opponent = opponents.step_control
    notes: dict[str, Any] = field(default_factory=dict)


def _none(shop: Workshop) -> LogitsFn:
    return shop.fit(shop.plain())


def _fgsm_retraining(shop: Workshop) -> LogitsFn:
    trained = copy.deepcopy(shop.make("none"))
    return shop.fit(trained, mixed(elbo, partial(attacks.fgsm, eps=shop.eps), probability=0.5))


def _distillation(shop: Workshop) -> LogitsFn:
    teacher = shop.fit(shop.plain(), distilled(None, TEMPERATURE))
    return shop.fit(shop.plain(), distilled(teacher, TEMPERATURE))


def _brelu(shop: Workshop) -> LogitsFn:
    return shop.fit(defenses.brelu(shop.net()), gaussian_augmented(elbo, sigma=shop.eps / 2))


def _madry(shop: Workshop) -> LogitsFn:
    return shop.fit(shop.plain(), adversarial(elbo, shop.inner_attack()))


def _fast(shop: Workshop) -> LogitsFn:
    one_step = partial(attacks.fgsm, eps=shop.eps, random_start=True)
    return shop.fit(shop.plain(), adversarial(elbo, one_step))


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
        attack=shop.inner_attack(num_steps=10),
        num_neighbors=64,
        max_epochs=5,
        learning_rate=1e-3,
        group=10,
        seed=shop.seed,
    )


BAYES = {"prior": "Normal(0, 1)", "kl_weight": 1.0}

RECIPES: dict[str, Recipe] = {
    "none": Recipe("no defense: a plain network", _none),
    "fgsm_retraining": Recipe(
        "a trained network, trained on with FGSM half the time (Goodfellow et al., 2015)", _fgsm_retraining
    ),
    "distillation": Recipe(
        "defensive distillation at T = 40 (Papernot et al., 2016)", _distillation, opponents.scale_free
    ),
    "brelu": Recipe(
        "bounded ReLU and Gaussian augmentation (Zantedeschi et al., 2017)", _brelu, opponents.past_ceilings
    ),
    "madry": Recipe("PGD adversarial training (Madry et al., 2018)", _madry),
    "fast": Recipe("adversarial training by one random FGSM step (Wong et al., 2020)", _fast),
    "trades": Recipe("TRADES: clean loss and KL to attacked answers (Zhang et al., 2019)", _trades),
    "rse": Recipe(
        "Random Self-Ensemble: noise before every convolution (Liu et al., 2018)",
        _rse,
        opponents.matched_loss,
    ),
    "khan": Recipe(
        "every weight a learned distribution, no prior (Khan et al., 2019)",
        _khan,
        opponents.matched_loss,
        {"prior": "none", "kl_weight": 0.0},
    ),
    "bayesian": Recipe(
        "Bayes by backprop: mean-field weights (Blundell et al., 2015)",
        _bayesian,
        opponents.matched_loss,
        BAYES,
    ),
    "adv_bnn": Recipe(
        "mean-field weights, adversarial ELBO (Liu et al., 2019)", _adv_bnn, opponents.matched_loss, BAYES
    ),
    "pni": Recipe("trained weight noise, half adversarial (He et al., 2019)", _pni, opponents.matched_loss),
    "mc_dropout": Recipe(
        "dropout masks at test time (Gal and Ghahramani, 2016)", _mc_dropout, opponents.matched_loss
    ),
    "ensemble": Recipe(
        "four networks, averaged (Lakshminarayanan et al., 2017)", _ensemble, opponents.member_by_member
    ),
    "jump_relu": Recipe(
        "JumpReLU on the Madry network (Erichson et al., 2020)", _jump_relu, opponents.through_jumps
    ),
    "rmc": Recipe(
        "runtime masking and cleansing on the Madry network (Wu et al., 2020)", _rmc, opponents.greedy_models
    ),
}
