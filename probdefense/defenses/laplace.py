r"""Laplace approximations by ``laplace-torch``: a normal posterior at trained weights, from curvature.

Daxberger et al., 2021, [Laplace Redux](https://arxiv.org/abs/2106.14806). At the mode of the posterior the
negative log joint is nearly a quadratic, whose curvature is that library's generalized Gauss-Newton matrix:

$$ q(\theta) = N\big(\theta^*,\; (H + \sigma_0^{-2} I)^{-1}\big) $$

The library computes it; here it becomes random weights like any other. Its own predictive linearizes the
network in the weights; here the draws go through the network itself, as an attack needs it, where a wide
posterior over all weights may do worse. The paper leaves the prior scale open and tunes it by the marginal
likelihood; here it is given.
"""

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from probdefense.core.defense import Defense
from probdefense.defenses.from_samples import from_samples
from probdefense.defenses.gaussian import gaussian
from probdefense.types import Inputs, Labels
from probdefense.validation import check_count, check_kind, check_member, check_positive

TINY = 1e-12
"""The scale beside a factor that holds the whole covariance."""

KINDS = {"last_layer": ("last_layer", "full"), "diagonal": ("all", "diag"), "kron": ("all", "kron")}
"""By structure, the weights and the curvature in that library's words."""


def laplace(
    net: nn.Module,
    loader: Iterable[tuple[Inputs, Labels]],
    *,
    structure: Literal["last_layer", "diagonal", "kron"] = "last_layer",
    prior_scale: float = 1.0,
    num_samples: int = 64,
    num_data: int | None = None,
) -> Defense:
    r"""Makes the weights of a trained network random, $q = N(\theta^*, (H + \sigma_0^{-2} I)^{-1})$.

    Needs the package ``laplace-torch``: ``pip install probdefense[laplace]``.

    Args:
        net: A trained network ``x -> logits``; it is copied, and is seen in evaluation mode.
        loader: A `DataLoader` of the training data, one pass.
        structure: ``"last_layer"``, all of the covariance of the last linear layer; ``"diagonal"``, all
            weights, independent; ``"kron"``, all weights with Kronecker factors by layer, which become
            `num_samples` draws (`from_samples`), as a flat site could not hold them.
        prior_scale: $\sigma_0$, in units of the weights.
        num_samples: Draws that are kept with ``"kron"``.
        num_data: Size of the training set; not needed, as there is no KL.

    Returns:
        A `Defense` with one site, ``"weights"``.

    Raises:
        ImportError: ``laplace-torch`` is not installed.
        TypeError: not a plain network.
        ValueError: an unknown structure, or layers whose curvature that library does not know.

    References:
        Daxberger et al., 2021, [Laplace Redux: Effortless Bayesian Deep
        Learning](https://arxiv.org/abs/2106.14806)

    Examples:
        >>> laplace(torch.nn.Linear(2, 2), [], structure="round")
        Traceback (most recent call last):
        ValueError: unknown structure 'round'; known: diagonal, kron, last_layer
    """
    check_member("structure", structure, KINDS)
    check_positive("prior_scale", prior_scale)
    check_count("num_samples", num_samples)
    check_kind("net", net, nn.Module, "give the trained network")
    if isinstance(net, Defense):
        raise TypeError(
            "expected a plain network, got Defense; approximate first, and add noise to what comes"
        )
    trained = copy.deepcopy(net).eval()
    found = _fitted(trained, loader, structure, prior_scale)
    if structure == "kron":
        samples = [_state(trained, row) for row in found.sample(num_samples)]
        return from_samples(net, samples, num_data=num_data)
    names = _names(trained, found, structure)
    rank = len(found.mean) if structure == "last_layer" else 0
    made = gaussian(net, names=names, rank=rank, num_data=num_data)
    guide: Any = made.guide
    posterior = list(guide.posteriors.values())[-1]
    with torch.no_grad():
        if rank:
            scale = torch.full_like(found.mean, TINY)
            posterior.take(found.mean, scale, found.posterior_scale)
        else:
            posterior.loc.copy_(found.mean)
            posterior.log_scale.copy_(found.posterior_scale.log())
    return made


def _fitted(net: nn.Module, loader: Any, structure: str, prior_scale: float) -> Any:
    """That library's posterior."""
    try:
        from laplace import Laplace
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "laplace needs the package laplace-torch, which does not import here; install it with "
            "pip install probdefense[laplace]"
        ) from error
    weights, curvature = KINDS[structure]
    found = Laplace(
        net,
        "classification",
        subset_of_weights=weights,
        hessian_structure=curvature,
        prior_precision=prior_scale**-2,
    )
    try:
        found.fit(loader)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"laplace-torch cannot take the curvature of {type(net).__name__} ({error}); try another "
            "structure"
        ) from error
    return found


def _names(net: nn.Module, found: Any, structure: str) -> list[str]:
    """The parameters of the posterior, in its order, which is that of the network."""
    if structure == "last_layer":
        layer = found.model._last_layer_name
        return [f"{layer}.{name}".lstrip(".") for name, _ in net.get_submodule(layer).named_parameters()]
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad]


def _state(net: nn.Module, row: Tensor) -> dict[str, Tensor]:
    """One draw as a state of the trained parameters."""
    named = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    vector_to_parameters(row.detach(), list(named.values()))
    return {name: value.clone() for name, value in named.items()}
