r"""Certificates of Bayesian networks: how probable it is that the prediction holds on a whole ball.

Wicker et al., 2020, [Probabilistic Safety for Bayesian Neural Networks](https://arxiv.org/abs/2004.10281).
With weights $\theta \sim q$ and the ball $B = \{x' : \|x' - x\|_\infty \le \epsilon\}$, bounded below is

$$ P_{\theta \sim q}\big(\forall x' \in B : \arg\max f_\theta(x') = k\big) $$

by the mass of disjoint boxes of weights on which interval bounds prove it, or by what the weights of a layer
do together (`bounds`), whichever is larger. Above one half, class $k$ wins the vote of infinitely many draws
everywhere in the ball; about the mean probability it says nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.special import log_ndtr, ndtr

from probdefense.evaluation.bounds import Box, Layer, Uncertain, against, layers_of, spreads, through
from probdefense.evaluation.intervals import wilson
from probdefense.evaluation.report import Row
from probdefense.progress import progress_bar
from probdefense.tables import format_table
from probdefense.types import Inputs, Labels
from probdefense.validation import check_count, check_inputs, check_labels, check_positive

REACHES = torch.arange(2.0, 9.0, 0.25).tolist()
"""Numbers of standard deviations that are tried."""

WIDEST = 12.0
"""A box reaches no farther, in standard deviations: beyond is no mass."""

HALVINGS = 24
"""Steps to the largest box that holds."""

AT_ONCE = 64
"""Images that are bounded together."""

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Quantiles of the bound that stand in a table."""


@dataclass(frozen=True)
class PosteriorCertificate:
    """Lower bounds on the probability that a draw of the weights keeps its class on a whole ball.

    Attributes:
        label: The class of the network of mean weights, ``(batch,)``.
        probability: The larger of the next two, ``(batch,)``; it may be 0.
        boxes: By disjoint boxes of weights, ``(batch,)``.
        tails: By what the weights of a layer do together, ``(batch,)``.
        eps: The l-inf radius in pixels.
    """

    label: Labels
    probability: Tensor
    boxes: Tensor
    tails: Tensor
    eps: float

    @property
    def certified(self) -> Tensor:
        """Whether the vote of infinitely many draws is `label` on the whole ball, bool ``(batch,)``."""
        return self.probability > 0.5

    def accuracy(self, y: Labels) -> Row:
        """The share of images that are certified and right, with its 95 % interval.

        Args:
            y: True classes, ``(batch,)``.
        """
        check_labels(y, len(self.label))
        right = int((self.certified & (self.label == y)).sum())
        low, high = wilson(right, len(y))
        return {"eps": self.eps, "accuracy": right / len(y), "low": low, "high": high}

    def table(self, y: Labels, levels: Sequence[float] = LEVELS) -> str:
        """The certified accuracy as aligned text, under what it is about, above quantiles of the bounds."""
        title = (
            f"certified accuracy of the infinite vote of the posterior on l-inf balls of {self.eps:g} px; "
            "every bound is on the probability that one draw holds on the whole ball"
        )
        marks = np.quantile(self.probability.cpu().numpy(), levels)
        shares = ", ".join(f"{level:.0%} {mark:.3f}" for level, mark in zip(levels, marks, strict=True))
        zero = float((self.probability == 0).double().mean())
        body = format_table([self.accuracy(y)], ("eps", "accuracy", "low", "high"))
        return f"{title}\n{body}\nbound by quantile of images: {shares}; 0 for {zero:.0%}"


