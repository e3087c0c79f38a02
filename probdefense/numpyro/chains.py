"""NUTS chains of a NumPyro model, compiled once for all of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from numpyro.infer import MCMC, NUTS, init_to_value


def run_chains(
    model: Callable[..., None],
    args: tuple[Any, ...],
    start: Mapping[str, Any],
    *,
    num_warmup: int,
    num_samples: int,
    num_chains: int,
    seed: int,
    dense_mass: bool = False,
) -> dict[str, Any]:
    """Draws by site, ``(chains, draws, ...)``.

    Everything from the first step to the last is one compiled program: step by step, NumPyro's own
    `MCMC` compiles some hundred small ones, and the large one anew for every chain.

    Args:
        model: ``model(*args)``.
        args: Arrays, or tuples of them.
        start: Where every chain starts, by site.
        num_warmup: Steps of adaptation per chain.
        num_samples: Draws kept per chain.
        num_chains: Chains, one after the other.
        seed: Of the chains.
        dense_mass: Whether adaptation learns how the sites vary together.
    """
    kernel = NUTS(model, init_strategy=init_to_value(values=dict(start)), dense_mass=dense_mass)

    def chain(args: tuple[Any, ...], key: Any) -> Any:
        sampler = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
        sampler.run(key, *args)
        return sampler.get_samples()

    keys = jax.random.split(jax.random.PRNGKey(seed), num_chains)
    return jax.jit(lambda args, keys: jax.lax.map(partial(chain, args), keys))(args, keys)
