r"""Randomized smoothing for a joint draw: input noise with everything else random inside the vote.

Cohen et al., 2019, [Certified Adversarial Robustness via Randomized
Smoothing](https://arxiv.org/abs/1902.02918). Let $h_k(z) = P_\xi(f(z, \xi) = k)$ over all other
randomness $\xi$ (inner noise, weights), drawn anew with every vote. It is a function into [0, 1] like any
other, so with $\varepsilon \sim N(0, \sigma^2 I)$ on the raw pixels the smoothed share
$p_k(x) = \mathbb{E}\, h_k(x + \varepsilon)$ obeys the same bound, and no perturbation shorter than

$$ R = \sigma\, \Phi^{-1}(p_k(x)) $$

changes the winner of infinitely many votes.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from probdefense.evaluation.arrays import radii_of
from probdefense.evaluation.examples import chunks
from probdefense.evaluation.intervals import wilson
from probdefense.evaluation.journal import Book
from probdefense.evaluation.points import Spent
from probdefense.evaluation.records import Record
from probdefense.evaluation.report import Row
from probdefense.processes import Processes
from probdefense.progress import progress_bar
from probdefense.rng import derive, forked
from probdefense.tables import format_table
from probdefense.types import Data, Inputs, Labels, LogitsFn
from probdefense.validation import (
    check_answer,
    check_count,
    check_inputs,
    check_labels,
    check_positive,
    check_seed,
    check_share,
)

CHUNK_SIZE = 256
"""Examples that are certified together."""

PLACE = ("certify", 0.0)
"""Where a journal keeps the votes."""

VOTES_PER_LOOK = 50
"""Votes between two looks of the sequential certificate."""

ANSWERS_AT_ONCE = 2**16
"""Images times draws whose logits are held at once."""


@dataclass(frozen=True)
class Certificate:
    """Radii around inputs in which the infinite vote does not change.

    It is about the winner of infinitely many joint draws at each image, each certificate false with
    probability at most `alpha`; not about the verdict of 50 draws, of one draw, or of mean probabilities.

    Attributes:
        label: The certified class, or -1 for an abstention, ``(batch,)``.
        radius: L2, in pixels; 0 for an abstention, ``(batch,)``.
        share: Lower confidence bound on the share of votes, ``(batch,)``.
        num_votes: Votes behind each certificate, ``(batch,)``.
        sigma: Scale of the input noise in pixels, the smallest where scales differ.
        alpha: The chance of a false certificate, per image.
    """

    label: Labels
    radius: Tensor
    share: Tensor
    num_votes: Tensor
    sigma: float
    alpha: float

    def curve(self, y: Labels, radii: Sequence[float]) -> list[Row]:
        """Certified accuracy as a function of the radius, with 95 % intervals over images.

        Args:
            y: True classes, ``(batch,)``.
            radii: L2, in pixels.

        Returns:
            Rows with eps, accuracy, low and high.
        """
        check_labels(y, len(self.label))
        rows = []
        for radius in radii_of(radii):
            check_positive("every radius", radius, zero=True)
            right = int(((self.label == y) & (self.radius >= radius)).sum())
            low, high = wilson(right, len(y))
            rows.append({"eps": float(radius), "accuracy": right / len(y), "low": low, "high": high})
        return rows

    def table(self, y: Labels, radii: Sequence[float]) -> str:
        """The curve as aligned text, under what it is about."""
        title = (
            f"certified accuracy of the infinite vote, input noise {self.sigma:.4g} px, "
            f"each certificate false with probability at most {self.alpha:g}"
        )
        return title + "\n" + format_table(self.curve(y, radii), ("eps", "accuracy", "low", "high"))


def certify(
    defense: Any,
    data: Inputs | Data,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    target_radius: float | None = None,
    seed: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    journal: str | os.PathLike[str] | None = None,
    fabric: Any = None,
) -> Certificate:
    r"""Certifies radii by randomized smoothing, $R = \sigma\, \Phi^{-1}(\underline{p})$, or abstains.

    `n0` votes choose a class, `n` others bound its share from below (Clopper and Pearson). With
    `target_radius` the votes stop as soon as that radius is certain, or out of reach, by a bound that
    holds at all looks at once; looking 60 times at a fixed interval would give 12 times as many false
    certificates as stated. A unanimous vote certifies at most $\sigma\, \Phi^{-1}(\alpha^{1/n})$.

    Args:
        defense: A `Defense` with normal noise on its raw input.
        data: ``x`` of shape ``(batch, *event)`` in [0, 1]; or ``(x, y)``, a data set or a loader, whose
            labels are not looked at.
        n0: Votes that choose the class.
        n: Votes that bound its share.
        alpha: The chance of a false certificate, per image.
        target_radius: L2, in pixels: a radius that is enough.
        seed: Of the votes; torch's global state by default.
        chunk_size: Examples that share their votes' noise of weights; one chunk is in memory at a time.
        journal: A folder in which every finished chunk is kept; a rerun with the same seed goes on there.
        fabric: A `lightning_fabric.Fabric` after ``launch()``, for many processes, see `evaluate`.

    Returns:
        A `Certificate`.

    Raises:
        TypeError: not a `Defense`, or data in another form.
        ValueError: no normal noise on the raw input, or settings out of range.

    References:
        Cohen et al., 2019, [Certified Adversarial Robustness via Randomized
        Smoothing](https://arxiv.org/abs/1902.02918); Robbins, 1970, [Statistical Methods Related to
        the Law of the Iterated Logarithm](https://doi.org/10.1214/aoms/1177696786)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.25)
        >>> certificate = certify(defense, torch.rand(2, 1, 8, 8), n0=10, n=100)
        >>> certificate.radius.shape, certificate.sigma
        (torch.Size([2]), 0.25)
    """
    n0, n, alpha = check_count("n0", n0), check_count("n", n), check_share("alpha", alpha)
    seed = None if seed is None else check_seed(seed)
    if target_radius is not None:
        target_radius = check_positive("target_radius", target_radius)
    if journal is not None and seed is None:
        raise ValueError("expected seed= beside journal=, got none; a rerun has to draw the same votes")
    sigma = smoothing_scale(defense)
    processes = Processes(fabric)
    key = processes.from_first(int(torch.randint(2**62, ()))) if seed is None else derive(seed, "certify")
    asked = {"certify": [n0, n, alpha, target_radius], "seed": seed, "chunk_size": chunk_size}
    book = Book.opened(journal, processes, asked, defense, {})
    device, dtype = torch.device("cpu"), torch.float32
    for chunk in chunks(_labelled(data), chunk_size):
        chunk = chunk.on(processes.device)
        device, dtype = chunk.x.device, chunk.x.dtype
        if book.takes(chunk) and not book.has(PLACE, chunk):
            with torch.no_grad(), forked(derive(key, chunk.number), device):
                chosen, share, spent = _bounded(defense, chunk.x, n0, n, alpha, target_radius, sigma)
            arrays = {"chosen": chosen.cpu().numpy(), "share": share, "num_votes": spent}
            book.write(PLACE, chunk, Record(arrays, n, Spent()))
    found = {name: torch.as_tensor(array) for name, array in book.joined()[PLACE].arrays.items()}
    certain, low = found["chosen"].where(found["share"] > 0.5, -1), found["share"]
    return Certificate(
        label=certain.to(device),
        radius=(sigma * torch.special.ndtri(low.clamp_min(0.5))).to(device, dtype),
        share=low.to(device, dtype),
        num_votes=found["num_votes"].to(device),
        sigma=sigma,
        alpha=alpha,
    )


def _labelled(data: Any) -> Any:
    """The data, with labels that nobody looks at where there are none."""
    if isinstance(data, Tensor):
        data = check_inputs(data)
        return data, torch.zeros(len(data), dtype=torch.int64, device=data.device)
    return data


def _bounded(
    defense: Any, x: Inputs, n0: int, n: int, alpha: float, target_radius: float | None, sigma: float
) -> tuple[Labels, np.ndarray, np.ndarray]:
    """The chosen class, a lower bound of its share and the votes spent, of every example of a chunk."""
    chosen = _votes(defense, x, n0).argmax(-1)
    if target_radius is None:
        wins = _wins(defense, x, chosen, n)
        return chosen, clopper_pearson_low(wins, n, alpha), np.full(len(x), n)
    enough = float(torch.special.ndtr(torch.tensor(target_radius / sigma, dtype=torch.float64)))
    return chosen, *_race(defense, x, chosen, n, alpha, enough)


def smoothing_scale(defense: Any) -> float:
    """The scale of the noise that a certificate may count on, in pixels; the smallest of several.

    Raises:
        TypeError: not a `Defense`.
        ValueError: nothing to count on.
    """
    if not hasattr(defense, "input_noise"):
        raise TypeError(
            f"expected a Defense, which knows its input noise, got {type(defense).__name__}; make one with "
            "probdefense.defenses.rse(net, sigma_init=0.25)"
        )
    noise = defense.input_noise
    if noise is None:
        raise ValueError(
            "no certificate: the defense has no additive noise on its raw pixels, normal and around zero, "
            "that everything else sees them through. Noise of another family or behind a layer does not "
            "count (behind a normalization its scale is not in pixels), nor does noise in training only, and "
            "a defense that adapts to its inputs has none; put it first, as in "
            "probdefense.defenses.rse(net, sigma_init=0.25)"
        )
    family, scale = noise
    if family != "normal":
        raise ValueError(
            f"no certificate: the input noise is {family}, the bound holds for normal noise; leave family out"
        )
    smallest = float(scale.min())
    if smallest <= 0:
        raise ValueError("no certificate: the input noise has scale 0 on some pixels; give it a floor")
    return smallest


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


def _race(
    defense: LogitsFn, x: Inputs, chosen: Labels, n: int, alpha: float, enough: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower bounds and votes spent, when every image stops once `enough` is certain or out of reach."""
    wins, spent, share = (np.zeros(len(x)) for _ in range(3))
    running = np.arange(len(x))
    with progress_bar("certify", math.ceil(n / VOTES_PER_LOOK)) as advance:
        for start in range(0, n, VOTES_PER_LOOK):
            rows = torch.as_tensor(running, device=x.device)
            count = min(VOTES_PER_LOOK, n - start)
            wins[running] += _wins(defense, x[rows], chosen[rows], count)
            spent[running] += count
            low, high = running_bounds(wins[running], spent[running], alpha)
            share[running] = np.maximum(share[running], low)
            running = running[(low < enough) & (high > enough)]
            advance()
            if len(running) == 0:
                break
    return share, spent.astype(np.int64)


def _wins(defense: LogitsFn, x: Inputs, chosen: Labels, count: int) -> np.ndarray:
    """How many of `count` votes go to the chosen class, ``(batch,)``."""
    votes = _votes(defense, x, count).gather(1, chosen.unsqueeze(1)).squeeze(1)
    return votes.cpu().numpy().astype(np.float64)


def _votes(defense: LogitsFn, x: Inputs, count: int) -> Tensor:
    """Votes of `count` joint draws, ``(batch, classes)``; a tie of logits goes to the first class."""
    at_once = max(1, ANSWERS_AT_ONCE // len(x))
    total: Tensor | int = 0
    with progress_bar("certify", math.ceil(count / at_once)) as advance:
        for start in range(0, count, at_once):
            answer = defense(x, min(at_once, count - start))
            logits = check_answer(answer, len(x), "the votes of a certificate")
            total = total + one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
            advance()
    return torch.as_tensor(total)
