r"""Leave-one-out predictive density and the Pareto $\hat k$, where they mean something.

Vehtari et al., 2017, [Practical Bayesian model evaluation using leave-one-out
cross-validation and WAIC](https://arxiv.org/abs/1507.04544). Removing one example reweighs the draws
by $1 / p(y_i \mid x_i, \theta_s)$, with the largest weights smoothed by a Pareto tail of shape $\hat k$.
"""

import warnings
from typing import Any

import numpy as np
import torch

from probdefense.analysis.pictures import groups_of
from probdefense.analysis.trees import from_groups
from probdefense.core.defense import Defense
from probdefense.core.programs import vector
from probdefense.core.sites import WeightSite
from probdefense.rng import forked
from probdefense.tables import html_table
from probdefense.types import Inputs, Labels
from probdefense.validation import check_classes, check_count, check_examples, check_kind, check_seed

FEWEST = 25
"""Draws that a tail is fitted to; a network without randomness has one, and no tail."""


class Loo:
    """Leave-one-out density in nats, made by `loo`: what ``arviz.loo`` returns, and a few names more.

    It is an instance of ArviZ's own class, so ``arviz.compare`` and ``arviz.plot_khat`` take it. ``elpd``
    and its standard error ``se`` are for all examples; ``num_dropped`` examples have one log-likelihood in
    all draws of their tail.
    """

    elpd: float
    se: float
    num_dropped: int

    @property
    def pointwise(self) -> np.ndarray:
        """The density of each example, ``(examples,)``."""
        return np.asarray(getattr(self, "elpd_i" if hasattr(self, "elpd_i") else "loo_i"))

    @property
    def k_hat(self) -> np.ndarray:
        """By example; NaN where no tail was fitted, and above 0.7 the estimate is unreliable."""
        return np.asarray(self.pareto_k)  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        k = self.k_hat
        rows: list[dict[str, Any]] = [
            {"quantity": "expected log density, left out (nats)", "value": f"{self.elpd:.2f}"},
            {"quantity": "standard error", "value": f"{self.se:.2f}"},
            {"quantity": "examples", "value": len(k)},
            {"quantity": "k-hat above 0.7", "value": int((k > 0.7).sum())},
            {"quantity": "no tail fitted", "value": int(np.isnan(k).sum())},
        ]
        return html_table(rows, ("quantity", "value"), "Leave-one-out density")


def loo(tree: Any) -> Loo:
    r"""Leave-one-out density of a container that `to_arviz` made of a defense and its training data.

    Examples whose log-likelihood does not vary are not given to ArviZ (1.x fails on them): they are
    counted, and their density is the harmonic mean that smoothing would leave as it is. Where noise
    alone is random (on weights too) nothing was fitted by the draws, so leaving an example out changes
    nothing and the answer is $\log \frac1S \sum_s p(y_i \mid x_i, \varepsilon_s)$, without a $\hat k$.
    On test data that holds for every defense. Below 25 draws no tail is fitted and $\hat k$ is NaN.

    Args:
        tree: From ``to_arviz(defense, (x, y))``.

    Returns:
        A `Loo`, which is ArviZ's own ``ELPDData`` too.

    Raises:
        ValueError: a container of another origin.

    References:
        Vehtari et al., 2017, [Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC](https://arxiv.org/abs/1507.04544)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn())
        >>> tree = pd.to_arviz(defense, (torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])), num_samples=4)
        >>> loo(tree).num_dropped
        0
    """
    found = groups_of(tree)
    if "log_likelihood" not in found or "weights_are_random" not in tree["log_likelihood"].attrs:
        raise ValueError(
            "expected a container that to_arviz(defense, (x, y)) made, with the log-likelihood of a defense, "
            f"got groups {', '.join(sorted(found))}; make it so"
        )
    group = tree["log_likelihood"]
    log_lik = np.asarray(group["y"], dtype=np.float64)
    draws = log_lik.reshape(-1, log_lik.shape[-1])
    count, examples = draws.shape
    seen = np.logaddexp.reduce(draws) - np.log(count)
    if not group.attrs["weights_are_random"]:
        return _filled(log_lik, np.zeros(examples, dtype=bool), seen, seen, 0)
    lowest = np.sort(draws, axis=0)[: max(2, int(min(count / 5, 3 * count**0.5)))]
    varies = (lowest[-1] > lowest[0]) & (count >= FEWEST)
    left_out = np.log(count) - np.logaddexp.reduce(-draws)
    return _filled(log_lik, varies, left_out, seen, int((~varies).sum()))


