"""Posteriors over weights beside mean field: correlated, of iterates, of samples, in part, as particles."""

from probdefense import defenses
from probdefense.core.defense import Defense
from probdefense.objectives import adversarial, elbo, information_gain, svgd
from probdefense.study import opponents
from probdefense.study.workshop import Workshop, recipe
from probdefense.training import History, Swag, recalibrate
from probdefense.types import LogitsFn

WALK = 0.05
"""Learning rate of the SGD whose iterates are collected, with momentum 0.9."""


class Snapshots:
    """A callback that keeps the weights at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, object]] = []

    def begin(self, defense: Defense) -> None:
        """Takes the defense whose weights are kept."""
        self.net = defense.net

    def __call__(self, epoch: int, history: History) -> None:
        """Keeps the weights."""
        self.states.append({name: value.detach().clone() for name, value in self.net.state_dict().items()})


@recipe(
    "low_rank",
    about="weights with a low-rank plus diagonal posterior (Ong et al., 2018)",
    opponent=opponents.matched_loss,
    notes=lambda rank=8: {"prior": "Normal(0, 1)", "kl_weight": 1.0, "rank": rank},
    learning_rate=8e-3,
)
def low_rank(shop: Workshop, rank: int = 8) -> LogitsFn:
    """The ELBO of a posterior with correlations."""
    return shop.fit(defenses.bayesian(shop.net(), rank=rank, num_data=shop.num_data))


@recipe(
    "swag",
    about="SWAG: a normal through the iterates of SGD (Maddox et al., 2019)",
    opponent=opponents.matched_loss,
    learning_rate=8e-3,
)
def swag(shop: Workshop, states: int = 20, max_rank: int = 10, rate: float = WALK) -> LogitsFn:
    """Trained as all are, and then so many epochs on at a constant rate, whose ends are collected."""
    collected = Swag(start=0, every=1, max_rank=max_rank)
    shop.walk(shop.fit(shop.plain()), collected, epochs=states, rate=rate)
    made: Defense = collected.defense()
    if any(True for name, _ in made.net.named_buffers() if name.endswith("running_mean")):
        recalibrate(made, shop.batches())
    return made.eval()


@recipe(
    "from_samples",
    about="snapshots of SGD as a posterior (Huang et al., 2017; Izmailov et al., 2021)",
    opponent=opponents.matched_loss,
    learning_rate=8e-3,
)
def from_samples(shop: Workshop, states: int = 20, rate: float = WALK) -> LogitsFn:
    """Trained as all are, and then so many epochs on at a constant rate, of which every end is a sample."""
    kept = Snapshots()
    shop.walk(shop.fit(shop.plain()), kept, epochs=states, rate=rate)
    return defenses.from_samples(shop.net(), kept.states, num_data=shop.num_data).eval()


@recipe(
    "random_filters",
    about="half of the filters random, trained under attack (Dong and Xu, 2023; Ma et al., 2023)",
    opponent=opponents.matched_loss,
    cost=5,
    learning_rate=8e-3,
    attacked=True,
)
def random_filters(shop: Workshop, share: float = 0.5, floor: float = 0.1, ceiling: float = 1.0) -> LogitsFn:
    """Means and scales by adversarial training, as in CTRW."""
    made = defenses.random_filters(shop.net(), share, num_data=shop.num_data, floor=floor, ceiling=ceiling)
    return shop.fit(made, adversarial(elbo, shop.inner_attack()))


@recipe(
    "particles",
    about="four particles by Stein variational gradients (Liu and Wang, 2016)",
    opponent=opponents.member_by_member,
    cost=4,
    notes=lambda members=4, prior_scale=1.0: {"prior": f"Normal(0, {prior_scale:g})", "kl_weight": 1.0},
    learning_rate=8e-3,
)
def particles(shop: Workshop, members: int = 4, prior_scale: float = 1.0) -> LogitsFn:
    """Networks that climb the posterior and repel each other."""
    made = defenses.particles([shop.net() for _ in range(members)], num_data=shop.num_data)
    return shop.fit(made, svgd(prior_scale=prior_scale))


@recipe(
    "information_gain",
    about="particles that learn as much from attacked images as from clean ones (Doan et al., 2022)",
    opponent=opponents.member_by_member,
    cost=18,
    notes=lambda members=3, weight=1.0: {
        "prior": "Normal(0, 1)",
        "kl_weight": 1.0,
        "information_weight": weight,
    },
    learning_rate=8e-3,
    attacked=True,
)
def gain(shop: Workshop, members: int = 3, weight: float = 1.0) -> LogitsFn:
    """IG-BNN with the true Stein direction: adversarial loss and the gap in mutual information."""
    made = defenses.particles([shop.net() for _ in range(members)], num_data=shop.num_data)
    return shop.fit(made, svgd(information_gain(elbo, shop.inner_attack(), weight=weight)))
