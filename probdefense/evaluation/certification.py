r"""Randomized smoothing for a joint draw: input noise with everything else random inside the vote.

Cohen et al., 2019, [Certified Adversarial Robustness via Randomized
Smoothing](https://arxiv.org/abs/1902.02918). Let $h_k(z) = P_\xi(f(z, \xi) = k)$ over all other
randomness $\xi$ (inner noise, weights), drawn anew with every vote. It is a function into [0, 1] like any
other, so with $\varepsilon \sim N(0, \sigma^2 I)$ on the raw pixels the smoothed share
$p_k(x) = \mathbb{E}\, h_k(x + \varepsilon)$ obeys the same bound, and no perturbation shorter than

$$ R = \sigma\, \Phi^{-1}(p_k(x)) $$

changes the winner of infinitely many votes. So does the mean probability $\mathbb{E}_\xi\,
\mathrm{softmax}_k f(z, \xi)$, which is a function into [0, 1] too. Other noises: see `radii`.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probdefense.evaluation.arrays import radii_of
from probdefense.evaluation.ballots import (
    Ballot,
    clopper_pearson_low,
    counted_ballot,
    mean_ballot,
    mean_low,
    raced_ballot,
    running_bounds,
)
from probdefense.evaluation.examples import Chunk, chunks
from probdefense.evaluation.grounds import refuse_dependent, smoothing_noise, smoothing_scale
from probdefense.evaluation.intervals import resampled_interval, wilson
from probdefense.evaluation.journal import Book
from probdefense.evaluation.points import Spent
from probdefense.evaluation.radii import SHAPES, certified_radius, enough, shrinking
from probdefense.evaluation.records import Record
from probdefense.evaluation.report import Row
from probdefense.logits.rules import as_rule, mean_prob, vote
from probdefense.ops import rounded_down
from probdefense.processes import Processes
from probdefense.rng import derive, forked
from probdefense.tables import format_table, html_table
from probdefense.types import Data, Inputs, Labels, Norm, Rule
from probdefense.validation import (
    check_count,
    check_inputs,
    check_labels,
    check_norm,
    check_positive,
    check_seed,
    check_share,
)

__all__ = ["Certificate", "certify", "clopper_pearson_low", "running_bounds", "smoothing_scale"]

CHUNK_SIZE = 256
"""Examples that are certified together."""

PLACE = ("certify", 0.0)
"""Where a journal keeps the votes."""

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of the vote share that stand beside a curve."""

RULES = {vote: "vote", mean_prob: "mean_prob"}
"""What can be certified."""

ABOUT = {"vote": "the infinite vote", "mean_prob": "the mean probability of infinitely many draws"}
"""By rule, what a certificate is about."""


