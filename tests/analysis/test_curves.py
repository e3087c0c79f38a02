"""The model of robustness curves: its likelihood, its calibration, its sampler, and what it reads."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from torch import nn

import probdefense as pd
from probdefense.analysis import robustness_curve
from probdefense.analysis.curves import _of_report, _warn
from probdefense.analysis.thresholds import constrained, log_likelihood, tally
from tests.analysis.test_arviz import flat_batch
from tests.worlds import FAILURE_RATE, normal_quantile

EPS = np.array([0.0, 0.1, 0.2, 0.3])


def simulate(theta, eps, examples, rng):
    """Success arrays ``(defenses, radii, examples)`` from the model, written independently of it."""
    z = rng.normal(size=examples)
    success = []
    for clean, drop, shape, lapse in zip(
        *(theta[n] for n in ("clean", "drop", "shape", "lapse")), strict=True
    ):
        u = math.sqrt(theta["shared"]) * z + math.sqrt(1 - theta["shared"]) * rng.normal(size=examples)
        wrong = u < drop * (eps[:, None] / eps.max()) ** shape - clean
        success.append(wrong ^ (rng.random(wrong.shape) < lapse))
    return np.stack(success)


def every_outcome(defenses):
    """All outcomes at the radii, each counted once."""
    bits = np.array(list(itertools.product([False, True], repeat=defenses * len(EPS))))
    return tally(bits.T.reshape(defenses, len(EPS), -1), EPS)


PLANTED = {
    "clean": np.array([2.0, 1.4]),
    "drop": np.array([3.0, 3.4]),
    "shape": np.array([1.2, 0.9]),
    "lapse": np.array([0.02, 0.05]),
    "shared": 0.6,
}


@pytest.mark.slow
def test_the_likelihood_is_a_distribution_and_that_of_the_simulation():
    theta, outcomes = {name: jnp.asarray(value) for name, value in PLANTED.items()}, every_outcome(2)
    expected = np.exp(np.asarray(log_likelihood(theta, outcomes), dtype=np.float64))
    assert expected.sum() == pytest.approx(1.0, abs=1e-4)
    bits = simulate(PLANTED, EPS, 20_000, np.random.default_rng(0)).reshape(8, -1)
    observed = np.bincount(2 ** np.arange(7, -1, -1) @ bits, minlength=256)  # outcomes are in binary order
    common = 20_000 * expected > 5
    groups = [np.append(v[common], v[~common].sum()) for v in (observed, 20_000 * expected / expected.sum())]
    assert stats.chisquare(*groups).pvalue > FAILURE_RATE
    assert stats.chisquare(groups[0], np.roll(groups[1], 1)).pvalue < FAILURE_RATE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:R-hat .* do not trust the bands")
def test_the_curve_recovers_planted_thresholds_and_which_defense_dominates():
    rng = np.random.default_rng(1)
    bits = simulate(PLANTED, EPS, 250, rng)
    results = {"strong": bits[0], "weak": bits[1]}
    curve = robustness_curve(results, EPS, num_samples=400, num_warmup=200, num_chains=1)
    for d, name in enumerate(curve.defenses):
        lapse = PLANTED["lapse"][d]
        survive = stats.norm.cdf(
            PLANTED["clean"][d] - PLANTED["drop"][d] * (curve.eps / 0.3) ** PLANTED["shape"][d]
        )
        truth = (1 - lapse) * survive + lapse * (1 - survive)
        low, middle, high = curve.band(name, 0.999)
        assert bool(((low < truth) & (truth < high)).all()) and (high - low).max() < 0.25
        assert np.interp(EPS, curve.eps, middle) == pytest.approx(1 - bits[d].mean(-1), abs=0.05)
    probability = curve.dominates("strong", "weak")
    assert probability[17] > 0.99 and probability == pytest.approx(1 - curve.dominates("weak", "strong"))
    posterior = curve.data["posterior"]
    for name, value in PLANTED.items():
        draws = np.asarray(posterior[name]).reshape(400, -1)
        z = (draws.mean(0) - value) / draws.std(0)
        assert np.abs(z).max() < normal_quantile()
    thresholds = np.asarray(posterior["threshold"]).mean((0, 1))
    assert thresholds.shape == (2, 250)
    clean = ~bits.any(1), bits[:, 0] & bits.all(1)
    assert thresholds[clean[0]].min() > 0.2 and thresholds[clean[1]].max() < 0.1
    assert np.asarray(curve.data["log_likelihood"]["outcome"]).shape == (1, 400, 250)


def exact_posterior(counts, draws=60_000):
    """Draws from the prior of one defense, and their weights for each row of counts of outcomes."""
    raw = np.random.default_rng(1).normal(size=(draws, 1, 4))
    theta = jax.vmap(lambda one: constrained(one, 0.0))(jnp.asarray(raw))
    table = every_outcome(1)
    log_lik = np.asarray(jax.lax.map(lambda one: log_likelihood(one, table), theta, batch_size=2000))
    log_weight = np.asarray(counts, dtype=np.float64) @ log_lik.T.astype(np.float64)
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    return raw[:, 0], weight / weight.sum(1, keepdims=True)


@pytest.mark.slow
def test_simulation_based_calibration(replicates=300, examples=40):
    """Ranks of the truth in the posterior are uniform when truth and data come from the model."""
    rng = np.random.default_rng(0)
    truths, counts = rng.normal(size=(replicates, 1, 4)), []
    for truth in truths:
        theta = {name: np.asarray(value) for name, value in constrained(truth, np.zeros(())).items()}
        bits = simulate(theta | {"shared": 0.0}, EPS, examples, rng)[0]
        counts.append(np.bincount(2 ** np.arange(3, -1, -1) @ bits, minlength=16))
    draws, weights = exact_posterior(counts)
    assert np.median(1 / np.square(weights).sum(1)) > 200  # effective draws

    def p_values(truths):
        ranks = [
            [w[draws[:, k] < t[k]].sum() for k in range(4)] for w, t in zip(weights, truths, strict=True)
        ]
        return [stats.kstest(column, "uniform").pvalue for column in np.array(ranks).T]

    assert min(p_values(truths[:, 0])) > FAILURE_RATE
    assert max(p_values(truths[:, 0] + 0.7)) < FAILURE_RATE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:R-hat .* do not trust the bands")
def test_the_sampler_agrees_with_the_exact_posterior_of_one_defense():
    alone = {name: value[:1] if name != "shared" else 0.0 for name, value in PLANTED.items()}
    bits = simulate(alone, EPS, 60, np.random.default_rng(2))
    counts = np.bincount(2 ** np.arange(3, -1, -1) @ bits[0], minlength=16)
    draws, (weight,) = exact_posterior([counts])
    mean = weight @ draws
    deviation = np.sqrt(weight @ np.square(draws - mean))
    curve = robustness_curve({"net": bits[0]}, EPS, num_samples=500, num_warmup=200, num_chains=1)
    posterior = curve.data["posterior"]
    assert "shared" not in posterior
    sampled = (
        np.log(np.asarray(posterior["drop"])).reshape(-1) - math.log(2.0),
        np.asarray(posterior["clean"]) - 1.5,
    )
    for found, k in zip(sampled, (1, 0), strict=True):
        assert found.mean() == pytest.approx(mean[k], abs=4.3 * deviation[k] / math.sqrt(100))
        assert found.std() == pytest.approx(deviation[k], rel=4.3 / math.sqrt(200))


def test_a_curve_from_a_report():
    defense, data = pd.deterministic(nn.Linear(4, 3)), flat_batch(30)
    attacks = {"fgsm": pd.attacks.fgsm, "pgd": partial(pd.attacks.pgd, num_steps=3)}
    report = pd.evaluate(defense, data, attacks, eps=[0.1, 0.3], num_samples=2, name="net")
    success, eps = _of_report(report, None, None)
    assert eps.tolist() == [0.0, 0.1, 0.3]
    worst = [
        1 - report.row(attack=a, eps=e, rule="mean_prob")["accuracy"]
        for a, e in (("clean", 0.0), ("worst", 0.1), ("worst", 0.3))
    ]
    assert success["net"].mean(1).tolist() == pytest.approx(worst)
    with pytest.raises(ValueError, match="unknown attack 'cw'; known: fgsm, pgd, worst"):
        robustness_curve(report, attack="cw")


def test_bad_results_are_refused():
    with pytest.raises(ValueError, match="at least two radii, rising from 0"):
        robustness_curve({"net": np.zeros((2, 5), bool)}, [0.2, 0.1])
    with pytest.raises(ValueError, match=r"expected arrays \(2 radii, examples\)"):
        robustness_curve({"net": np.zeros((3, 5), bool)}, [0.1, 0.2])


def test_bands_of_chains_that_have_not_met_come_with_a_warning():
    with pytest.warns(
        UserWarning, match=r"R-hat 1\.500 .* effective sample size 300 .* do not trust the bands"
    ):
        _warn(r_hat=1.5, ess=300.0, chains=2)
    with pytest.warns(UserWarning, match="do not trust the bands"):
        _warn(r_hat=1.0, ess=150.0, chains=2)
    _warn(r_hat=1.01, ess=250.0, chains=2)
