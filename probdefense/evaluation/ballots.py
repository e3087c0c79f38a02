r"""Votes and mean probabilities of joint draws, and lower bounds on what infinitely many would give.

A vote counts for a class whose logit is strictly the largest; a tie counts for none, so no certificate
rests on how a tie is broken.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.progress import progress_bar
from probdefense.types import Inputs, Labels, Logits, LogitsFn
from probdefense.validation import check_answer

VOTES_PER_LOOK = 50
"""Votes between two looks of the sequential certificate."""

ANSWERS_AT_ONCE = 2**16
"""Images times draws whose logits are held at once."""

BLOCKS = 10
"""Groups of draws, taken in turn, of which one at a time is left out to see what shared draws move."""

LARGEST_BET = 0.75
"""Share of the capital that a bet may lose."""

AT_ONCE = 32
"""Images whose bets are computed together."""


class Ballot(NamedTuple):
    """What the draws of a chunk of examples say.

    ``chosen`` (batch,); ``share`` (batch,) a lower bound, ``observed`` (batch,) the estimate,
    ``num_votes`` (batch,), and ``shifts`` (batch, blocks): how the estimate moves without a block.
    """

    chosen: np.ndarray
    share: np.ndarray
    observed: np.ndarray
    num_votes: np.ndarray
    shifts: np.ndarray


def counted_ballot(defense: LogitsFn, x: Inputs, n0: int, n: int, alpha: float) -> Ballot:
    """A fixed number of votes, bounded by Clopper and Pearson."""
    chosen = _votes(defense, x, n0).argmax(-1)
    wins, trials = _wins(defense, x, chosen, n)
    return _ballot(chosen, clopper_pearson_low(wins.sum(0), n, alpha), wins, trials)


def raced_ballot(defense: LogitsFn, x: Inputs, n0: int, n: int, alpha: float, enough: float) -> Ballot:
    """Votes until a share is certain or out of reach, bounded at all looks at once."""
    chosen = _votes(defense, x, n0).argmax(-1)
    return _race(defense, x, chosen, n, alpha, enough)


def mean_ballot(defense: LogitsFn, x: Inputs, n0: int, n: int, alpha: float) -> Ballot:
    """A fixed number of probabilities, bounded by betting."""
    total = sum(logits.double().softmax(-1).sum(0) for logits in _answers(defense, x, n0))
    chosen = torch.as_tensor(total).argmax(-1)
    values = np.concatenate([_probs(logits, chosen) for logits in _answers(defense, x, n)])
    sums, trials = _in_blocks(values)
    return _ballot(chosen, mean_low(values, alpha), sums, trials)


def clopper_pearson_low(wins: np.ndarray, trials: int, alpha: float) -> np.ndarray:
    """Exact lower confidence bound on a share after a fixed number of trials, one-sided.

    References:
        Clopper and Pearson, 1934, [The Use of Confidence or Fiducial Limits Illustrated in the Case of
        the Binomial](https://doi.org/10.1093/biomet/26.4.404)

    Examples:
        >>> float(clopper_pearson_low(np.array([100]), 100, 0.001).round(4)[0])
        0.9333
    """
    from scipy.special import betaincinv

    return np.where(wins == 0, 0.0, betaincinv(np.maximum(wins, 1), trials - wins + 1, alpha))


def running_bounds(wins: np.ndarray, trials: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    r"""A confidence sequence for a share: bounds that hold at every number of trials at once.

    The shares $p$ at which the mixture $B(w + 1, t - w + 1) / (p^w (1 - p)^{t - w})$, a martingale if
    $p$ is the true one, has not reached $1 / \alpha$.

    Args:
        wins: $w$, ``(batch,)``.
        trials: $t$, ``(batch,)``.
        alpha: The chance that the true share is ever outside.

    Returns:
        ``(low, high)``.

    Examples:
        >>> low, high = running_bounds(np.array([90]), np.array([100]), 0.05)
        >>> low.round(3), high.round(3)
        (array([0.772]), array([0.971]))
    """
    from scipy import special

    limit = special.betaln(wins + 1, trials - wins + 1) + math.log(alpha)

    def outside(share: np.ndarray) -> np.ndarray:
        return limit > special.xlogy(wins, share) + special.xlog1py(trials - wins, -share)

    center = wins / np.maximum(trials, 1)
    bounds = []
    for edge in (np.zeros_like(center), np.ones_like(center)):
        out, inside = edge, center
        for _ in range(50):
            middle = (out + inside) / 2
            beyond = outside(middle)
            out, inside = np.where(beyond, middle, out), np.where(beyond, inside, middle)
        bounds.append(out)
    return bounds[0], bounds[1]


def mean_low(values: np.ndarray, alpha: float) -> np.ndarray:
    r"""Lower confidence bound on the mean of independent values in [0, 1], one-sided, by betting.

    The largest $m$ at which the capital $\prod_i (1 + \lambda_i (x_i - m))$, a martingale if $m$ is the
    mean, has reached $1 / \alpha$; the bets $\lambda_i = \sqrt{2 \log(1/\alpha) / (n \hat v_{i-1})}$ know
    the variance of the values before. For zeros and ones it comes close to Clopper and Pearson; a Hoeffding
    bound knows no variance.

    Args:
        values: ``(trials, batch)``, in the order of the draws.
        alpha: The chance that the mean is below.

    Returns:
        ``(batch,)``.

    References:
        Waudby-Smith and Ramdas, 2024, [Estimating Means of Bounded Random Variables by
        Betting](https://arxiv.org/abs/2010.09686)

    Examples:
        >>> mean_low(np.full((1000, 1), 0.9), 0.001).round(2)
        array([0.89])
    """
    parts = range(0, values.shape[1], AT_ONCE)
    return np.concatenate([_by_betting(values[:, i : i + AT_ONCE].astype(float), alpha) for i in parts])


def _by_betting(values: np.ndarray, alpha: float) -> np.ndarray:
    count = np.arange(1, len(values) + 1)[:, None]
    means = (0.5 + values.cumsum(0)) / (count + 1)
    variances = (0.25 + np.square(values - means).cumsum(0)) / (count + 1)
    known = np.concatenate([np.full((1, values.shape[1]), 0.25), variances[:-1]])
    bets = np.sqrt(2 * math.log(1 / alpha) / (len(values) * known))
    low, high = np.zeros(values.shape[1]), np.ones(values.shape[1])
    for _ in range(40):
        middle = (low + high) / 2
        capital = np.log1p(np.minimum(bets, LARGEST_BET / middle) * (values - middle)).sum(0)
        rejected = capital > math.log(1 / alpha) + 1e-9
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low


def _ballot(chosen: Labels, low: np.ndarray, wins: np.ndarray, trials: np.ndarray) -> Ballot:
    """The ballot of sums and counts by block, ``(blocks, batch)``."""
    total, count = wins.sum(0), trials.sum(0)
    rest = count - trials
    without = np.where(rest > 0, (total - wins) / np.maximum(rest, 1), total / count)
    shifts = (without - total / count).T
    return Ballot(chosen.cpu().numpy(), low, total / count, count.astype(np.int64), shifts)


def _race(defense: LogitsFn, x: Inputs, chosen: Labels, n: int, alpha: float, enough: float) -> Ballot:
    """Every image stops once `enough` is certain, or out of reach even of all votes that are left."""
    wins, spent = np.zeros((BLOCKS, len(x))), np.zeros((BLOCKS, len(x)))
    share, running = np.zeros(len(x)), np.arange(len(x))
    with progress_bar("certify", math.ceil(n / VOTES_PER_LOOK)) as advance:
        for start in range(0, n, VOTES_PER_LOOK):
            rows = torch.as_tensor(running, device=x.device)
            won, cast = _wins(defense, x[rows], chosen[rows], min(VOTES_PER_LOOK, n - start))
            wins[:, running] += won
            spent[:, running] += cast
            counted, count = wins[:, running].sum(0), spent[:, running].sum(0)
            low, high = running_bounds(counted, count, alpha)
            share[running] = np.maximum(share[running], low)
            best, _ = running_bounds(counted + n - count, np.full(len(running), float(n)), alpha)
            running = running[(low < enough) & (high > enough) & (best >= enough)]
            advance()
            if len(running) == 0:
                break
    return _ballot(chosen, share, wins, spent)


def _wins(defense: LogitsFn, x: Inputs, chosen: Labels, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How many of `count` votes go to the chosen class, and how many there are, ``(blocks, batch)``."""
    answers = _answers(defense, x, count)
    return _in_blocks(np.concatenate([_won(logits, chosen) for logits in answers]))


def _won(logits: Logits, chosen: Labels) -> np.ndarray:
    """Whether the chosen class is strictly the best, ``(samples, batch)``."""
    return (_strict(logits) == chosen).cpu().numpy()


def _probs(logits: Logits, chosen: Labels) -> np.ndarray:
    """Probabilities of the chosen class, ``(samples, batch)``, rounded down to single precision."""
    probs = logits.double().softmax(-1)[:, torch.arange(len(chosen)), chosen].cpu().numpy()
    near = probs.astype(np.float32)
    return np.where(near > probs, np.nextafter(near, np.float32(0)), near)


def _in_blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of values ``(samples, batch)`` by block, which draws take in turn."""
    sums = np.stack([values[block::BLOCKS].sum(0, dtype=np.float64) for block in range(BLOCKS)])
    counts = np.array([len(values[block::BLOCKS]) for block in range(BLOCKS)], dtype=np.float64)
    return sums, np.broadcast_to(counts[:, None], sums.shape)


def _votes(defense: LogitsFn, x: Inputs, count: int) -> Tensor:
    """Votes of `count` joint draws, ``(batch, classes)``."""
    total: Tensor | int = 0
    for logits in _answers(defense, x, count):
        winner = _strict(logits).unsqueeze(-1)
        total = total + (winner == torch.arange(logits.shape[-1], device=x.device)).sum(0)
    return torch.as_tensor(total)


def _strict(logits: Logits) -> Labels:
    """The class with the largest logit, or -1 where several share it, ``(samples, batch)``."""
    best = logits.topk(2, dim=-1)
    return best.indices[..., 0].where(best.values[..., 0] > best.values[..., 1], -1)


def _answers(defense: LogitsFn, x: Inputs, count: int) -> Iterator[Logits]:
    """Logits of `count` joint draws, some at a time."""
    at_once = max(1, ANSWERS_AT_ONCE // len(x))
    with progress_bar("certify", math.ceil(count / at_once)) as advance:
        for start in range(0, count, at_once):
            answer = defense(x, min(at_once, count - start))
            yield check_answer(answer, len(x), "the votes of a certificate")
            advance()