@dataclass(frozen=True, repr=False)
class Certificate:
    """Radii around inputs in which the infinite vote does not change.

    It is about the winner of infinitely many joint draws at each image, each certificate false with
    probability at most `alpha`; not about the verdict of 50 draws, of one draw, or (unless `rule` says so)
    of mean probabilities. Radii are rounded down, and ties of logits count for no class.

    Attributes:
        label: The certified class, or -1 for an abstention, ``(batch,)``.
        radius: In `norm`, in pixels; 0 for an abstention, ``(batch,)``.
        share: Lower confidence bound on the share of votes (or mean probability), ``(batch,)``.
        num_votes: Votes behind each certificate, ``(batch,)``.
        sigma: Scale of the input noise in pixels, the smallest where scales differ.
        alpha: The chance of a false certificate, per image.
        norm: In which radii are measured: 1, 2 or ``inf``.
        family: Of the input noise: ``"normal"``, ``"laplace"`` or ``"uniform"``.
        rule: ``"vote"``, or ``"mean_prob"`` for the class of the largest mean probability.
        unit: The radius is this many times that of noise of scale 1; `sigma` in the family's own norm.
        observed: The share of the chosen class that was seen, $p_A$, ``(batch,)``.
        shifts: How `observed` moves without one of ten groups of draws, ``(batch, 10)``, where examples
            share draws; None where every example has its own.
    """

    label: Labels
    radius: Tensor
    share: Tensor
    num_votes: Tensor
    sigma: float
    alpha: float
    norm: Norm = 2.0
    family: str = "normal"
    rule: str = "vote"
    unit: float | None = None
    observed: Tensor | None = None
    shifts: Tensor | None = None

    def __repr__(self) -> str:
        certain = self.label >= 0
        about = f"Certificate of {len(self.label)} images, {int((~certain).sum())} of them abstentions"
        if certain.any():
            found = self.radius[certain].double()
            largest = f"{float(found.max()):.3g} (largest)"
            about += f": l{_name(self.norm)} radius {float(found.median()):.3g} (median), {largest}"
        return f"{about}; {self.family} input noise {self.sigma:.4g} px, alpha {self.alpha:g}"

    def _repr_html_(self) -> str:
        names = ("label", "radius", "share", "num_votes")
        columns = [getattr(self, name).tolist() for name in names]
        rows = [dict(zip(names, numbers, strict=True)) for numbers in zip(*columns, strict=True)]
        notes = [f"radius in pixels, l{_name(self.norm)}; label -1: no certificate; of {ABOUT[self.rule]}"]
        return html_table(rows, names, repr(self), notes=notes)

    def curve(self, y: Labels, radii: Sequence[float]) -> list[Row]:
        """Certified accuracy as a function of the radius, with 95 % intervals over images.

        Where images share draws, as those of a chunk do where weights are random, intervals are about new
        images and new draws, by leaving out a tenth of the draws at a time.

        Args:
            y: True classes, ``(batch,)``.
            radii: In pixels, in `norm`.

        Returns:
            Rows with eps, accuracy, low and high. Where so few draws could certify the radius for no image,
            also num_votes, largest (what they could certify if all agreed) and needed (how many votes would
            do, None where that is not known); `out_of_reach` puts it in words.
        """
        check_labels(y, len(self.label))
        rows, largest = [], self.largest
        for radius in radii_of(radii):
            check_positive("every radius", radius, zero=True)
            right = ((self.label == y) & (self.radius >= radius)).cpu().numpy()
            low, high = self._interval(right, (self.label == y).cpu(), radius)
            row: Row = {"eps": float(radius), "accuracy": float(right.mean()), "low": low, "high": high}
            if radius > largest and not bool((self.radius >= radius).any()):
                row |= {"num_votes": self._draws, "largest": largest, "needed": self._needed(radius)}
            rows.append(row)
        return rows

    @property
    def largest(self) -> float:
        """The largest radius that so many draws could certify, in pixels: that of draws that all agree."""
        if self.rule == "vote":
            share = clopper_pearson_low(np.array([self._draws]), self._draws, self.alpha)
        else:
            share = mean_low(np.ones((self._draws, 1)), self.alpha)
        return float(certified_radius(torch.from_numpy(share), self.family, self.unit or self.sigma))

    @property
    def _draws(self) -> int:
        """How many draws bound a share, at most."""
        return max(1, int(self.num_votes.max()))

    def _needed(self, radius: float) -> int | None:
        """How many votes certify a radius if all agree: alpha^(1/n) must reach its share."""
        share = enough(radius, self.family, self.unit or self.sigma)
        if self.rule != "vote" or share >= 1:
            return None
        return math.ceil(math.log(self.alpha) / math.log(share))

    def shares(self, levels: Sequence[float] = LEVELS) -> list[Row]:
        """How the observed share $p_A$ of the chosen class is distributed over images.

        Beside a curve it shows what an average radius hides: a few images with shares next to 1 can carry
        it (Sun et al., 2025, [Average Certified Radius is a Poor
        Metric](https://arxiv.org/abs/2410.06895)).

        Args:
            levels: Shares of the images, in [0, 1].

        Returns:
            Rows with images (the level), observed and low (the same quantile of `share`).
        """
        observed = self.share if self.observed is None else self.observed
        levels = [check_share("every level", level, ends="[]") for level in levels]
        pairs = (np.quantile(values.cpu().double().numpy(), levels) for values in (observed, self.share))
        return [
            {"images": level, "observed": float(seen), "low": float(low)}
            for level, seen, low in zip(levels, *pairs, strict=True)
        ]

    def table(self, y: Labels, radii: Sequence[float]) -> str:
        """The curve as aligned text, under what it is about and above the distribution of the shares."""
        own = SHAPES[self.family].norm
        away = "" if self.norm <= own else f" (the l{_name(own)} radius over a power of the number of pixels)"
        title = (
            f"certified accuracy of {ABOUT[self.rule]}, input noise {self.sigma:.4g} px, "
            f"each certificate false with probability at most {self.alpha:g}; {self.family} noise, "
            f"l{_name(self.norm)} radii{away}"
        )
        shares = ", ".join(f"{row['images']:.0%} {row['observed']:.3f}" for row in self.shares())
        kind = "share p_A of the votes" if self.rule == "vote" else "mean probability p_A"
        abstains = float((self.label < 0).double().mean())
        foot = f"{kind} by quantile of images: {shares}; abstains on {abstains:.0%}"
        columns, rows = ("eps", "accuracy", "low", "high"), self.curve(y, radii)
        return "\n".join(filter(None, (title, format_table(rows, columns), foot, out_of_reach(rows))))

    def _interval(self, right: np.ndarray, agrees: Tensor, radius: float) -> tuple[float, float]:
        """Of a certified accuracy, over images, and over draws where images share them."""
        if self.shifts is None:
            return wilson(int(right.sum()), len(right))
        moved = (self.share.cpu().double().unsqueeze(1) + self.shifts.cpu().double()).clamp(0.0, 1.0)
        reached = certified_radius(moved, self.family, self.unit or self.sigma) >= radius
        return resampled_interval(right, (agrees.unsqueeze(1) & (moved > 0.5) & reached).T.numpy())


