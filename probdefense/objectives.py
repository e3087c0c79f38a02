r"""What training minimizes, in nats per example: ``objective(defense, x, y) -> scalar``.

An objective sees a defense through `Defense.step` alone, so every objective trains every defense.
`elbo` is an objective; every other name here takes settings and returns one. Keyword arguments given
to a returned objective pass through to the one inside, so a schedule reaches the ELBO in the middle.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from probdefense.types import Attack, Inputs, Labels, Objective
from probdefense.validation import check_count


def elbo(
    defense: Any,
    x: Inputs,
    y: Labels,
    *,
    kl_weight: float | Mapping[str, float] = 1.0,
    num_particles: int = 1,
) -> Tensor:
    r"""The negative evidence lower bound, in nats per example.

    $$ -\frac1B \sum_i \log p(y_i|x_i) + \sum_f w_f \frac{\mathrm{KL}_f}{N} $$

    Times `num_data` it equals Pyro's ``TraceMeanField_ELBO``. The KL covers every element of every
    site, once per data set, so ordinary learning rates hold. With nothing random it is cross-entropy.

    Args:
        defense: A `Defense`.
        x: ``(batch, *event)``.
        y: ``(batch,)``.
        kl_weight: The temperature, one number or one per site; names may be patterns such as
            ``"*.noise"``, and sites that no pattern matches keep weight 1. Zero is allowed.
        num_particles: Draws to average over.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: a KL term without a known `num_data`, or a negative weight.

    References:
        Blundell et al., 2015, [Weight Uncertainty in Neural Networks](https://arxiv.org/abs/1505.05424)

    Example:
        >>> import probdefense as pd
        >>> defense = pd.defenses.bayesian(torch.nn.Linear(4, 3), num_data=100)
        >>> elbo(defense, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_count("num_particles", num_particles)
    losses = []
    for _ in range(num_particles):
        step = defense.step(x, y)
        losses.append(-step.log_lik.mean() + weighted_kl(defense, step.kl, kl_weight))
    return sum(losses[1:], losses[0]) / num_particles


def adversarial(
    objective: Objective, attack: Attack, *, num_samples: int = 1, same_draw: bool = False
) -> Objective:
    r"""Trains on attacked inputs, $\min_\phi \mathbb{E}\, \ell(\phi, x + \delta^*(x), y)$.

    With `elbo` this is adversarial SVI (Adv-BNN); with nothing random it is PGD training. The inner
    attack never moves running statistics, and its result counts as a constant (Danskin).

    Args:
        objective: What is minimized at the attacked point, `elbo` for example.
        attack: ``attack(logits_fn, x, y) -> x_adv``, such as ``partial(pgd, eps=0.2, num_steps=7)``.
        num_samples: Draws per step that the attack averages its loss over, independent of the draw
            that is then trained.
        same_draw: Whether the attack sees the very draw that is then trained.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        ValueError: `num_samples` above 1 together with `same_draw`.

    References:
        Madry et al., 2018, [Towards Deep Learning Models Resistant to Adversarial
        Attacks](https://arxiv.org/abs/1706.06083); Liu et al., 2019,
        [Adv-BNN](https://arxiv.org/abs/1810.01279)

    Example:
        >>> import probdefense as pd
        >>> from functools import partial
        >>> madry = adversarial(elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=2))
        >>> defense = pd.deterministic(torch.nn.Linear(4, 3))
        >>> madry(defense, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_count("num_samples", num_samples)
    if same_draw and num_samples > 1:
        raise ValueError("expected num_samples=1 with same_draw=True: one draw is attacked and trained")

    def adversarial_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        if not same_draw:
            return objective(defense, attack(defense.samples(num_samples), x, y), y, **options)
        draws = defense.draw(x)
        detached = {name: value.detach() for name, value in draws.items()}
        x_adv = attack(defense.at(detached), x, y)
        return objective(_AtDraws(defense, draws), x_adv, y, **options)

    return adversarial_objective


class _AtDraws:
    """A defense whose training forward uses given draws."""

    def __init__(self, defense: Any, draws: dict[str, Tensor]):
        self._defense, self._draws = defense, draws

    def step(self, x: Inputs, y: Labels) -> Any:
        return self._defense.step(x, y, draws=self._draws)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._defense, name)


class LossModule(nn.Module):
    """A module whose forward is the objective: what to compile, or to wrap for distributed training.

    ``DistributedDataParallel(LossModule(defense, objective))`` synchronizes gradients; wrapping the
    defense and calling the objective on it would not, without an error.

    Args:
        defense: A `Defense`.
        objective: ``objective(defense, x, y) -> scalar``.

    Example:
        >>> import probdefense as pd
        >>> loss = LossModule(pd.deterministic(torch.nn.Linear(4, 3)), elbo)
        >>> loss(torch.rand(8, 4), torch.zeros(8).long()).requires_grad
        True
    """

    def __init__(self, defense: nn.Module, objective: Objective = elbo):
        super().__init__()
        self.defense, self.objective = defense, objective

    def forward(self, x: Inputs, y: Labels, **options: Any) -> Tensor:
        """The objective, a scalar in nats per example."""
        return self.objective(self.defense, x, y, **options)


def weighted_kl(
    defense: Any, kl: Mapping[str, Tensor], weight: float | Mapping[str, float]
) -> Tensor | float:
    """KL terms times their weights, in nats per example.

    Raises:
        ValueError: a KL term without a known `num_data`, or a negative weight.
    """
    terms = [(weight_of(name, weight), value) for name, value in kl.items()]
    terms = [(w, value) for w, value in terms if w != 0]
    if not terms:
        return 0.0
    if defense.num_data is None:
        raise ValueError(
            f"the KL of {', '.join(kl)} counts once per data set, so its size is needed; "
            "build the defense with num_data=len(train_set)"
        )
    return sum(w * value for w, value in terms) / defense.num_data


def weight_of(site: str, weight: float | Mapping[str, float]) -> float:
    """The KL weight of a site: the number, or that of the first pattern that matches its name."""
    if isinstance(weight, Mapping):
        weight = next((w for pattern, w in weight.items() if fnmatchcase(site, pattern)), 1.0)
    if weight < 0:
        raise ValueError(f"expected kl_weight >= 0, got {weight} for site {site!r}")
    return weight


Schedule = Callable[[float], float]
"""A multiplier as a function of training progress in [0, 1]."""
