r"""The posterior predictive and its uncertainty, in log space.

$$ p(y|x) = \frac1S \sum_s \mathrm{softmax}(z_s), \qquad
   \underbrace{H[p]}_{\text{total}} = \underbrace{\tfrac1S \sum_s H[p_s]}_{\text{expected}} +
   \underbrace{I(y; \theta)}_{\text{mutual information}} $$
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probdefense.logits.adapters import as_logits_fn, can_freeze
from probdefense.logits.rules import mean_prob
from probdefense.ops import entropy
from probdefense.prediction.reading import inputs
from probdefense.prediction.sequential import settle
from probdefense.progress import track
from probdefense.rng import forked
from probdefense.tables import html_table
from probdefense.types import Data, Inputs, LogitsFn
from probdefense.validation import check_answer, check_count, check_seed, check_share


@dataclass(frozen=True, repr=False)
class Prediction:
    """The posterior predictive of a batch.

    Attributes:
        log_probs: Log of the mean probability, ``(batch, classes)``.
        expected_entropy: Mean entropy of the draws, nats, ``(batch,)``.
        num_samples: Draws behind it, one number or one per example ``(batch,)``.
        decided: The settled label, or -1 for an abstention, ``(batch,)``; None where a fixed number of
            draws decided.
    """

    log_probs: Tensor
    expected_entropy: Tensor
    num_samples: int | Tensor
    decided: Tensor | None = None

    def __repr__(self) -> str:
        draws = torch.as_tensor(self.num_samples, dtype=torch.float32).mean().item()
        means = {"predictive entropy": self.predictive_entropy, "mutual information": self.mutual_information}
        numbers = ", ".join(f"{name} {float(value.detach().mean()):.3f}" for name, value in means.items())
        size = "{} inputs, {} classes".format(*self.log_probs.shape)
        return (
            f"Prediction of {size}, {draws:g} draws: {numbers} nats (means), "
            f"settled {100 * float(self.settled.float().mean()):.0f} %"
        )

    def _repr_html_(self) -> str:
        numbers = ("label", "predictive_entropy", "expected_entropy", "mutual_information")
        columns = {name: getattr(self, name).tolist() for name in numbers}
        columns["probability"] = self.probs.max(-1).values.tolist()
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return html_table(
            rows, ("label", "probability", *numbers[1:]), repr(self), notes=["entropies in nats"]
        )

    @property
    def probs(self) -> Tensor:
        """Mean probabilities, ``(batch, classes)``."""
        return self.log_probs.exp()

    @property
    def label(self) -> Tensor:
        """The most probable class, or the settled one and -1 for an abstention, ``(batch,)``."""
        return self.log_probs.argmax(-1) if self.decided is None else self.decided

    @property
    def settled(self) -> Tensor:
        """Whether there is a label: everywhere, unless draws were sequential, bool ``(batch,)``."""
        return self.label >= 0

    @property
    def predictive_entropy(self) -> Tensor:
        """Entropy of the mean probability (total uncertainty), nats, ``(batch,)``."""
        return entropy(self.log_probs)

    @property
    def mutual_information(self) -> Tensor:
        """What the draws disagree about (epistemic uncertainty), nats, ``(batch,)``, at least 0."""
        return (self.predictive_entropy - self.expected_entropy).clamp_min(0.0)


def predict(
    logits_fn: LogitsFn,
    x: Inputs | Data,
    num_samples: int = 50,
    *,
    alpha: float | None = None,
    seed: int | None = None,
) -> Prediction:
    r"""Averages the probabilities of draws: the prediction of an ensemble.

    The draws are common to all examples (weights and noise are drawn once per sample), which costs
    little more than the forward passes and leaves every example's own prediction as it would be. Of a
    loader one batch is in memory at a time, and its batches share the draws too.

    With `alpha` the ensemble is sequential: every example draws until its label is settled and abstains
    if `num_samples` draws do not settle it. A settled label differs from that of infinitely many draws
    with probability at most `alpha`, for every example. A bet can at most double per draw, so nothing
    settles before $1 + \log(1/\alpha) / \log 1.95$ draws: 6 at 0.05, 12 at 0.001.

    Args:
        logits_fn: A `Defense` or any `LogitsFn`.
        x: ``(batch, *event)`` in [0, 1]; or a data set, or a loader that keeps the order of its data, of
            inputs or of pairs whose labels are not looked at.
        num_samples: Draws, at most if sequential; a function without randomness gives the one that it
            has, and is settled by it.
        alpha: The chance of a wrong settled label; None for a fixed number of draws.
        seed: Of the draws; torch's global state by default.

    Returns:
        A `Prediction`; with `alpha` its ``label`` is -1 where it is not ``settled``, and its
        ``num_samples`` is per example.

    Raises:
        TypeError: `x` in another form.
        ValueError: bad inputs, a loader that shuffles, `num_samples` below 1, or `alpha` outside (0, 1).

    References:
        Liu et al., 2018, [Towards Robust Neural Networks via Random
        Self-ensemble](https://arxiv.org/abs/1712.00673); Waudby-Smith and Ramdas, 2024, [Estimating Means
        of Bounded Random Variables by Betting](https://arxiv.org/abs/2010.09686)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.01, sigma_inner=0.01)
        >>> predict(defense, torch.rand(3, 1, 8, 8)).probs.shape
        torch.Size([3, 10])
        >>> sequential = predict(defense, torch.rand(3, 1, 8, 8), 20, alpha=0.05)
        >>> bool((sequential.num_samples <= 20).all())
        True
    """
    num_samples = check_count("num_samples", num_samples)
    seed = None if seed is None else check_seed(seed)
    alpha = None if alpha is None else check_share("alpha", alpha)
    logits_fn = as_logits_fn(logits_fn)
    first = x[0] if isinstance(x, tuple) and x else x
    device = first.device if isinstance(first, Tensor) else None
    with torch.no_grad(), forked(seed, device):
        if alpha is not None and logits_fn.stochastic:
            return _joined([_settled(logits_fn, part, num_samples, alpha) for part in _parts(x)])
        source = _drawn_once(logits_fn, num_samples)
        return _joined([_averaged(source, part, num_samples) for part in _parts(x)])


def _parts(x: Inputs | Data) -> Iterable[Inputs]:
    return track(inputs(x), "predict", None)


def _settled(logits_fn: LogitsFn, x: Inputs, num_samples: int, alpha: float) -> Prediction:
    """The prediction of a batch whose examples draw until their labels are settled."""
    race = settle(logits_fn, x, alpha, num_samples)
    total, count = race.log_total, race.num_samples
    log_probs = total - count.to(total.dtype).log().unsqueeze(1)
    return Prediction(log_probs, race.entropy / count, count, race.label)


def _averaged(source: LogitsFn, x: Inputs, num_samples: int) -> Prediction:
    """The prediction of a batch by a fixed number of draws."""
    logits = check_answer(source(x, num_samples), len(x), "the draws of a prediction")
    return Prediction(mean_prob(logits), entropy(logits.log_softmax(-1)).mean(0), len(logits))


def _joined(parts: Sequence[Prediction]) -> Prediction:
    """The predictions of all batches as one.

    Raises:
        ValueError: batches with different numbers of draws.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    counts = [part.num_samples for part in parts]
    if isinstance(first.num_samples, int) and len(set(counts)) > 1:
        raise ValueError(
            f"expected as many draws for every batch, got {', '.join(map(str, counts))}; let the function "
            "answer with num_samples draws"
        )
    return Prediction(
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.expected_entropy for part in parts]),
        first.num_samples
        if isinstance(first.num_samples, int)
        else torch.cat([*map(torch.as_tensor, counts)]),
        None if first.decided is None else torch.cat([part.label for part in parts]),
    )


def _drawn_once(logits_fn: LogitsFn, num_samples: int) -> LogitsFn:
    """The function at draws common to all examples where it can freeze, at fresh ones elsewhere."""
    return logits_fn.freeze(num_samples) if logits_fn.stochastic and can_freeze(logits_fn) else logits_fn
