"""What is put on a trained network: other activations, and learning at run time."""

from functools import partial

from probdefense import attacks, defenses
from probdefense.adaptation.cleansing import rmc
from probdefense.defenses.jump_relu import quantiles
from probdefense.study import opponents
from probdefense.study.workshop import Workshop, recipe
from probdefense.types import LogitsFn


@recipe(
    "jump_relu",
    about="JumpReLU on the Madry network (Erichson et al., 2020)",
    opponent=opponents.through_jumps,
    base="madry",
    learning_rate=None,
)
def jump_relu(shop: Workshop, share: float = 0.3) -> LogitsFn:
    """A threshold at a quantile of each layer's activations."""
    trained = shop.make("madry")
    return defenses.jump_relu(trained, kappa=quantiles(trained, shop.images(), share=share)).eval()


@recipe(
    "rmc",
    about="runtime masking and cleansing on the Madry network (Wu et al., 2020)",
    opponent=opponents.greedy_models,
    base="madry",
    learning_rate=None,
)
def runtime_cleansing(
    shop: Workshop, num_neighbors: int = 64, max_epochs: int = 5, group: int = 10
) -> LogitsFn:
    """The network learns from neighbors of what comes."""
    return rmc(
        shop.make("madry"),
        shop.data.train,
        attack=partial(attacks.pgd, eps=shop.eps, norm=shop.norm, num_steps=10, step_size=shop.eps / 5),
        num_neighbors=num_neighbors,
        max_epochs=max_epochs,
        learning_rate=1e-3,
        group=group,
        seed=shop.seed,
    )
