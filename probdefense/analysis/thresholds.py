r"""Robust accuracy as a function of the radius: a hierarchical model of attack success, by NUTS.

Example $i$ has a difficulty $z_i$ that it shows to every defense, and a robustness $u_{id}$ against the
attack of each. It is misclassified at radius $\epsilon$ once the radius has passed its threshold:

$$ u_{id} = \sqrt{\rho}\, z_i + \sqrt{1 - \rho}\, w_{id}, \qquad z_i, w_{id} \sim N(0, 1), \qquad
   \text{wrong at } \epsilon \iff u_{id} < b_d (\epsilon / \epsilon_{max})^{\gamma_d} - a_d $$

and a verdict contradicts this with probability $\lambda_d$ (a lucky draw, a failed attack). Thresholds
are integrated out exactly, so the time of a step depends on how many different outcomes there are and
not on the number of examples. Priors: $a \sim N(1.5, 1)$, $\log b \sim N(\log 2, 1)$, $\log \gamma \sim
N(0, 1/2)$, $\mathrm{logit} \lambda \sim N(-4.5, 1)$, $\mathrm{logit}(\rho / 0.9) \sim N(0, 1.5)$.
"""

from typing import Any, NamedTuple

import numpy as np

MAX_SHARED = 0.9
NODES = 32
"""Points of the Gauss-Hermite rule over the difficulty; exact enough up to the largest rho."""

PRIOR = {
    "clean": (1.5, 1.0),
    "log drop": (np.log(2.0), 1.0),
    "log shape": (0.0, 0.5),
    "logit lapse": (-4.5, 1.0),
}
"""Mean and standard deviation of what every defense has of its own."""


class Outcomes(NamedTuple):
    """The different outcomes and how often each occurred.

    ``mismatch`` (outcomes, defenses, radii + 1): at how many radii the verdicts contradict a threshold
    just above the first k radii; ``counts`` (outcomes,); ``which`` (examples,) outcome of an example.
    """

    eps: np.ndarray
    mismatch: np.ndarray
    counts: np.ndarray
    which: np.ndarray


def tally(bits: np.ndarray, eps: np.ndarray) -> Outcomes:
    """Counts equal outcomes of success arrays ``(defenses, radii, examples)``."""
    defenses, radii, examples = bits.shape
    flat = bits.reshape(-1, examples).T
    different, which, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    wrong = different.reshape(-1, defenses, 1, radii)
    expected = np.arange(radii) >= np.arange(radii + 1)[:, None]  # after k radii: wrong from there on
    return Outcomes(eps, (wrong != expected).sum(-1), counts, which.reshape(-1))


def success_model(outcomes: Outcomes) -> None:
    """The NumPyro model, thresholds integrated out."""
    import numpyro
    import numpyro.distributions as dist

    shape = (outcomes.mismatch.shape[1], len(PRIOR))
    raw = numpyro.sample("raw", dist.Normal(0.0, 1.0).expand(shape).to_event(2))
    raw_shared = numpyro.sample("raw_shared", dist.Normal(0.0, 1.0))
    log_lik = log_likelihood(constrained(raw, raw_shared), outcomes)
    numpyro.factor("outcomes", (outcomes.counts * log_lik).sum())


def start(outcomes: Outcomes) -> dict[str, np.ndarray]:
    """The medians of the priors, where chains start."""
    return {"raw": np.zeros((outcomes.mismatch.shape[1], len(PRIOR))), "raw_shared": np.zeros(())}


def constrained(raw: Any, raw_shared: Any) -> dict[str, Any]:
    """Parameters by name, one per defense and one shared, from standard normal numbers."""
    import jax
    import jax.numpy as jnp

    clean, drop, shape, lapse = (loc + scale * raw[..., k] for k, (loc, scale) in enumerate(PRIOR.values()))
    return {
        "clean": clean,
        "drop": jnp.exp(drop),
        "shape": jnp.exp(shape),
        "lapse": jax.nn.sigmoid(lapse),
        "shared": MAX_SHARED * jax.nn.sigmoid(1.5 * raw_shared),
    }


def log_likelihood(theta: dict[str, Any], outcomes: Outcomes) -> Any:
    """Log-probability of every outcome, ``(outcomes,)``, thresholds integrated out."""
    from jax.scipy.special import logsumexp

    return logsumexp(_log_nodes(theta, outcomes), axis=-1)


