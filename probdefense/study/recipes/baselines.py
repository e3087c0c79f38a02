"""Networks without randomness, by what they are trained on."""

import copy
from functools import partial

from probdefense import attacks, defenses
from probdefense.objectives import adversarial, distilled, elbo, gaussian_augmented, mixed, trades
from probdefense.study import opponents
from probdefense.study.workshop import Workshop, recipe
from probdefense.types import LogitsFn


@recipe("none", about="no defense: a plain network", learning_rate=8e-3)
def plain_network(shop: Workshop) -> LogitsFn:
    """Clean training."""
    return shop.fit(shop.plain())


@recipe(
    "fgsm_retraining",
    about="a trained network, trained on with FGSM half the time (Goodfellow et al., 2015)",
    base="none",
    learning_rate=16e-3,
)
def fgsm_retraining(shop: Workshop, probability: float = 0.5) -> LogitsFn:
    """A plain network goes on with some batches attacked."""
    trained = copy.deepcopy(shop.make("none"))
    return shop.fit(trained, mixed(elbo, shop.warming(attacks.fgsm), probability=probability))


@recipe(
    "distillation",
    about="defensive distillation at T = 40 (Papernot et al., 2016)",
    opponent=opponents.scale_free,
    cost=2,
    learning_rate=32e-3,
)
def distillation(shop: Workshop, temperature: float = 40.0) -> LogitsFn:
    """A student learns the soft answers of a teacher of its kind."""
    teacher = shop.fit(shop.plain(), distilled(None, temperature))
    return shop.fit(shop.plain(), distilled(teacher, temperature))


@recipe(
    "brelu",
    about="bounded ReLU and Gaussian augmentation (Zantedeschi et al., 2017)",
    opponent=opponents.past_ceilings,
    learning_rate=16e-3,
)
def brelu(shop: Workshop, ceiling: float = 1.0, sigma: float | None = None) -> LogitsFn:
    """Noise on training images, half the radius by default, before bounded activations."""
    noise = shop.eps / 2 if sigma is None else sigma
    return shop.fit(defenses.brelu(shop.net(), ceiling=ceiling), gaussian_augmented(elbo, sigma=noise))


@recipe(
    "madry", about="PGD adversarial training (Madry et al., 2018)", cost=5, learning_rate=16e-3, attacked=True
)
def madry(shop: Workshop) -> LogitsFn:
    """Training on attacked images."""
    return shop.fit(shop.plain(), adversarial(elbo, shop.inner_attack()))


@recipe(
    "fast",
    about="adversarial training by one random FGSM step (Wong et al., 2020)",
    cost=2,
    learning_rate=16e-3,
    attacked=True,
)
def fast(shop: Workshop) -> LogitsFn:
    """As `madry`, with one step."""
    one_step = partial(attacks.fgsm, random_start=True)
    return shop.fit(shop.plain(), adversarial(elbo, shop.warming(one_step)))


@recipe(
    "trades",
    about="TRADES: clean loss and KL to attacked answers (Zhang et al., 2019)",
    cost=6,
    learning_rate=8e-3,
    attacked=True,
)
def trades_training(shop: Workshop, beta: float = 3.0) -> LogitsFn:
    """Answers to attacked images are held to those to clean ones."""
    return shop.fit(shop.plain(), trades(shop.inner_attack(), beta=beta))