def out_of_reach(rows: Sequence[Row]) -> str:
    """What to say of the rows of a curve that no image could pass, whatever the defense; empty for none.

    Examples:
        >>> row = {"eps": 0.5, "num_votes": 20, "largest": 0.1379, "needed": 300}
        >>> out_of_reach([{"eps": 0.1}, row])
        '20 draws that all agree certify radius 0.138 at most, so no image could pass 0.5, which needs 300'
    """
    beyond = sorted((row for row in rows if "largest" in row), key=lambda row: row["eps"])
    if not beyond:
        return ""
    row, more = beyond[0], "; nor a larger one" if beyond[1:] else ""
    needed = f", which needs {row['needed']}" if row["needed"] is not None else ""
    return (
        f"{row['num_votes']} draws that all agree certify radius {row['largest']:.3g} at most, so no image "
        f"could pass {row['eps']:.3g}{needed}{more}"
    )


def certify(
    defense: Any,
    data: Inputs | Data,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    target_radius: float | None = None,
    norm: Norm | None = None,
    rule: Rule | str = "vote",
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

    Laplace and uniform noise certify l1 balls, $-\lambda \log(2 (1 - \underline{p}))$ and
    $2 \lambda (\underline{p} - 1/2)$; in other norms a radius is that of the largest ball within. The mean
    probability is bounded by betting (`ballots.mean_low`), as shares of votes are not what it averages.

    Args:
        defense: A `Defense` with normal, Laplace or uniform noise on its raw input.
        data: ``x`` of shape ``(batch, *event)`` in [0, 1]; or ``(x, y)``, a data set or a loader, whose
            labels are not looked at.
        n0: Votes that choose the class.
        n: Votes that bound its share.
        alpha: The chance of a false certificate, per image.
        target_radius: In pixels, in `norm`: a radius that is enough.
        norm: 1, 2 or ``inf``; the noise's own by default: 2 for normal noise, 1 for the others.
        rule: ``"vote"``, or ``"mean_prob"`` for the class of the largest mean probability.
        seed: Of the votes; torch's global state by default.
        chunk_size: Examples that share their votes' noise of weights; one chunk is in memory at a time.
        journal: A folder in which every finished chunk is kept; a rerun with the same seed goes on there.
        fabric: A `lightning_fabric.Fabric` after ``launch()``, for many processes, see `evaluate`.

    Returns:
        A `Certificate`.

    Raises:
        TypeError: not a `Defense`, or data in another form.
        ValueError: no such noise on the raw input, draws that are not independent, or settings out of range.

    References:
        Cohen et al., 2019, [Certified Adversarial Robustness via Randomized
        Smoothing](https://arxiv.org/abs/1902.02918); Yang et al., 2020, [Randomized Smoothing of All
        Shapes and Sizes](https://arxiv.org/abs/2002.08118); Robbins, 1970, [Statistical Methods Related to
        the Law of the Iterated Logarithm](https://doi.org/10.1214/aoms/1177696786)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.25)
        >>> certificate = certify(defense, torch.rand(2, 1, 8, 8), n0=10, n=100)
        >>> certificate.radius.shape, certificate.sigma, certificate.norm
        (torch.Size([2]), 0.25, 2.0)
    """
    n0, n, alpha = check_count("n0", n0), check_count("n", n), check_share("alpha", alpha)
    seed = None if seed is None else check_seed(seed)
    if target_radius is not None:
        target_radius = check_positive("target_radius", target_radius)
    if journal is not None and seed is None:
        raise ValueError("expected seed= beside journal=, got none; a rerun has to draw the same votes")
    about = _about(rule)
    family, sigma = smoothing_noise(defense)
    norm = SHAPES[family].norm if norm is None else check_norm(norm)
    refuse_dependent(defense, about, target_radius)
    processes = Processes(fabric)
    key = processes.from_first(int(torch.randint(2**62, ()))) if seed is None else derive(seed, "certify")
    asked = {"certify": [n0, n, alpha, target_radius, norm, about], "seed": seed, "chunk_size": chunk_size}
    book = Book.opened(journal, processes, asked, defense, {})
    like, unit = torch.zeros(()), sigma
    for chunk in chunks(_labelled(data), chunk_size):
        chunk = chunk.on(processes.device)
        like, unit = chunk.x.new_zeros(()), sigma * shrinking(family, norm, chunk.x[0].numel())
        if book.takes(chunk) and not book.has(PLACE, chunk):
            target = None if target_radius is None else enough(target_radius, family, unit)
            with torch.no_grad(), forked(derive(key, chunk.number), like.device):
                ballot = _ballot(defense, chunk, (n0, n, alpha), about, target)
            book.write(PLACE, chunk, Record(ballot._asdict(), n, Spent()))
    found = {name: torch.as_tensor(array) for name, array in book.joined()[PLACE].arrays.items()}
    shared = getattr(defense, "shares_draws", True)
    return _certificate(
        found, like, unit, shared, sigma=sigma, alpha=alpha, norm=norm, family=family, rule=about
    )


def _ballot(
    defense: Any, chunk: Chunk, counts: tuple[int, int, float], rule: str, target: float | None
) -> Ballot:
    """The draws of one chunk."""
    if rule == "mean_prob":
        return mean_ballot(defense, chunk.x, *counts)
    if target is None:
        return counted_ballot(defense, chunk.x, *counts)
    return raced_ballot(defense, chunk.x, *counts, target)


def _certificate(
    found: dict[str, Tensor], like: Tensor, unit: float, shared: bool, **about: Any
) -> Certificate:
    """What all chunks found, on the device and in the precision of the inputs, rounded down."""
    certain = found["chosen"].where(found["share"] > 0.5, -1)
    radius = certified_radius(found["share"], about["family"], unit).where(certain >= 0, 0.0)
    return Certificate(
        label=certain.to(like.device),
        radius=rounded_down(radius, like.dtype).to(like.device),
        share=rounded_down(found["share"], like.dtype).to(like.device),
        num_votes=found["num_votes"].to(like.device),
        unit=unit,
        observed=found["observed"].to(like.device, like.dtype),
        shifts=found["shifts"].to(like.device, like.dtype) if shared else None,
        **about,
    )


def _about(rule: Any) -> str:
    """The name of the rule that is certified.

    Raises:
        ValueError: another rule.
    """
    name = RULES.get(as_rule(rule))
    if name is None:
        raise ValueError(
            f"expected rule 'vote' or 'mean_prob', got {getattr(rule, '__name__', rule)!r}; no other rule "
            "has a certificate"
        )
    return name


def _labelled(data: Any) -> Any:
    """The data, with labels that nobody looks at where there are none."""
    if isinstance(data, Tensor):
        data = check_inputs(data)
        return data, torch.zeros(len(data), dtype=torch.int64, device=data.device)
    return data


def _name(norm: Norm) -> str:
    return f"{norm:g}" if norm < float("inf") else "-inf"
