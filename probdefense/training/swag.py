r"""SWAG: a normal posterior from the weights that training walks through.

Maddox et al., 2019, [A Simple Baseline for Bayesian Uncertainty in Deep
Learning](https://arxiv.org/abs/1902.02476). With a high constant learning rate the iterates of SGD move about
the optimum as draws of a distribution; their mean, their variances and their last $K$ deviations make

$$ q(\theta) = N\Big(\bar\theta,\; \tfrac12 \mathrm{diag}(\overline{\theta^2} - \bar\theta^2)
   + \tfrac{1}{2(K-1)} \hat D \hat D^\top\Big), \qquad \hat D_i = \theta_i - \bar\theta_i $$
"""

from typing import Any

import torch
from torch import Tensor

from probdefense.training.history import History
from probdefense.validation import check_count

TINY = 1e-15
"""The smallest standard deviation, as in the paper's code (a variance of 1e-30)."""


class Swag:
    """Collects weights at the ends of epochs, as a callback of `fit`; `defense` makes a posterior of them.

    Train with a constant (or cyclic) learning rate and without ``average=``, which would show it averages.
    The paper leaves open what running statistics of BatchNorm belong to a draw; its code takes them anew for
    each. Here they are one for all: call `recalibrate` on what `defense` returns.

    Args:
        start: Epochs that are not collected.
        every: Epochs from one collected state to the next.
        max_rank: $K$, how many of the last deviations are kept.

    Raises:
        TypeError: not whole numbers.
        ValueError: `start` below 0, `every` below 1 or `max_rank` below 2.

    References:
        Maddox et al., 2019, [A Simple Baseline for Bayesian Uncertainty in Deep
        Learning](https://arxiv.org/abs/1902.02476)

    Examples:
        >>> import probdefense as pd
        >>> net, swag = pd.deterministic(torch.nn.Linear(4, 3)), Swag(start=1, every=1, max_rank=3)
        >>> batches = [(torch.rand(8, 4), torch.zeros(8).long())]
        >>> _ = pd.fit(net, batches, epochs=5, callbacks=[swag], progress=False)
        >>> swag.count, swag.defense()(torch.rand(2, 4), num_samples=7).shape
        (4, torch.Size([7, 2, 3]))
    """

    def __init__(self, start: int, every: int = 1, max_rank: int = 20):
        self.start, self.every = check_count("start", start, 0), check_count("every", every)
        self.max_rank = check_count("max_rank", max_rank, 2)
        self.source: Any = None
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None
        self.deviations: list[Tensor] = []

    def begin(self, defense: Any) -> None:
        """Takes the defense whose weights are collected, and forgets what it had."""
        self.source = defense
        self.load_state_dict({})

    def __call__(self, epoch: int, history: History) -> None:
        """Collects the weights, if it is their turn."""
        if epoch < self.start or (epoch - self.start) % self.every:
            return
        theta = torch.cat([value.detach().flatten() for value in self._weights().values()])
        self.count += 1
        before = torch.zeros_like(theta) if self.mean is None else self.mean
        self.mean = before + (theta - before) / self.count
        apart = (theta - before) * (theta - self.mean)
        self.squares = apart if self.squares is None else self.squares + apart
        self.deviations = [*self.deviations, theta - self.mean][-self.max_rank :]

    def defense(self) -> Any:
        """The posterior, over the trained parameters of the network, as a `Defense`.

        Returns:
            A copy of the defense that was trained, with one more site, ``"weights"``.

        Raises:
            ValueError: fewer than two states.
        """
        if self.count < 2 or self.mean is None or self.squares is None:
            raise ValueError(
                f"expected at least two collected states, got {self.count}; pass it to fit(callbacks=) and "
                f"train beyond epoch {self.start + self.every}"
            )
        rank = len(self.deviations)
        made = self.source.rebuilt("gaussian", names=list(self._weights()), rank=rank)
        posterior = list(made.guide.posteriors.values())[-1]
        scale = (self.squares / self.count / 2).sqrt().clamp_min(TINY)
        factor = torch.stack(self.deviations, dim=1) / (2 * (rank - 1)) ** 0.5
        posterior.take(self.mean, scale, factor)
        return made

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        names = ("count", "mean", "squares", "deviations")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to such a state."""
        self.count, self.mean = state.get("count", 0), state.get("mean")
        self.squares, self.deviations = state.get("squares"), list(state.get("deviations", ()))

    def _weights(self) -> dict[str, Tensor]:
        if self.source is None:
            raise ValueError("expected a training, found none has begun; pass it to fit(callbacks=[swag])")
        return {name: p for name, p in self.source.net.named_parameters() if p.requires_grad}
