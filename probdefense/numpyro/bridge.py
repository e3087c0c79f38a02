r"""A NumPyro or JAX posterior as a `LogitsFn`: every attack and every verdict of this library runs on it.

The network stays in JAX. Inputs and answers cross by DLPack, and the input
gradient is JAX's own vector-Jacobian product, so it is exact:

$$ \nabla_x \sum_s \langle g_s, f(\theta_s, x) \rangle = \sum_s J_s(x)^\top g_s $$
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from probdefense.logits.adapters import Samples
from probdefense.types import Inputs, Logits
from probdefense.validation import check_count, check_function, check_kind

Apply = Callable[[Any, Any], Any]


def bridge(apply_fn: Apply, draws: Mapping[str, Any]) -> "Bridge":
    r"""A posterior given by draws, as from ``mcmc.get_samples()``, seen as a random classifier.

    Calling it picks draws uniformly with replacement; ``freeze`` picks a subset without (with, if more
    are asked for than there are). Both follow torch's random state. Compiled once per shape.

    Args:
        apply_fn: ``apply_fn(params, x) -> logits``, a pure JAX function of one draw and inputs
            ``(batch, *event)``, giving ``(batch, classes)``.
        draws: Arrays with a leading axis of draws; nested dicts are allowed. Numbers become float32.

    Returns:
        A `Bridge`.

    Raises:
        ValueError: no arrays, or leading axes that differ.

    References:
        Phan et al., 2019, [Composable Effects for Flexible and Accelerated Probabilistic Programming in
        NumPyro](https://arxiv.org/abs/1912.11554)

    Examples:
        >>> import numpy as np
        >>> posterior = bridge(lambda params, x: x @ params["w"], {"w": np.ones((5, 4, 3))})
        >>> posterior(torch.rand(2, 4), num_samples=7).shape
        torch.Size([7, 2, 3])
    """
    check_function("apply_fn", apply_fn, "params", "x")
    check_kind("draws", draws, Mapping, "take mcmc.get_samples()")
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(dict(draws))}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"expected arrays that share a leading axis of draws, got leading axes {sorted(sizes)}; "
            "take mcmc.get_samples() without group_by_chain"
        )
    return Bridge(_Compiled(apply_fn, jax.tree.map(_as_float32, dict(draws))))


class Bridge:
    """Draws of a JAX network as a `LogitsFn`, made by `bridge`.

    Examples:
        >>> import numpy as np
        >>> posterior = bridge(lambda params, x: x @ params["w"], {"w": np.ones((5, 4, 3))})
        >>> posterior.num_draws, posterior.stochastic, posterior.freeze(2).stochastic
        (5, True, False)
    """

    shares_draws = True

    def __init__(self, network: "_Compiled", members: Tensor | None = None):
        self.network, self.members = network, members

    @property
    def stochastic(self) -> bool:
        """Whether draws are picked anew for every call."""
        return self.members is None

    @property
    def num_draws(self) -> int:
        """How many draws there are to pick from."""
        return self.network.num_draws

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """Logits ``(num_samples, batch, classes)``, differentiable in `x`."""
        members = self.members
        if members is None:
            check_count("num_samples", num_samples or 1)
            members = torch.randint(self.num_draws, (num_samples or 1,))
        return _Apply.apply(x, members, self.network)

    def freeze(self, num_samples: int = 1) -> "Bridge":
        """The functions of some draws, the same for every call."""
        check_count("num_samples", num_samples)
        if not self.stochastic:
            return self
        if num_samples > self.num_draws:
            return Bridge(self.network, torch.randint(self.num_draws, (num_samples,)))
        return Bridge(self.network, torch.randperm(self.num_draws)[:num_samples])

    def samples(self, num_samples: int) -> Samples:
        """The same posterior with a fixed number of draws per call."""
        return Samples(self, num_samples)

    def mean(self) -> "Bridge":
        """The static base: the network at the mean of the draws."""
        center = jax.tree.map(lambda leaf: leaf.mean(0, keepdims=True), self.network.draws)
        return Bridge(_Compiled(self.network.apply_fn, center), torch.zeros(1, dtype=torch.int64))


class _Compiled:
    """The network over chosen draws, and its vector-Jacobian product, compiled once per shape."""

    def __init__(self, apply_fn: Apply, draws: Any):
        self.apply_fn, self.draws = apply_fn, draws
        self.num_draws = len(jax.tree.leaves(draws)[0])
        self.forward = jax.jit(self._logits)
        self.forward_and_pullback = jax.jit(self._with_pullback)
        self.pull_back = jax.jit(lambda pullback, cotangent: pullback(cotangent)[0])

    def _logits(self, draws: Any, members: Any, x: Any) -> Any:
        chosen = jax.tree.map(lambda leaf: leaf[members], draws)
        logits = jax.vmap(self.apply_fn, (0, None))(chosen, x)
        if logits.ndim != 3 or logits.shape[1] != len(x):
            raise ValueError(
                f"expected apply_fn(params, x) to give logits ({len(x)}, classes), got {logits.shape[1:]}"
            )
        return logits

    def _with_pullback(self, draws: Any, members: Any, x: Any) -> Any:
        return jax.vjp(lambda point: self._logits(draws, members, point), x)


class _Apply(torch.autograd.Function):
    """One call of the network: JAX forward, JAX backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, members: Tensor, network: _Compiled) -> Tensor:
        chosen, point = _to_jax(members.int()), _to_jax(x.float())
        if ctx.needs_input_grad[0]:
            logits, pullback = network.forward_and_pullback(network.draws, chosen, point)
            ctx.pull_back = lambda cotangent: network.pull_back(pullback, cotangent)
        else:
            logits = network.forward(network.draws, chosen, point)
        return _to_torch(logits, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return _to_torch(ctx.pull_back(_to_jax(cotangent.float())), cotangent), None, None


def _to_jax(value: Tensor) -> Any:
    # Copied, because JAX counts on arrays that never change and torch may write into its own.
    return jnp.from_dlpack(value.detach().cpu().contiguous().clone())


def _to_torch(value: Any, like: Tensor) -> Tensor:
    return torch.from_dlpack(value).to(like, copy=True)


def _as_float32(leaf: Any) -> Any:
    array = jnp.asarray(leaf)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
