r"""What the gradient of a random defense is worth: how much of it is signal, before an attack relies on it.

With one gradient $g_s$ per draw and their mean $\bar g$, noise shows as signs that disagree and as a
variance that drowns $\|\bar g\|$; masking shows as gradients that are exactly zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.tools.border import guarded, outside_inference, workable
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.logits.adapters import Samples, as_logits_fn
from probdefense.logits.losses import expected_cross_entropy
from probdefense.rng import Stream, forked
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Seed
from probdefense.validation import check_count, check_inputs, check_labels


class Signal(NamedTuple):
    """The quality of the gradient at every example, ``(batch,)`` each.

    Attributes:
        agreement: Share of the draws whose sign is that of the mean gradient, pixels weighted by its
            size; 1 without noise, 0.5 if there is no signal at all.
        signal_to_noise: Length of the expected gradient over that of the noise in one draw;
            1 / n of the variance is left after averaging n draws.
        zeros: Share of pixels at which every draw's gradient is exactly zero.
    """

    agreement: Tensor
    signal_to_noise: Tensor
    zeros: Tensor


def gradient_signal(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    loss: LossFn = expected_cross_entropy,
    num_samples: int = 32,
    seed: Seed = None,
) -> Signal:
    r"""Agreement of signs, $\|\mathrm{E} g\| / \sqrt{\mathrm{E} \|g - \mathrm{E} g\|^2}$, and zeros.

    A small ratio need not call for more draws per step, because steps average too. On digits, at 64 to
    320 gradients, PGD with 1, 4 or 16 draws per step ended within six points of each other; so did a
    number of draws that grew until nine tenths of the gradient had a settled sign, which is why attacks
    do not adapt it.

    Args:
        logits_fn: What would be attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        loss: What would be climbed.
        num_samples: Draws, a gradient each.
        seed: An int, one per example, or a generator; fixes the draws.

    Returns:
        A `Signal`; the ratio is infinite without randomness.

    Raises:
        ValueError: bad inputs or settings, or fewer than two draws.

    References:
        Athalye et al., 2018, [Obfuscated Gradients Give a False Sense of
        Security](https://arxiv.org/abs/1802.00420)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> gradient_signal(net, torch.rand(2, 4), torch.tensor([0, 1])).agreement
        tensor([1., 1.])
    """
    x, num_samples = check_inputs(x), check_count("num_samples", num_samples, 2)
    check_labels(y, len(x))
    one_draw = Samples(guarded(as_logits_fn(logits_fn), x, y, where="gradient_signal"), 1)
    with outside_inference(), forked(None if seed is None else Stream.of(seed, x).seed(), x.device):
        x, climbed = workable(x), climb(loss, workable(y))
        draws = [input_gradient(one_draw, x, climbed, where="gradient_signal") for _ in range(num_samples)]
    slopes = torch.stack([draw.gradient.flatten(1) for draw in draws])
    mean = slopes.mean(0)
    same = (slopes.sign() == mean.sign()).to(x.dtype).mean(0)
    noise = slopes.var(0).sum(1)
    signal = (mean.square().sum(1) - noise / num_samples).clamp_min(0.0)
    return Signal(
        (same * mean.abs()).sum(1) / mean.abs().sum(1).clamp_min(1e-30),
        (signal / noise).sqrt(),
        (slopes == 0).all(0).to(x.dtype).mean(1),
    )