def certify_posterior(defense: Any, x: Inputs, *, eps: float, num_boxes: int = 16) -> PosteriorCertificate:
    r"""Bounds below the posterior probability that the prediction holds on a whole l-inf ball.

    Two bounds, of which the larger counts; both hold for exact arithmetic, are widened by more than their
    own rounding, and rest on no sample.

    *Boxes.* Weights within $\mu_j \pm \gamma_j \sigma_j$ have mass $\prod_j (2 \Phi(\gamma_j) - 1)$. The
    $\gamma_j$ are small where the margin depends much on a weight, and as large as interval bounds allow;
    disjoint boxes beside the first, each farther out in one weight, are added where they hold. Mass falls
    with the number of weights: with 100,000 of them boxes have to reach over 4.4 deviations in each.

    *Tails.* A sum of many independent weights varies far less than their worst case. But for probability
    $1 - \Phi(t)$ each output of a layer stays within $t$ standard deviations of what moves it; these events
    are added up over outputs and layers, and the margins of the last layer take the rest.

    Args:
        defense: A `Defense` with independent normal weights and nothing else random (`bayesian`), of a
            network made of Linear, Conv, ReLU, Flatten, pooling, BatchNorm and Normalize in Sequentials.
        x: ``(batch, *event)`` in [0, 1].
        eps: The l-inf radius in pixels; balls are cut to [0, 1].
        num_boxes: Boxes that are tried per image, the first included.

    Returns:
        A `PosteriorCertificate`.

    Raises:
        TypeError: not a `Defense` made by a builder.
        ValueError: other randomness, a dependent or not normal posterior, or a layer without known bounds.

    References:
        Wicker et al., 2020, [Probabilistic Safety for Bayesian Neural
        Networks](https://arxiv.org/abs/2004.10281), for boxes (the released code multiplies unions of
        intervals, which counts their hull, and accepts boxes whose bounds of classes overlap); Borell,
        1975, [The Brunn-Minkowski Inequality in Gauss Space](https://doi.org/10.1007/BF01425510), and
        Kwapien, 1994, [A Remark on the Median and the Expectation of Convex Functions of Gaussian
        Vectors](https://doi.org/10.1007/978-1-4612-0253-0_18), for tails

    Examples:
        >>> import probdefense as pd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> defense = pd.defenses.bayesian(net, init_scale=1e-4)
        >>> certificate = certify_posterior(defense, torch.rand(5, 4), eps=0.001)
        >>> certificate.probability.shape
        torch.Size([5])
    """
    x, eps = check_inputs(x), check_positive("eps", eps, zero=True)
    num_boxes = check_count("num_boxes", num_boxes)
    with torch.inference_mode(False), torch.enable_grad():  # boxes follow the gradient of the margin
        return _certified(defense, x.detach().clone(), eps, num_boxes)


def _certified(defense: Any, x: Inputs, eps: float, num_boxes: int) -> PosteriorCertificate:
    """Both bounds of all images."""
    parameters = _independent(defense)
    layers = layers_of(defense.net, parameters)
    with torch.no_grad():
        label = defense.mean()(x)[0].argmax(-1)
    center = x.detach().cpu().double()
    low, high = (center - eps).clamp_min(0.0), (center + eps).clamp_max(1.0)
    parts: list[Tensor] = []
    with progress_bar("certify", math.ceil(len(x) / AT_ONCE)) as advance:
        for wanted, *ends in zip(*(part.split(AT_ONCE) for part in (label.cpu(), low, high)), strict=True):
            box = Box(*ends)
            boxes = [_by_boxes(layers, box.only(i), k, num_boxes) for i, k in enumerate(wanted.tolist())]
            parts.append(
                torch.stack([torch.tensor(boxes, dtype=torch.float64), _by_tails(layers, box, wanted)])
            )
            advance()
    found = torch.cat(parts, dim=1).to(label.device)
    return PosteriorCertificate(label, found.amax(0), found[0], found[1], eps)


def _independent(defense: Any) -> dict[str, Uncertain]:
    """Mean and standard deviation of every random parameter, by name.

    Raises:
        TypeError: not a `Defense` made by a builder.
        ValueError: other randomness, or dependent weights.
    """
    sites = getattr(defense, "sites", None)
    if not sites:
        raise TypeError(
            f"expected a Defense with random weights, got {type(defense).__name__} without; make one with "
            "probdefense.defenses.bayesian(net)"
        )
    found: dict[str, Uncertain] = {}
    for name, site in sites.items():
        if hasattr(site, "layers"):
            continue  # scales of a prior, which the posterior of the weights does not depend on
        q = (
            None
            if site.local or site.perturbs or not hasattr(site, "views")
            else site.distribution("posterior")
        )
        if type(q).__name__ != "Normal" or q.loc.shape != (site.size,):  # type: ignore[union-attr]
            raise ValueError(
                f"no certificate: expected independent normal weights and nothing else random, got another "
                f"at site {name!r}; use probdefense.defenses.bayesian(net) with its own family"
            )
        loc, scale = (part.detach().cpu().double() for part in (q.loc, q.scale))  # type: ignore[union-attr]
        means, deviations = site.views(loc), site.views(scale)
        for names in site.names:
            if len(names) > 1:
                raise ValueError(
                    f"no certificate: {', '.join(names)} are one tied parameter, so not independent"
                )
            found[names[0]] = Uncertain(means[names[0]], deviations[names[0]])
    return found


def _by_tails(layers: list[Layer], box: Box, label: Labels) -> Tensor:
    """One minus the probability that any output of a layer, or a margin, is off, ``(batch,)``."""
    best = torch.zeros(len(label), dtype=torch.float64)
    lasts = {wanted: against(layers[-1], wanted, tails=True) for wanted in set(label.tolist())}
    for reach in REACHES:
        hidden, events = box, 0
        for layer in layers[:-1]:
            hidden = through([layer], hidden, reach)
            events += 2 * hidden.low[0].numel() if layer.random else 0
        outside = events * float(ndtr(torch.tensor(-reach, dtype=torch.float64)))
        for wanted, last in lasts.items():
            rows = label == wanted
            center, inputs, weights = spreads(last, hidden.only(rows), tails=True)
            margin = center - inputs
            # The bound of tails holds beyond the mean only: a margin that is not positive there fails.
            failing = ndtr(-margin / weights.clamp_min(1e-300)).where(margin > 0, 1.0)
            bound = 1 - (outside + failing.sum(1)) * (1 + 1e-9) - 1e-12
            best[rows] = best[rows].maximum(bound)
    return best


