"""How robust is a posterior that NumPyro sampled?

The network, its prior and NUTS are plain NumPyro; `probdefense.numpyro.bridge` makes the draws a
function that attacks can climb, with JAX's own gradients.

    python examples/numpyro_posterior.py --quick
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_value

import probdefense as pd

SHAPES = {"w1": (16, 8), "w2": (8, 10), "b2": (10,)}


def apply_fn(params: Any, x: Any) -> Any:
    """Logits of 8x8 digits: means of 2x2 pixels, one hidden layer."""
    pooled = x.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    return jnp.tanh(4 * (pooled - 0.3) @ params["w1"]) @ params["w2"] + params["b2"]


def model(x: Any, y: Any) -> None:
    """Standard normal weights, categorical labels."""
    params = {
        name: numpyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
        for name, shape in SHAPES.items()
    }
    numpyro.sample("y", dist.Categorical(logits=apply_fn(params, x)), obs=y)


def main(quick: bool = False) -> pd.Report:
    """Samples the posterior, attacks it, and prints accuracies."""
    train, test = pd.data.digits()
    images, draws = (200, 40) if quick else (1437, 300)
    x, y = (part[:images].numpy() for part in train.tensors)
    start = init_to_value(values={name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    kernel = NUTS(model, init_strategy=start, max_tree_depth=5 if quick else 8)

    @jax.jit  # one program to compile instead of some hundred small ones
    def sampled(key: Any, x: Any, y: Any) -> Any:
        sampler = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
        sampler.run(key, x, y)
        return sampler.get_samples()

    posterior = pd.numpyro.bridge(apply_fn, sampled(jax.random.PRNGKey(0), x, y))

    pgd = partial(pd.attacks.pgd, num_steps=4 if quick else 40)
    attacks = {"pgd, 1 draw": pd.with_draws(pgd, 1), "pgd, 16 draws": pd.with_draws(pgd, 16)}
    x_test, y_test = (part[: 50 if quick else 360] for part in test.tensors)
    reports = [
        pd.evaluate(function, (x_test, y_test), attacks, eps=0.05, name=name, rules=(pd.rules.mean_prob,))
        for name, function in (("posterior", posterior), ("its mean weights", posterior.mean()))
    ]
    report = reports[0] + reports[1]
    print(report.table(("defense", "attack", "eps", "accuracy", "low", "high")))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, draws and steps")
    main(parser.parse_args().quick)
