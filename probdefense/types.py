"""The words every module shares: shapes, protocols and aliases, and no logic.

Axes are named in this order: ``(samples, batch, classes)``. Pixels are in [0, 1].
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import Dataset

Inputs = Tensor
"""Float images or features, ``(batch, *event)``, in [0, 1]."""

Labels = Tensor
"""True classes, int64, ``(batch,)``."""

Logits = Tensor
"""Unnormalized scores, ``(samples, batch, classes)``: one row per draw of the defense."""

Draws = dict[str, Tensor]
"""One joint draw of every random site, by site name."""

JOINT = " + "
"""Between the names of random sites that share one density, and so one KL term."""

Norm = float
"""1, 2 or ``inf``: the norm in which a perturbation is measured."""


@runtime_checkable
class LogitsFn(Protocol):
    """Anything that answers with logits on a sample axis: what attacks and evaluation see.

    The first axis of the answer is authoritative: 1 for a plain network, ``samples`` for a random
    one. The answer is differentiable in ``x`` and never averaged.
    """

    @property
    def stochastic(self) -> bool:
        """Whether two calls with the same ``x`` may differ."""
        ...

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """Logits of ``num_samples`` fresh draws, ``(samples, batch, classes)``."""
        ...

    def freeze(self, num_samples: int) -> "LogitsFn":
        """The same function with its randomness fixed: common random numbers for every call."""
        ...


@runtime_checkable
class AdaptiveLogitsFn(LogitsFn, Protocol):
    """A `LogitsFn` that refines itself at run time. A call is pure; only `respond` moves it."""

    @property
    def static(self) -> LogitsFn:
        """The base that never adapts."""
        ...

    @property
    def group(self) -> int:
        """How many inputs of the stream adapt together."""
        ...

    def simulate(self, x: Inputs, *, seed: int) -> LogitsFn:
        """The function that would answer `x`; changes nothing."""
        ...

    def respond(self, x: Inputs, *, seed: int) -> Logits:
        """Answers inputs in stream order and stays adapted."""
        ...

    def state(self) -> Any:
        """Everything that adapts, copied."""
        ...

    def restore(self, state: Any) -> None:
        """Puts back what `state` gave."""
        ...


class Step(NamedTuple):
    """One training forward, everything an objective needs.

    ``logits`` (batch, classes); ``log_lik`` (batch,) in nats; ``kl`` in nats for the whole data set,
    by site; ``draws`` the values of the sites, by site. Where discrete sites are trained, gradients of
    ``log_lik`` and ``kl`` are those of their expectations, by ``score`` (batch,), which is 0 in value and
    has the gradient of the log-density of these sites; None elsewhere.
    """

    logits: Tensor
    log_lik: Tensor
    kl: dict[str, Tensor]
    draws: Draws
    score: Tensor | None = None


Data = tuple[Tensor, ...] | Dataset[Any] | Iterable[tuple[Inputs, Labels]]
"""Labeled examples: ``(x, y)``, a data set, or a loader of such batches."""

LossFn = Callable[[Logits, Labels], Tensor]
"""What an attacker climbs: ``(samples, batch, classes), (batch,) -> (batch,)``."""

Rule = Callable[[Logits], Tensor]
"""How draws become a decision: ``(samples, batch, classes) -> scores (batch, classes)``."""

Attack = Callable[..., Inputs]
"""``attack(logits_fn, x, y) -> x_adv``, configured with ``functools.partial``."""

Objective = Callable[..., Tensor]
"""``objective(defense, x, y) -> scalar``: per-example nats that training minimizes."""

Seed = Any
"""An int, one int per example ``(batch,)``, a ``torch.Generator``, or None for torch's global state."""
