r"""Decision rules: how the draws of a defense become one decision.

A rule maps logits ``(samples, batch, classes)`` to scores ``(batch, classes)``; the decision is the
class of the largest score. Every robustness number names its rule, because the same points give
different accuracies under different rules.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probdefense.ops import exact, is_class, log_mean_exp
from probdefense.types import Labels, Logits, Rule
from probdefense.validation import check_count, check_function, check_logits, check_member, check_values


def of_draws(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of logits that refuses anything without a sample axis."""

    @functools.wraps(body)
    def checked(logits: Logits, *rest: Any) -> Tensor:
        check_logits(logits)
        return body(logits, *rest)

    return checked


@of_draws
def mean_prob(logits: Logits) -> Tensor:
    r"""Posterior predictive, $\log \frac1S \sum_s \mathrm{softmax}(z_s)$, in log space.

    Args:
        logits: ``(samples, batch, classes)``.

    Returns:
        Log-probabilities, ``(batch, classes)``.

    References:
        Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673)

    Examples:
        >>> mean_prob(torch.tensor([[[0.0, 200.0]], [[200.0, 0.0]]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    return log_mean_exp(logits.log_softmax(-1))


@of_draws
def vote(logits: Logits) -> Tensor:
    r"""Share of the draws that choose each class, $\frac1S \sum_s 1[\arg\max z_s = k]$.

    Args:
        logits: ``(samples, batch, classes)``.

    Returns:
        Vote shares, ``(batch, classes)``.

    References:
        Cohen et al., 2019, [Certified Adversarial Robustness via Randomized Smoothing](https://arxiv.org/abs/1902.02918)

    Examples:
        >>> vote(torch.tensor([[[0.0, 2.0]], [[1.0, 0.0]], [[0.0, 0.1]]]))
        tensor([[0.3333, 0.6667]])
    """
    return is_class(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(0)


@of_draws
def single_draw(logits: Logits) -> Tensor:
    r"""The first draw decides alone, $\log \mathrm{softmax}(z_1)$: a stochastic classifier.

    `evaluate` gives the accuracy of this rule as the mean over all its verdict draws.

    Args:
        logits: ``(samples, batch, classes)``.

    Returns:
        Log-probabilities of one draw, ``(batch, classes)``.

    References:
        Khan et al., 2019, [Non-Determinism in Neural Networks for Adversarial Robustness](https://arxiv.org/abs/1905.10906)

    Examples:
        >>> single_draw(torch.tensor([[[0.0, 2.0]], [[1.0, 0.0]]])).argmax(-1)
        tensor([1])
    """
    return logits[0].log_softmax(-1)


def worst_of_draws(num_queries: int) -> Rule:
    r"""The attacker may ask `num_queries` times and wins if one draw errs.

    The score of a class is its smallest lead over the draws, or 0 if a draw does not choose it,
    $\max(0, \min_{s \le m} (z_{s,k} - \max_{j \ne k} z_{s,j}))$; a tie at 0 counts as an error.

    Args:
        num_queries: $m$, how many draws the attacker may see.

    Returns:
        A rule ``(samples, batch, classes) -> (batch, classes)``.

    Raises:
        ValueError: `num_queries` below 1.

    References:
        Daeubener and Fischer, 2022, [How Sampling Impacts the Robustness of Stochastic Neural
        Networks](https://arxiv.org/abs/2204.10839)

    Examples:
        >>> worst_of_draws(2)(torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]))
        tensor([[0., 1.]])
    """
    num_queries = check_count("num_queries", num_queries)

    @of_draws
    def worst_case(logits: Logits) -> Tensor:
        return leads(logits[:num_queries]).amin(0).clamp_min(0.0)

    worst_case.draws_per_verdict = num_queries  # type: ignore[attr-defined]
    worst_case.scale_free_draws = math.inf  # type: ignore[attr-defined]
    worst_case.__name__ = f"worst_of_{num_queries}_draws"
    return worst_case


single_draw.draws_per_verdict = 1  # type: ignore[attr-defined]
mean_prob.scale_free_draws = 1  # type: ignore[attr-defined]
vote.scale_free_draws = single_draw.scale_free_draws = math.inf  # type: ignore[attr-defined]

RULED_OUT = 1e4
"""A class so many times farther behind the best than the next one is ruled out, as if it were -inf."""


def leads(scores: Tensor) -> Tensor:
    """How far each class is ahead of the best other one, ``(..., classes) -> (..., classes)``."""
    top = scores.topk(2, dim=-1).values
    best_other = torch.where(scores == top[..., :1], top[..., 1:], top[..., :1])
    return scores - best_other


def score_margin(scores: Tensor, y: Labels) -> Tensor:
    """Score of the true class minus the best other, ``(..., batch, classes) -> (..., batch)``."""
    truth = is_class(y, scores.shape[-1]).expand_as(scores)
    rivals = scores.masked_fill(truth, -torch.inf).amax(-1)
    return scores.masked_fill(~truth, 0.0).sum(-1) - rivals


def spread(scores: Tensor) -> Tensor:
    """Best minus worst score of the classes in play, ``(..., classes) -> (...)``: the yardstick of margins.

    Classes at -inf are not in play, nor are those that a network masks with a huge number.
    """
    behind = (scores.amax(-1, keepdim=True) - scores).sort(-1).values
    nearer = behind[..., :-1]
    leap = (nearer > 0) & (behind[..., 1:] > RULED_OUT * nearer)
    out = torch.cat([torch.zeros_like(leap[..., :1]), leap], dim=-1).cumsum(-1) > 0
    return behind.masked_fill(out | behind.isinf(), 0.0).amax(-1)


def scale_free(rule: Rule, num_draws: int) -> bool:
    """Whether logits times a positive number, one per example, leave the decisions of the rule alone.

    Votes and single draws never ask how sure a draw is; the mean probability does, except of one draw.
    """
    return num_draws <= getattr(rule, "scale_free_draws", 0)


def draws_per_verdict(rule: Rule) -> int | None:
    """How many draws one verdict of the rule consumes; None means all that it is given."""
    return getattr(rule, "draws_per_verdict", None)


def verdicts(rule: Rule, logits: Logits, y: Labels) -> Tensor:
    """Whether the rule is right, bool ``(verdicts, batch)``: one row per group of draws it consumes.

    A rule that uses all draws gives one row, `single_draw` one row per draw. A tie is an error.
    """
    return margins(rule, logits, y) > 0


def margins(rule: Rule, logits: Logits, y: Labels) -> Tensor:
    """The margin by which the rule is right, ``(verdicts, batch)``; zero or less is wrong.

    It is taken in double precision, because log-probabilities round the margin of tiny logits to a tie.
    """
    size = draws_per_verdict(rule) or len(logits)
    count = max(1, len(logits) // size)
    groups = logits[: count * size].split(min(size, len(logits)))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shape = logits.shape[1:]
    scores = [check_values(rule(exact(group)), shape, "rule") for group in groups]
    return torch.stack([score_margin(part, y) for part in scores]).to(dtype)


RULES: dict[str, Callable[[Logits], Tensor]] = {
    "mean_prob": mean_prob,
    "vote": vote,
    "single_draw": single_draw,
}


def as_rule(rule: Rule | str) -> Rule:
    """The rule itself, or the one of that name.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(rule, str):
        check_member("rule", rule, RULES)
        return RULES[rule]
    check_function("rule", rule, "logits")
    return rule
