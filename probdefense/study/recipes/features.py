"""Noise on the features that the last layer reads, and what pays for it."""

from probdefense import defenses
from probdefense.objectives import alignment, elbo, entropy, rewarded
from probdefense.study import opponents
from probdefense.study.workshop import Workshop, recipe
from probdefense.types import LogitsFn


@recipe(
    "wca",
    about="correlated noise on features, rewarded along the weights (Eustratiadis et al., 2021)",
    opponent=opponents.matched_loss,
)
def wca(shop: Workshop, weight: float = 0.1) -> LogitsFn:
    """Trained on clean images; the weight is that of one class of ten in the paper's loss."""
    made = defenses.wca(shop.net(), num_data=shop.num_data)
    return shop.fit(made, rewarded(elbo, weight, reward=alignment))


@recipe(
    "conditional",
    about="noise on features whose mean and scale depend on them (Yu et al., 2021)",
    opponent=opponents.matched_loss,
)
def conditional(shop: Workshop, weight: float = 0.01, hidden: int = 16) -> LogitsFn:
    """Trained on clean images, with a reward for the entropy of the noise."""
    made = defenses.conditional_noise(shop.net(), hidden=hidden, num_data=shop.num_data)
    return shop.fit(made, rewarded(elbo, weight, reward=entropy))
