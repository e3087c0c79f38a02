"""The suite: every check in one run."""

import math
from typing import Any

from probdefense.attacks.tools.border import outside_inference
from probdefense.checks.bench import Bench
from probdefense.checks.comparisons import FEWEST_QUERIES, comparisons
from probdefense.checks.gradients import gradients
from probdefense.checks.optimization import optimization
from probdefense.checks.outputs import answer, outputs
from probdefense.checks.refusals import Answering
from probdefense.checks.results import Checks
from probdefense.logits.adapters import as_logits_fn
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import mean_prob
from probdefense.rng import derive, forked
from probdefense.types import Attack, Inputs, Labels, LossFn, Norm, Rule
from probdefense.validation import (
    check_classes,
    check_count,
    check_function,
    check_inputs,
    check_labels,
    check_norm,
    check_positive,
    check_seed,
)


def run(
    logits_fn: Any,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    rule: Rule = mean_prob,
    loss: LossFn = expected_cross_entropy,
    num_gradients: int = 320,
    num_samples: int = 16,
    num_verdict: int = 50,
    gradient_free: Attack | None = None,
    seed: int = 0,
) -> Checks:
    """Asks of a defense what has made robustness claims wrong before, and answers with evidence.

    The attack that is checked is Auto-PGD with `num_gradients` per example: on a random defense
    `num_samples` per step, and restarts beyond 40 steps. Other attacks get as many gradients, or queries.
    Accuracies are compared example by example; a comparison fires only beyond three points, by a one-sided
    test at 1 %, so a hundred examples or more are needed to see anything. The attack then gets four times
    its budget, which tells "attack too weak" from "defense masks". What shows and is not sure, and an attack
    that four times the gradients still improve, give "cannot tell": not enough budget. For a quick look,
    ``num_gradients=64, num_samples=4, num_verdict=20`` costs a fifth of the default.

    The checks: `logits` (not probabilities, nor refusals: NaN, one constant, a class without label),
    `declared randomness`, `no adaptation`; of the gradient, `gradient` (not zero, not detached) and
    `gradient signal` (against the noise of the draws), `stable loss`; of the ascent, `silent success`,
    `complete optimization`, `loss plateau` (also beside `dlr` and `margin`, which are scale-free),
    `fresh draws`; by comparison, `larger eps`, `more steps`, `one step`, `more draws`,
    `one draw at equal gradients`, `gradient-free`, `mean network`, `unbounded attack`. Pintor's six
    indicators of attack failure are `gradient`, `stable loss`, `silent success`, `complete optimization`,
    `fresh draws` and `unbounded attack`. How attacks and verdicts use randomness is asked by
    `checks.protocol`.

    Args:
        logits_fn: A `Defense` or any `LogitsFn`.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: Of the threat model.
        rule: How draws become a decision.
        loss: What the attack climbs.
        num_gradients: Per example and attack, every draw counting as one; at least 10 on a random defense.
        num_samples: Draws per step on a random defense.
        num_verdict: Draws of the verdicts.
        gradient_free: An attack by queries that takes ``eps`` and ``norm``; `attacks.square` by default.
        seed: Of everything.

    Returns:
        `Checks`: iterate it, index it by name, or print its ``table()``.

    Raises:
        ValueError: bad data or settings.

    References:
        Athalye et al., 2018, [Obfuscated Gradients Give a False Sense of
        Security](https://arxiv.org/abs/1802.00420); Pintor et al., 2022, [Indicators of Attack
        Failure](https://arxiv.org/abs/2106.09947)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> found = run(net, torch.rand(8, 4), torch.randint(3, (8,)), eps=0.1, num_gradients=8)
        >>> found["declared randomness"].verdict
        'ok'
    """
    x, eps, norm, seed = check_inputs(x), check_positive("eps", eps), check_norm(norm), check_seed(seed)
    check_labels(y, len(x))
    num_gradients = check_count("num_gradients", num_gradients)
    num_samples = check_count("num_samples", num_samples)
    num_verdict = check_count("num_verdict", num_verdict)
    check_function("rule", rule, "logits")
    check_function("loss", loss, "logits", "y")
    if gradient_free is not None:
        check_function("gradient_free", gradient_free, "logits_fn", "x", "y", eps=eps, norm=norm)
    logits_fn = as_logits_fn(logits_fn)
    with outside_inference(), forked(derive(seed, "checks"), x.device):
        x, y = (part.clone() if part.is_inference() else part for part in (x, y))
        bench = Bench(logits_fn, x, y, eps, norm, rule, loss, num_gradients, num_samples, num_verdict, seed)
        before = answer(bench)
        check_classes(y, before.shape[-1])
        bench.correct(x)  # clean answers must be numbers; under attack NaN is a finding
        if gradient_free is None and logits_fn.stochastic:  # the square attack gets as many queries
            check_count("num_gradients", num_gradients, least=FEWEST_QUERIES)
        bench.logits_fn = Answering(logits_fn, bench.tally)
        attacked = [*gradients(bench), *optimization(bench), *comparisons(bench, gradient_free)]
        return Checks((*outputs(bench, before), *attacked))