def guide_k_hat(
    defense: Defense, data: tuple[Inputs, Labels], *, num_samples: int = 1000, seed: int = 0
) -> float:
    r"""Whether a guide is close enough to the posterior to be corrected: the Pareto $\hat k$ of $p/q$.

    The ratios are $p(y \mid x, \theta) p(\theta) / q(\theta)$ on the whole data set. Below 0.7 the guide
    can stand in for the posterior; with more than some tens of random weights it always fails, so
    this is a test for last layers and very small networks.

    Args:
        defense: With random weights that have a prior, and no noise.
        data: ``(x, y)``, all the training data.
        num_samples: Draws.
        seed: Of the draws.

    Returns:
        $\hat k$, one number for all draws.

    Raises:
        ValueError: noise sites, or weights without a prior.

    References:
        Yao et al., 2018, [Yes, but Did It Work?: Evaluating Variational
        Inference](https://arxiv.org/abs/1802.02538)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.bayesian(torch.nn.Linear(1, 2), num_data=3)
        >>> guide_k_hat(defense, (torch.rand(3, 1), torch.tensor([0, 1, 1])), num_samples=100) > 0
        True
    """
    num_samples, seed = check_count("num_samples", num_samples), check_seed(seed)
    check_kind("defense", defense, Defense, "make one with probdefense.defenses.bayesian(net, ...)")
    x, y = check_examples(data)
    sites = list(defense.sites.values())
    if not sites or not all(isinstance(site, WeightSite) and site.prior and site.posterior for site in sites):
        raise ValueError(
            f"expected random weights with a prior and nothing else, got {[s.name for s in sites]}; noise "
            "has no posterior to miss: make the defense with bayesian(net, prior=...) alone"
        )
    with torch.no_grad(), forked(seed, x.device):
        frozen: Any = defense.freeze(num_samples)
        log_probs = frozen(x).double().log_softmax(-1)
        check_classes(y, log_probs.shape[-1])
        ratio = log_probs.gather(-1, y.expand(log_probs.shape[:-1]).unsqueeze(-1)).sum((1, 2))
        for site in sites:
            value = frozen.values(site.name)
            for side, sign in (("prior", 1.0), ("posterior", -1.0)):
                ratio += sign * vector(site, side).log_prob(value).double()
    twice = np.stack([-ratio.cpu().numpy()] * 2, axis=-1)  # ArviZ suspects a mistake behind one observation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ warns of a large k, which is the answer here
        return float(np.asarray(_theirs(twice[None]).pareto_k)[0])


def _filled(
    log_lik: np.ndarray, varies: np.ndarray, left_out: np.ndarray, seen: np.ndarray, num_dropped: int
) -> Loo:
    """ArviZ's answer where the log-likelihood varies, and `left_out` elsewhere, without a k."""
    chains, draws = log_lik.shape[:2]
    rows = np.broadcast_to(log_lik[:, :1], (chains, FEWEST, len(varies))) if draws < FEWEST else log_lik
    stand_in = 1e-3 * np.sin(np.arange(rows[..., 0].size)).reshape(*rows.shape[:2], 1)
    result = _theirs(np.where(varies, rows, stand_in))
    pointwise, k_hat = _pointwise(result), np.array(result.pareto_k)
    pointwise[~varies], k_hat[~varies] = left_out[~varies], np.nan
    total = float(pointwise.sum())
    found = {
        "elpd_loo" if hasattr(result, "elpd_loo") else "elpd": total,
        "se": float(np.sqrt(len(pointwise) * pointwise.var())),
        "p_loo" if hasattr(result, "p_loo") else "p": float(seen.sum()) - total,
        "n_samples": chains * draws,
        "warning": bool((k_hat > result.good_k).any()),
        **{
            name: result[name].copy(data=v)
            for name, v in ((_by_example(result), pointwise), ("pareto_k", k_hat))
        },
    }
    for name, value in found.items():
        result[name] = value
    theirs = type(result)
    own: dict[str, Any] = {} if hasattr(result, "elpd") else {"elpd": property(lambda self: self["elpd_loo"])}
    result.__class__ = type("Loo", (Loo, theirs), own)
    object.__setattr__(result, "num_dropped", num_dropped)  # beside the entries, which ArviZ prints
    return result


def _by_example(result: Any) -> str:
    return "loo_i" if hasattr(result, "loo_i") else "elpd_i"


def _pointwise(result: Any) -> np.ndarray:
    return np.array(result[_by_example(result)])


def _theirs(log_lik: np.ndarray) -> Any:
    """What ArviZ makes of log-likelihoods ``(chain, draw, example)``."""
    import arviz

    blank = np.zeros(log_lik.shape[:2])
    tree = from_groups(
        {"posterior": {"unused": blank}, "log_likelihood": {"y": log_lik}},
        coords={},
        dims={"y": ["example"]},
    )
    return arviz.loo(tree, pointwise=True, reff=1.0)  # draws of a guide are independent
