r"""Robust accuracy as a function of the radius, with posterior bands, from attacks at a few radii.

The model of `probdefense.analysis.thresholds` puts one threshold behind every example and defense; the
curve is the share of the population whose threshold lies beyond the radius.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probdefense.analysis.thresholds import Outcomes, predict_draws, start, success_model, tally
from probdefense.analysis.trees import from_groups
from probdefense.evaluation.arrays import radii_of
from probdefense.evaluation.report import Report, check_report
from probdefense.validation import check_count, check_kind, check_member, check_seed

MAX_R_HAT = 1.02
MIN_ESS = 100
"""Effective draws per chain below which bands are not to be trusted."""


@dataclass(frozen=True)
class RobustnessCurve:
    """Posterior of robust accuracy as a function of the radius.

    Attributes:
        defenses: Their names.
        eps: Radii of the curve in pixels, ``(radii,)``, from 0 to the largest that was measured.
        accuracy: Posterior draws, ``(draws, defenses, radii)``.
        observed: Measured accuracy by defense: radii and values.
        data: ArviZ container: parameters and thresholds (pixels) in ``posterior``, ``log_likelihood`` by
            example.
        r_hat: The largest over parameters.
        ess: The smallest effective sample size over parameters.

    Examples:
        >>> eps, draws = np.array([0.0, 0.1]), np.array([[[0.9, 0.5], [0.8, 0.6]]] * 4)
        >>> curve = RobustnessCurve(["a", "b"], eps, draws, {}, None, r_hat=1.0, ess=4.0)
        >>> curve.dominates("a", "b")
        array([1., 0.])
    """

    defenses: list[str]
    eps: np.ndarray
    accuracy: np.ndarray
    observed: dict[str, tuple[np.ndarray, np.ndarray]]
    data: Any
    r_hat: float
    ess: float

    def band(self, defense: str, probability: float = 0.95) -> np.ndarray:
        """Lower end, median and upper end of the accuracy at every radius, ``(3, radii)``."""
        tail = (1 - probability) / 2
        draws = self.accuracy[:, self._index(defense)]
        return np.quantile(draws, [tail, 0.5, 1 - tail], axis=0)

    def dominates(self, first: str, second: str) -> np.ndarray:
        """Posterior probability that `first` is more accurate than `second`, at every radius."""
        return (self.accuracy[:, self._index(first)] > self.accuracy[:, self._index(second)]).mean(0)

    def _index(self, defense: str) -> int:
        check_member("defense", defense, self.defenses)
        return self.defenses.index(defense)


def robustness_curve(
    results: Report | Mapping[str, np.ndarray],
    eps: Sequence[float] | None = None,
    *,
    attack: str | None = None,
    rule: str | None = None,
    num_samples: int = 500,
    num_warmup: int = 500,
    num_chains: int = 2,
    seed: int = 0,
) -> RobustnessCurve:
    r"""Robust accuracy of every defense at every radius, with bands, from success at a few radii.

    All defenses are fitted together: they meet the same examples, so comparisons are paired.

    Args:
        results: A `Report` over several radii, or by defense an array ``(radii, examples)`` that is
            true where the attack succeeded.
        eps: Radii of the arrays in pixels; 0 stands for clean inputs.
        attack: Which attack of the report; ``"worst"`` by default if it is there, else the only one.
        rule: Which rule of the report; its first by default.
        num_samples: Draws per chain.
        num_warmup: Steps of adaptation per chain.
        num_chains: Chains, one after the other.
        seed: Of the chains.

    Returns:
        A `RobustnessCurve`; warns if R-hat or the effective sample size says not to trust it.

    Raises:
        ValueError: fewer than two radii, arrays of different shapes, or a choice that is not there.

    References:
        Finney, 1947, [Probit Analysis](https://doi.org/10.1017/CBO9780511569180), for thresholds
        behind dose-response curves.

    Examples:
        >>> robustness_curve({"net": np.zeros((1, 5), dtype=bool)}, eps=[0.1])
        Traceback (most recent call last):
        ValueError: expected at least two radii, rising from 0 or more, got [0.1]; ...
    """
    from probdefense.numpyro.chains import run_chains

    seed, num_samples = check_seed(seed), check_count("num_samples", num_samples)
    num_warmup, num_chains = check_count("num_warmup", num_warmup, 0), check_count("num_chains", num_chains)
    if isinstance(results, Report):
        success, radii = _of_report(results, attack, rule)
    else:
        check_kind("results", results, Mapping, "give a Report, or arrays by defense")
        success, radii = dict(results), np.asarray([] if eps is None else radii_of(eps))
    bits = _checked(success, radii)
    outcomes = tally(bits, radii)
    chains = run_chains(
        success_model,
        (outcomes,),
        start(outcomes),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        seed=seed,
        dense_mass=True,
    )
    grid = np.linspace(0.0, radii.max(), 51)
    return _summarize(chains, outcomes, list(success), bits, grid, seed)


def _summarize(
    chains: Any, outcomes: Outcomes, defenses: list[str], bits: np.ndarray, grid: np.ndarray, seed: int
) -> RobustnessCurve:
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    values = [np.asarray(value) for value in chains.values()]
    r_hat = max(float(np.max(split_gelman_rubin(value))) for value in values)
    ess = min(float(np.min(effective_sample_size(value))) for value in values)
    _warn(r_hat, ess, len(values[0]))
    found = predict_draws(chains, outcomes, grid, seed)
    accuracy, shape = found.pop("accuracy"), values[0].shape[:2]
    if len(defenses) == 1:
        del found["shared"]  # there is nobody to share with, and its draws are the prior's
    found["threshold"] = np.swapaxes(found["threshold"][:, outcomes.which], 1, 2)
    log_lik = found.pop("log_lik")[:, outcomes.which]
    own = [name for name in found if name not in ("shared", "threshold")]
    data = from_groups(
        {
            "posterior": {name: value.reshape(*shape, *value.shape[1:]) for name, value in found.items()},
            "log_likelihood": {"outcome": log_lik.reshape(*shape, -1)},
            "observed_data": {"success": bits.astype(np.int8)},
        },
        coords={"defense": defenses, "eps": outcomes.eps, "example": np.arange(bits.shape[-1])},
        dims={name: ["defense"] for name in own}
        | {"threshold": ["defense", "example"], "outcome": ["example"]}
        | {"success": ["defense", "eps", "example"]},
    )
    measured = {name: (outcomes.eps, 1 - bits[d].mean(-1)) for d, name in enumerate(defenses)}
    return RobustnessCurve(defenses, grid, accuracy, measured, data, r_hat, ess)


def _warn(r_hat: float, ess: float, chains: int) -> None:
    if r_hat > MAX_R_HAT or ess < MIN_ESS * chains:
        warnings.warn(
            f"R-hat {r_hat:.3f} (at most {MAX_R_HAT}) and effective sample size {ess:.0f} (at least "
            f"{MIN_ESS * chains}): do not trust the bands; raise num_warmup and num_samples",
            stacklevel=3,
        )


def _of_report(
    report: Report, attack: str | None, rule: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One verdict per example at every radius, clean included, by defense."""
    rule = rule or check_report(report).rows[0]["rule"]
    names = list(dict.fromkeys(row["attack"] for row in report.rows if row["attack"] != "clean"))
    if attack is None and "worst" not in names and len(names) > 1:
        raise ValueError(f"expected attack= with several attacks in the report; known: {', '.join(names)}")
    attack = attack or ("worst" if "worst" in names else "".join(names))
    check_member("attack", attack, names)
    check_member("rule", rule, {row["rule"] for row in report.rows})
    rows = [r for r in report.rows if r["rule"] == rule and r["attack"] in ("clean", attack)]
    radii = sorted({row["eps"] for row in rows})
    found = {(row["defense"], row["eps"]): row["attack"] for row in rows}
    success = {
        name: np.stack(
            [~report.arrays.at("correct", name, found[name, r], r, rule)[0].astype(bool) for r in radii]
        )
        for name in dict.fromkeys(row["defense"] for row in rows)
    }
    return success, np.array(radii)


def _checked(success: dict[str, np.ndarray], eps: np.ndarray) -> np.ndarray:
    shapes = {np.shape(value) for value in success.values()}
    if len(eps) < 2 or not bool((np.diff(eps) > 0).all()) or eps.min() < 0:
        raise ValueError(
            f"expected at least two radii, rising from 0 or more, got {eps.tolist()}; give those of the "
            "arrays"
        )
    fits = len(shapes) == 1 and all(len(s) == 2 and s[0] == len(eps) and s[1] > 0 for s in shapes)
    if not fits:
        raise ValueError(
            f"expected arrays ({len(eps)} radii, examples), all alike, got {sorted(shapes)}; give one row "
            "per "
            "radius"
        )
    tables = [np.asarray(value) for value in success.values()]
    if not all(bool(np.isin(table, (0, 1)).all()) for table in tables):
        raise ValueError(
            "expected every entry true or false, got others; say for each example if it was fooled"
        )
    return np.stack([table.astype(bool) for table in tables])