class _Boxes:
    """Boxes of all weights around their means, one radius per weight in standard deviations."""

    def __init__(self, layers: list[Layer], box: Box, label: int):
        self.layers, self.box, self.label = layers, box, label
        self.deviations = torch.cat([part.spread.flatten() for part in _parts(layers)])

    def margin(self, shift: Tensor, radius: Tensor) -> Tensor:
        """The smallest margin on a box of weights and the ball; flat, in standard deviations."""
        layers = _filled(self.layers, shift * self.deviations, radius * self.deviations)
        last = against(layers[-1], self.label, tails=False)
        center, inputs, weights = spreads(last, through(layers[:-1], self.box), tails=False)
        return (center - inputs - weights).min()

    def slopes(self) -> tuple[Tensor, Tensor]:
        """How the margin falls with each radius, and grows with each shift, near the means."""
        shift = torch.zeros_like(self.deviations).requires_grad_()
        radius = torch.full_like(self.deviations, 1e-3).requires_grad_()
        grown, fallen = torch.autograd.grad(self.margin(shift, radius), (shift, radius))
        return -fallen, grown


def _by_boxes(layers: list[Layer], box: Box, label: int, num_boxes: int) -> float:
    """The mass of disjoint boxes of weights on which the margin is positive."""
    boxes = _Boxes(layers, box, label)
    still = torch.zeros_like(boxes.deviations)
    with torch.no_grad():
        if not bool(boxes.margin(still, still) > 0):
            return 0.0
    slopes, signs = boxes.slopes()
    with torch.no_grad():
        radius = _largest(boxes, slopes.clamp_min(0.0))
        log_mass = _log_mass(radius)
        mass = math.exp(float(log_mass.sum()))
        held = [mass]
        order = radius.masked_fill(boxes.deviations == 0, math.inf).argsort()[: num_boxes - 1]
        for j in order.tolist() if mass > 0 else []:
            sign = 1.0 if signs[j] >= 0 else -1.0
            shift, wider = still.clone(), radius.clone()
            shift[j], wider[j] = sign * (radius[j] + WIDEST) / 2, (WIDEST - radius[j]) / 2 * (1 + 1e-12)
            if bool(boxes.margin(shift, wider) > 0):
                beyond = float(ndtr(-radius[j]) - ndtr(torch.tensor(-WIDEST, dtype=torch.float64)))
                held.append(math.exp(float(log_mass.sum() - log_mass[j])) * beyond)
    return max(0.0, math.fsum(held) * (1 - 1e-9))


def _largest(boxes: _Boxes, slopes: Tensor) -> Tensor:
    r"""Radii $\gamma_j = \sqrt{2 \log(1 / \lambda s_j)}$ for the smallest $\lambda$ that holds.

    They have the most mass for the margin that they cost, to first order.
    """
    logs = slopes.clamp_min(1e-300).log()
    few, many = float(-logs.max()) - WIDEST**2 / 2, float(-logs.max())
    best = torch.zeros_like(slopes)
    for _ in range(HALVINGS):
        middle = (few + many) / 2
        radius = (-2 * (middle + logs)).clamp_min(0.0).sqrt().clamp_max(WIDEST)
        if bool(boxes.margin(torch.zeros_like(radius), radius * (1 + 1e-12)) > 0):
            many, best = middle, radius
        else:
            few = middle
    return best


def _log_mass(radius: Tensor) -> Tensor:
    r"""$\log(2 \Phi(\gamma) - 1)$, rounded down."""
    return torch.log1p(-2 * log_ndtr(-radius).exp() * (1 + 1e-12)).clamp_max(0.0)


def _parts(layers: list[Layer]) -> list[Uncertain]:
    return [part for layer in layers for part in (layer.weight, layer.bias) if part is not None]


def _filled(layers: list[Layer], shift: Tensor, radius: Tensor) -> list[Layer]:
    """Layers whose parameters are moved and have radii, from flat vectors."""
    sizes = [part.center.numel() for part in _parts(layers)]
    moved = zip(shift.split(sizes), radius.split(sizes), strict=True)

    def next_part(part: Uncertain | None) -> Uncertain | None:
        if part is None:
            return None
        by, around = next(moved)
        return Uncertain(part.center + by.view_as(part.center), around.view_as(part.center))

    return [layer._replace(weight=next_part(layer.weight), bias=next_part(layer.bias)) for layer in layers]
