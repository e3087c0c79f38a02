"""The same work by other libraries, those that are installed; none is needed."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def attacks(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> dict[str, Callable[[], object]]:
    """Projected gradient descent in l-inf, steps of a quarter of the radius."""
    found: dict[str, Callable[[], object]] = {}
    with suppress(ImportError):
        import foolbox

        peer = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device)
        descent = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=0.25)
        found["foolbox"] = lambda: descent(peer, x, y, epsilons=eps)
    with suppress(ImportError):
        import torchattacks

        found["torchattacks"] = lambda: torchattacks.PGD(net, eps=eps, alpha=eps / 4, steps=steps)(x, y)
    return found


def steps(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """A step of variational inference over every weight, prior N(0, 1), of 60,000 examples."""
    found: dict[str, Callable[[], object]] = {}
    with suppress(ImportError):
        from bayesian_torch.models.dnn_to_bnn import get_kl_loss

        ours = layered(net)
        found["bayesian-torch"] = _step(
            ours, lambda: nn.functional.cross_entropy(ours(x), y) + get_kl_loss(ours) / 60_000
        )
    with suppress(ImportError):
        from torch_blue import vi

        loss, converted = vi.KullbackLeiblerLoss(vi.distributions.Categorical(), 60_000), sampled(net)
        found["torch_blue"] = _step(converted, lambda: loss(converted(x, samples=1), y))
    return found


def predictions(net: nn.Module, x: Tensor, draws: int) -> dict[str, Callable[[], object]]:
    """Logits of so many draws of all weights."""
    found: dict[str, Callable[[], object]] = {}
    with suppress(ImportError):
        ours = layered(net).eval()
        found["bayesian-torch"] = lambda: [ours(x) for _ in range(draws)]
    with suppress(ImportError):
        converted = sampled(net).eval()
        found["torch_blue"] = lambda: converted(x, samples=draws)
    return found


def layered(net: nn.Module) -> Any:
    """The network with the layers of bayesian-torch."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.0}
    copied = copy.deepcopy(net)
    dnn_to_bnn(copied, settings | {"type": "Reparameterization", "moped_enable": False})
    return copied.to(next(net.parameters()).device)


def sampled(net: nn.Module) -> Any:
    """The network as a module of torch_blue."""
    from torch_blue.vi import convert_to_vimodule

    copied = copy.deepcopy(net)
    convert_to_vimodule(copied)
    return copied.to(next(net.parameters()).device)


def _step(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step
