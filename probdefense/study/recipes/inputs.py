"""Random changes of the input."""

from probdefense import defenses
from probdefense.study import opponents
from probdefense.study.workshop import Workshop, recipe
from probdefense.types import LogitsFn


@recipe(
    "random_transforms",
    about="four of eight random transforms of the image, in random order (Raff et al., 2019)",
    opponent=opponents.with_momentum,
)
def random_transforms(shop: Workshop, count: int = 4) -> LogitsFn:
    """Trained under its own transforms."""
    return shop.fit(defenses.random_transforms(shop.net(), count=count, num_data=shop.num_data))
