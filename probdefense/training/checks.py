"""What `fit` refuses before any work, and a loss that cannot be minimized."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probdefense.training.batches import check_loader, length, num_examples
from probdefense.training.checkpoints import Checkpoints
from probdefense.training.validation import check_validation
from probdefense.validation import (
    check_count,
    check_function,
    check_kind,
    check_member,
    check_positive,
    watching,
)


def check_data(defense: Any, loader: Any, epochs: Any) -> tuple[int | None, int | None]:
    """Refuses a wrong `num_data` and an empty loader; returns examples and batches per epoch, if known."""
    check_count("epochs", epochs)
    if not all(hasattr(defense, name) for name in ("step", "register_step_hook", "param_groups")):
        raise TypeError(
            f"expected a Defense, got {type(defense).__name__}; wrap a network with "
            "probdefense.deterministic(net)"
        )
    check_loader(loader, epochs)
    size = num_examples(loader)
    check_size(defense, size)
    return size, length(loader)


def check_size(defense: Any, size: int | None, seen: int = 0) -> None:
    """Refuses a wrong `num_data`; a user's own model says it with its first step, in the plate."""
    known = defense.num_data
    size = seen if size is None and known is not None and seen > known else size
    if known is not None and size is not None and known != size:
        raise ValueError(
            f"the defense was built with num_data={known} but the loader's data set has {size} examples, "
            f"so the KL term would have the wrong weight; build it with num_data={size}, or in a model of "
            f"your own write pyro.plate(..., size={size}, subsample=x)"
        )


def check_steps(defense: Any, plan: Any, checkpoints: Any) -> None:
    """Refuses how no step can be made or kept."""
    if checkpoints is not None:
        check_kind("checkpoints", checkpoints, Checkpoints, "pass training.Checkpoints(folder)")
    check_count("accumulate", plan.accumulate)
    if plan.max_grad_norm is not None:
        check_positive("max_grad_norm", plan.max_grad_norm)
    check_member("weight_draws", plan.weight_draws, ("independent", "shared"))
    if plan.weight_draws == "shared" and not hasattr(defense.model, "weights_from"):
        raise ValueError(
            "expected weight_draws='independent' for a defense of your own model and guide, whose values "
            "come "
            "from Pyro, got 'shared'; build the defense with probdefense.defenses"
        )
    if plan.autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"expected autocast=torch.bfloat16 or None, got {plan.autocast}; float16 would need its losses "
            "scaled, and gradients of the ELBO do not bear it"
        )


def check_functions(objective: Any, kl_schedule: Any, validation: Any, callbacks: Any) -> None:
    """Refuses, before any work, what `fit` could not call."""
    options = {} if kl_schedule is None else {"kl_weight": 1.0}
    check_function("objective", objective, "defense", "x", "y", **options)
    if kl_schedule is not None:
        check_function("kl_schedule", kl_schedule, "progress")
    check_validation(validation)
    if not isinstance(callbacks, Sequence):
        raise TypeError(
            f"expected callbacks as a list of functions, got {type(callbacks).__name__}; pass [callback]"
        )
    for callback in callbacks:
        check_function("each callback", callback, "epoch", "history")


def check_optimizer(defense: Any, optimizer: Any) -> torch.optim.Optimizer:
    """Refuses to train nothing: no parameters, or an optimizer that holds those of another module."""
    parameters = {id(p) for p in defense.parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "expected a parameter that requires a gradient, found none, so there is nothing to fit; unfreeze "
            "some"
        )
    if optimizer is None:
        return torch.optim.Adam(defense.param_groups(), lr=1e-3, fused=True)
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"expected optimizer as a torch.optim.Optimizer that steps without a closure, got "
            f"{type(optimizer).__name__}; make one such as torch.optim.Adam(defense.param_groups())"
        )
    if not any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "expected an optimizer of the defense, got another: the optimizer holds none of the defense's "
            "parameters, so nothing would be trained; builders copy the network: make the optimizer from "
            "defense.param_groups()"
        )
    return optimizer


def check_loss(loss: Any, epoch: int, step: int) -> None:
    """Refuses what cannot be minimized.

    Raises:
        TypeError: not one number with a gradient.
        FloatingPointError: NaN or infinite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"expected objective(defense, x, y) to return one number that has a gradient, got {came}; build "
            "it from defense.step(x, y), and average over the batch"
        )
    value = loss.detach()
    watching.require(
        torch.isfinite(value),
        lambda: FloatingPointError(
            f"expected a finite loss, found that the loss became {float(value)} in epoch {epoch}, "
            f"step {step}; lower the learning "
            "rate, or look for scales that grew without a KL term or a prior"
        ),
    )
