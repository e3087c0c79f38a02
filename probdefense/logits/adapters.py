"""LogitsFns made from others: a fixed number of draws, counted calls, bare callables, plain modules."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from probdefense.logits.rules import as_rule
from probdefense.types import Inputs, Logits, LogitsFn, Rule
from probdefense.validation import check_answer, check_bare, check_count, check_logits, check_member


class Samples:
    """A LogitsFn that answers with a fixed number of draws unless asked for another.

    Args:
        logits_fn: The function to draw from.
        num_samples: Draws per call.
        options: Of every call, such as ``draws="antithetic"``.

    Raises:
        ValueError: `num_samples` below 1.
    """

    def __init__(self, logits_fn: LogitsFn, num_samples: int, **options: Any):
        check_count("num_samples", num_samples)
        self.logits_fn, self.num_samples, self.draw_options = logits_fn, num_samples, options

    @property
    def stochastic(self) -> bool:
        """As the function it draws from."""
        return self.logits_fn.stochastic

    def __call__(self, x: Inputs, num_samples: int | None = None, **options: Any) -> Logits:
        """``(num_samples, batch, classes)``."""
        return self.logits_fn(x, num_samples or self.num_samples, **{**self.draw_options, **options})

    def freeze(self, num_samples: int | None = None) -> LogitsFn:
        """The function with its randomness fixed, its draws independent."""
        return self.logits_fn.freeze(num_samples or self.num_samples)

    def samples(self, num_samples: int, **options: Any) -> "Samples":
        """The same function with another number of draws."""
        return Samples(self.logits_fn, num_samples, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("logits_fn", "draw_options"):
            raise AttributeError(name)
        return getattr(self.logits_fn, name)


@dataclass
class Counts:
    """Evaluations in example x draw: forward `queries` and backward `gradients`."""

    queries: int = 0
    gradients: int = 0


class Counted:
    """A LogitsFn that counts what it costs, with everything derived from it (see `counted`)."""

    DERIVED = ("freeze", "mean", "samples", "simulate", "keyed", "static")
    runtime_attributes = ("counts",)  # which no fingerprint holds

    def __init__(self, logits_fn: LogitsFn, counts: Counts):
        self.logits_fn, self.counts = logits_fn, counts

    @property
    def stochastic(self) -> bool:
        """As the function it counts."""
        return self.logits_fn.stochastic

    @property
    def queries(self) -> int:
        """Forward evaluations so far, example x draw."""
        return self.counts.queries

    @property
    def gradients(self) -> int:
        """Backward evaluations with respect to the input so far, example x draw."""
        return self.counts.gradients

    def __call__(self, x: Inputs, num_samples: int | None = None, **options: Any) -> Logits:
        """``(samples, batch, classes)``, counted."""
        logits = self.logits_fn(x, num_samples, **options)
        self.counts.queries += logits.shape[0] * logits.shape[1]
        if logits.requires_grad and x.requires_grad:
            logits.register_hook(self._count_gradient)
        return logits

    def _count_gradient(self, gradient: Tensor) -> None:
        self.counts.gradients += gradient.shape[0] * gradient.shape[1]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("logits_fn", "counts"):
            raise AttributeError(name)
        value = getattr(self.logits_fn, name)
        if name not in self.DERIVED:
            return value
        if not inspect.isroutine(value):
            return Counted(value, self.counts)
        return lambda *args, **kwargs: Counted(value(*args, **kwargs), self.counts)


def counted(logits_fn: LogitsFn) -> Counted:
    """Wraps a function so that its cost can be read as ``.queries`` and ``.gradients``.

    A query is one example through one draw; a gradient is its backward pass to the input. What is
    derived from the wrapper (``freeze``, ``mean``, ``samples``) counts into the same two numbers.

    Args:
        logits_fn: Any `LogitsFn`.

    Returns:
        The same function with ``.queries`` and ``.gradients``, evaluations in example x draw.

    Examples:
        >>> import probdefense as pd
        >>> cost = counted(pd.deterministic(torch.nn.Linear(4, 3)))
        >>> logits = cost(torch.rand(5, 4))
        >>> cost.queries, cost.gradients
        (5, 0)
    """
    return Counted(as_logits_fn(logits_fn), Counts())


class Static:
    """A function ``x -> (samples, batch, classes)`` without randomness, as a LogitsFn."""

    stochastic = False

    def __init__(self, function: Callable[[Inputs], Logits]):
        self.function = function

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """The one answer there is."""
        return self.function(x)

    def freeze(self, num_samples: int | None = None) -> "Static":
        """Itself: nothing is random."""
        return self


class Bare:
    """A plain callable seen as a LogitsFn: assumed random, and not to be frozen."""

    stochastic = True

    def __init__(self, function: Callable[..., Logits]):
        self.function, parameters = function, []
        with suppress(ValueError):  # of some builtin functions nobody knows the arguments
            parameters = list(inspect.signature(function).parameters.values())
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.takes_count = sum(p.kind in kinds for p in parameters) > 1

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """Whatever the callable answers, checked to have a sample axis."""
        copied = x.clone()  # functions may work in place, and x is the caller's
        logits = self.function(copied, num_samples) if self.takes_count else self.function(copied)
        check_logits(logits, len(x))
        return logits

    @property
    def freeze(self) -> Any:
        """None: there is no way to hold the randomness of a callable."""
        return None


def as_logits_fn(function: Any) -> LogitsFn:
    """The function itself if it follows the protocol, else a bare callable seen as one.

    Raises:
        TypeError: a plain ``nn.Module``, or something that cannot be called.
    """
    if hasattr(function, "stochastic"):
        return function
    if isinstance(function, nn.Module):
        raise TypeError(
            f"expected a LogitsFn, got the plain network {type(function).__name__}; "
            "wrap it with probdefense.deterministic(net)"
        )
    check_bare(function)
    return Bare(function)


DRAWS = ("independent", "antithetic")
"""How the draws of a call belong together."""


def with_options(logits_fn: LogitsFn, num_samples: int, draws: str = "independent") -> Samples:
    r"""The function with a fixed number of draws, which may come in antithetic pairs.

    The numbers 2k and 2k + 1 share their randomness and differ in its sign about the location, all sites
    jointly: $\theta$ and $2\mu - \theta$. Each alone is distributed as ever, so means over single draws stay
    unbiased, and those of odd functions vary less; what is even gains nothing. Discrete choices, and families
    without a location, are shared by a pair, and an odd last draw stands alone. Predictions, verdicts,
    certificates and whatever an attack decides on stay independent.

    Raises:
        ValueError: pairs of a random function that has none.
    """
    check_member("draws", draws, DRAWS)
    if draws == "independent" or not logits_fn.stochastic:
        return Samples(logits_fn, num_samples)
    if not getattr(logits_fn, "pairs_draws", False):
        raise ValueError(
            f"expected draws='independent' of {type(logits_fn).__name__}, got 'antithetic', which needs the "
            "location of every random value: only a defense made by the builders, or by Defense.from_sites, "
            "knows it; a pair of Pyro programs of your own draws independently"
        )
    return Samples(logits_fn, num_samples, draws=draws)


def paired(logits_fn: LogitsFn, draws: str) -> bool:
    """Whether the draws of a call are paired, refused where they cannot be."""
    return bool(with_options(logits_fn, 1, draws).draw_options)


def independent(logits_fn: LogitsFn) -> dict[str, str]:
    """The options with which a call of the function has independent draws."""
    paired = getattr(logits_fn, "draw_options", {}).get("draws", "independent") != "independent"
    return {"draws": "independent"} if paired else {}


def can_freeze(logits_fn: LogitsFn) -> bool:
    """Whether the function can fix its randomness."""
    return callable(getattr(logits_fn, "freeze", None))


class Decided(nn.Module):
    """A LogitsFn and a rule as a plain module ``x -> (batch, classes)``, for other libraries."""

    def __init__(self, logits_fn: LogitsFn, rule: Rule | str, num_samples: int, frozen: bool):
        super().__init__()
        check_count("num_samples", num_samples)
        if isinstance(logits_fn, nn.Module):
            self.defense = logits_fn
        self.logits_fn = logits_fn.freeze(num_samples) if frozen else Samples(logits_fn, num_samples)
        self.rule = as_rule(rule)

    def forward(self, x: Inputs) -> Tensor:
        """Scores of the rule, ``(batch, classes)``: log-probabilities for `mean_prob`."""
        return self.rule(check_answer(self.logits_fn(x), len(x), "the draws of a module"))
