r"""A NumPyro or JAX posterior as a `LogitsFn`: every attack and every verdict of this library runs on it.

The network stays in JAX. Inputs and answers cross by DLPack, and the input
gradient is JAX's own vector-Jacobian product, so it is exact:

$$ \nabla_x \sum_s \langle g_s, f(\theta_s, x) \rangle = \sum_s J_s(x)^\top g_s $$
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from probdefense.logits.adapters import Samples
from probdefense.types import Inputs, Logits
from probdefense.validation import check_count, check_function

Apply = Callable[[Any, Any], Any]


def bridge(apply_fn: Apply, draws: Any, *, group_by_chain: bool | None = None) -> "Bridge":
    r"""A posterior given by draws, as from ``mcmc.get_samples()``, seen as a random classifier.

    Calling it picks draws uniformly with replacement; ``freeze`` picks a subset without (with, if more
    are asked for than there are). Both follow torch's random state. Compiled once per shape. ``to_arviz``
    takes it with data, and sees its chains.

    Args:
        apply_fn: ``apply_fn(params, x) -> logits``, a pure JAX function of one draw and inputs
            ``(batch, *event)``, giving ``(batch, classes)``.
        draws: Arrays with a leading axis of draws, or with two of chains and draws, in any pytree: dicts
            (a tree of flax parameters, too), lists, tuples, NamedTuples such as a position of blackjax, or
            one array. What one draw of it looks like is what `apply_fn` gets. Numbers become float32.
        group_by_chain: Whether the leading axes are ``(chains, draws)``, as in
            ``mcmc.get_samples(group_by_chain=True)``; None to see with the first inputs which of both
            `apply_fn` can take.

    Returns:
        A `Bridge`.

    Raises:
        TypeError: draws that hold something else than arrays of numbers.
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
    arrays = jax.tree.map(_as_float32, _plain(draws))
    leading = 2 if group_by_chain else 1
    sizes = {jnp.shape(leaf)[:leading] for leaf in jax.tree.leaves(arrays)}
    if len(sizes) != 1 or len(next(iter(sizes))) < leading:
        raise ValueError(
            f"expected arrays that share a leading axis of draws, got leading axes {sorted(sizes)}; "
            "take mcmc.get_samples(), with group_by_chain=True here if it was so there"
        )
    both = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(arrays)}
    open_ = group_by_chain is None and len(both) == 1 and len(next(iter(both))) == 2
    network = _Compiled(apply_fn, arrays, open_)
    if group_by_chain:
        network.join_chains()
    return Bridge(network)


class Bridge:
    """Draws of a JAX network as a `LogitsFn`, made by `bridge`.

    Examples:
        >>> import numpy as np
        >>> posterior = bridge(lambda params, x: x @ params["w"], {"w": np.ones((5, 4, 3))})
        >>> posterior.num_draws, posterior.stochastic, posterior.freeze(2).stochastic
        (5, True, False)
    """

    shares_draws = True

    def __init__(self, network: "_Compiled", members: Tensor | None = None, asked: int = 0):
        self.network, self._members, self._asked = network, members, asked

    @property
    def members(self) -> Tensor | None:
        """Which draws are asked, in order; None where they are picked anew."""
        if self._members is None and self._asked and not self.network.open:
            self._members = self._picked(self._asked)
        return self._members

    @property
    def stochastic(self) -> bool:
        """Whether draws are picked anew for every call."""
        return self._members is None and not self._asked

    @property
    def num_chains(self) -> int:
        """To how many chains the draws belong, one after the other."""
        return self.network.num_chains

    @property
    def num_draws(self) -> int:
        """How many draws there are to pick from."""
        return self.network.num_draws

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """Logits ``(num_samples, batch, classes)``, differentiable in `x`."""
        self.network.settle(x)
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
        if self.network.open:  # which are there to pick from shows with the first inputs
            return Bridge(self.network, asked=num_samples)
        return Bridge(self.network, self._picked(num_samples))

    def _picked(self, num_samples: int) -> Tensor:
        if num_samples > self.num_draws:
            return torch.randint(self.num_draws, (num_samples,))
        return torch.randperm(self.num_draws)[:num_samples]

    def samples(self, num_samples: int) -> Samples:
        """The same posterior with a fixed number of draws per call."""
        return Samples(self, num_samples)

    def mean(self) -> "Bridge":
        """The static base: the network at the mean of the draws.

        Raises:
            ValueError: it is not known yet whether the draws are grouped by chain.
        """
        if self.network.open:
            raise ValueError(
                "expected draws whose axes are known, got some that may be grouped by chain; pass "
                "group_by_chain= to bridge, or call it once with inputs"
            )
        center = jax.tree.map(lambda leaf: leaf.mean(0, keepdims=True), self.network.draws)
        return Bridge(_Compiled(self.network.apply_fn, center), torch.zeros(1, dtype=torch.int64))


class _Compiled:
    """The network over chosen draws, and its vector-Jacobian product, compiled once per shape."""

    def __init__(self, apply_fn: Apply, draws: Any, open: bool = False):
        self.apply_fn, self.draws, self.open, self.num_chains = apply_fn, draws, open, 1
        self.forward = jax.jit(self._logits)
        self.forward_and_pullback = jax.jit(self._with_pullback)
        self.pull_back = jax.jit(lambda pullback, cotangent: pullback(cotangent)[0])

    @property
    def num_draws(self) -> int:
        return len(jax.tree.leaves(self.draws)[0])

    def join_chains(self) -> None:
        """Takes the two leading axes as chains and draws."""
        self.num_chains, self.open = len(jax.tree.leaves(self.draws)[0]), False
        self.draws = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.draws)

    def settle(self, x: Inputs) -> None:
        """Sees with inputs whether the draws are grouped by chain, if that is open."""
        if not self.open:
            return
        point = jax.ShapeDtypeStruct(tuple(x.shape), jnp.float32)

        def fits(axes: int) -> bool:
            def one(leaf: Any) -> Any:
                return jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype)

            with suppress(Exception):  # whatever the network says to parameters of another shape
                answer = jax.eval_shape(self.apply_fn, jax.tree.map(one, self.draws), point)
                return len(answer.shape) == 2 and answer.shape[0] == len(x)
            return False

        if not fits(1) and fits(2):
            self.join_chains()
        self.open = False

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


def _plain(draws: Any) -> Any:
    """Mappings that JAX does not know as dicts, all the way down."""
    if isinstance(draws, Mapping) and (type(draws) is dict or jax.tree.leaves(draws)[:1] == [draws]):
        return {name: _plain(value) for name, value in draws.items()}
    return draws


def _as_float32(leaf: Any) -> Any:
    array = np.asarray(leaf) if isinstance(leaf, Tensor) else leaf
    if not hasattr(array, "dtype") or array.dtype.kind not in "fiubV":  # bfloat16 is of kind V
        raise TypeError(
            f"expected draws as Mapping, or another pytree, of arrays, got {type(leaf).__name__} in it; take "
            "mcmc.get_samples()"
        )
    array = jnp.asarray(array)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
