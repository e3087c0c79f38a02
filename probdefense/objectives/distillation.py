r"""Defensive distillation: training on the softened answers of another network.

Papernot et al., 2016, [Distillation as a Defense to Adversarial
Perturbations](https://arxiv.org/abs/1511.04508). Teacher and student are trained at temperature $T$ and
used at $T = 1$, where the logits are about $T$ times as large and the gradient of the cross-entropy
vanishes. That is masking: attacks on logits (margin, DLR, Carlini and Wagner) undo it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from probdefense.logits.adapters import as_logits_fn
from probdefense.objectives.elbo import expected, weighted_kl
from probdefense.ops import log_mean_exp
from probdefense.types import Inputs, Labels, LogitsFn, Objective
from probdefense.validation import check_positive


def distilled(teacher: LogitsFn | None, temperature: float) -> Objective:
    r"""Trains a student on a teacher's probabilities at a temperature.

    $$ \frac{T^2}{B} \sum_i \mathrm{KL}\big(p(z^t_i / T) \,\|\, p(z^s_i / T)\big)
       + \sum_f w_f \frac{\mathrm{KL}_f}{N}, \qquad p = \mathrm{softmax} $$

    The factor $T^2$ keeps the size of the gradients, so usual learning rates hold at any temperature.

    Args:
        teacher: Who is imitated, its draws averaged by probability; None for the labels themselves,
            which is how the teacher is trained.
        temperature: $T$, 40 or 100 in the literature.

    Returns:
        ``objective(defense, x, y, *, kl_weight=1.0)``.

    Raises:
        ValueError: a temperature that is not positive; in the first step, teacher and student with
            different classes.
        TypeError: a teacher that is a plain network.

    References:
        Papernot et al., 2016, [Distillation as a Defense to Adversarial
        Perturbations](https://arxiv.org/abs/1511.04508); Hinton et al., 2015, [Distilling the Knowledge in a
        Neural Network](https://arxiv.org/abs/1503.02531), for the factor

    Examples:
        >>> import probdefense as pd
        >>> teacher, student = (pd.deterministic(torch.nn.Linear(4, 3)) for _ in range(2))
        >>> distilled(teacher, temperature=40.0)(student, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_positive("temperature", temperature)
    teacher = None if teacher is None else as_logits_fn(teacher)

    def distilled_objective(
        defense: Any, x: Inputs, y: Labels, *, kl_weight: float | Mapping[str, float] = 1.0
    ) -> Tensor:
        step = defense.step(x, y)
        logits = step.logits / temperature
        if teacher is None:
            loss = cross_entropy(logits, y, reduction="none")
        else:
            with torch.no_grad():
                target = log_mean_exp((teacher(x) / temperature).log_softmax(-1))
            _check_classes(target, logits)
            loss = kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
        return temperature**2 * expected(loss, [step]).mean() + weighted_kl(defense, step.kl, kl_weight)

    return distilled_objective


def _check_classes(target: Tensor, logits: Tensor) -> None:
    if target.shape != logits.shape:
        raise ValueError(
            f"expected a student with the teacher's {target.shape[-1]} classes, got {logits.shape[-1]}"
        )