def _critical(theta: dict[str, Any], eps: Any) -> Any:
    """The robustness that an example needs to survive each radius, ``(defenses, radii)``."""
    import jax.numpy as jnp

    positive = jnp.where(eps > 0, eps / eps.max(), 1.0)  # the slope of a power at 0 is not a number
    power = positive ** theta["shape"][:, None]
    return jnp.where(eps > 0, theta["drop"][:, None] * power, 0.0) - theta["clean"][:, None]


def _shares(theta: dict[str, Any], eps: Any) -> Any:
    """P(threshold in each interval | difficulty), ``(nodes, defenses, radii + 1)``."""
    import jax.numpy as jnp
    from jax.scipy.stats import norm

    center, spread = _given_difficulty(theta)
    below = norm.cdf((_critical(theta, eps) - center[:, None, None]) / spread)
    edges = jnp.pad(below, ((0, 0), (0, 0), (1, 1)), constant_values=((0, 0), (0, 0), (0.0, 1.0)))
    return jnp.clip(jnp.diff(edges, axis=-1), 1e-7)


def _verdicts(theta: dict[str, Any], outcomes: Outcomes) -> Any:
    """P(verdicts of a defense | interval of the threshold), ``(outcomes, defenses, radii + 1)``."""
    import jax.numpy as jnp

    lapse = theta["lapse"][:, None]
    agree = len(outcomes.eps) - outcomes.mismatch
    return jnp.exp(outcomes.mismatch * jnp.log(lapse) + agree * jnp.log1p(-lapse))


def _given_difficulty(theta: dict[str, Any]) -> tuple[Any, Any]:
    """Mean of the robustness at every node of the difficulty, ``(nodes,)``, and its spread."""
    import jax.numpy as jnp

    nodes, _ = _rule(theta)
    if len(nodes) == 1:  # a defense alone shares its difficulty with nobody
        return jnp.zeros(1), 1.0
    return jnp.sqrt(theta["shared"]) * nodes, jnp.sqrt(1 - theta["shared"])


def _rule(theta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES if len(theta["clean"]) > 1 else 1)
    return nodes, np.log(weights / weights.sum())


def _log_nodes(theta: dict[str, Any], outcomes: Outcomes) -> Any:
    """Log of weight x P(outcome | difficulty), ``(outcomes, nodes)``: its log-sum is the likelihood."""
    import jax.numpy as jnp

    share, verdicts = _shares(theta, outcomes.eps), _verdicts(theta, outcomes)
    given = jnp.einsum("pdk,qdk->pqd", verdicts, share)
    return jnp.log(jnp.clip(given, 1e-37)).sum(-1) + _rule(theta)[1]


def _thresholds(theta: dict[str, Any], outcomes: Outcomes, key: Any) -> Any:
    """One posterior draw of the threshold behind every outcome, in pixels, ``(outcomes, defenses)``."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(key, 3)
    node = jax.random.categorical(keys[0], _log_nodes(theta, outcomes))
    joint = _shares(theta, outcomes.eps)[node] * _verdicts(theta, outcomes)
    interval = jax.random.categorical(keys[1], jnp.log(joint))
    edges = jnp.pad(_critical(theta, outcomes.eps), ((0, 0), (1, 1)), constant_values=((0, 0), (-8.0, 8.0)))
    center, spread = _given_difficulty(theta)
    center, each = center[node][:, None], jnp.arange(len(edges))
    low, high = ((edges[each, interval + side] - center) / spread for side in (0, 1))
    robustness = center + spread * jax.random.truncated_normal(keys[2], low, high)
    reach = jnp.clip(robustness + theta["clean"], 0.0)
    return outcomes.eps.max() * (reach / theta["drop"]) ** (1 / theta["shape"])


def predict_draws(chains: Any, outcomes: Outcomes, grid: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """For every draw: parameters, accuracy on the grid, log-likelihood and thresholds of outcomes."""
    import jax
    from jax.scipy.stats import norm

    def of_draw(arguments: Any) -> dict[str, Any]:
        raw, raw_shared, key = arguments
        theta = constrained(raw, raw_shared)
        survive, lapse = norm.cdf(-_critical(theta, grid)), theta["lapse"][:, None]
        return theta | {
            "accuracy": (1 - lapse) * survive + lapse * (1 - survive),
            "log_lik": log_likelihood(theta, outcomes),
            "threshold": _thresholds(theta, outcomes, key),
        }

    raw, raw_shared = (value.reshape(-1, *value.shape[2:]) for value in (chains["raw"], chains["raw_shared"]))
    keys = jax.random.split(jax.random.PRNGKey(seed + 1), len(raw))
    found = jax.lax.map(of_draw, (raw, raw_shared, keys))
    return {name: np.asarray(value) for name, value in found.items()}
