"""One step of training: gradients of one batch or of several, over one process or many, and the optimizer."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probdefense.nn.passes import explained
from probdefense.objectives import LossModule, Schedule
from probdefense.processes import Processes
from probdefense.rng import derive
from probdefense.training.checks import check_loss
from probdefense.types import Inputs, Labels, Objective
from probdefense.validation import watching


class Plan(NamedTuple):
    """How a step is made.

    Attributes:
        objective: What is minimized.
        kl_schedule: Multiplier of the KL weight by progress, or None.
        max_grad_norm: L2 norm to which gradients are clipped, or None.
        autocast: The type in which the forward pass computes, or None.
        accumulate: Batches per step.
        weight_draws: ``"independent"``, or ``"shared"`` by all processes.
    """

    objective: Objective
    kl_schedule: Schedule | None = None
    max_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    accumulate: int = 1
    weight_draws: str = "independent"


class Descent:
    r"""Adds up gradients and steps: $g = \sum_i B_i g_i / \sum_i B_i$ over the batches of all processes."""

    def __init__(
        self,
        defense: Any,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        processes: Processes,
        seed: int | None = None,
    ):
        self.defense, self.optimizer, self.plan, self.processes = defense, optimizer, plan, processes
        self.seed = seed if plan.weight_draws == "shared" and processes.world > 1 else None
        self.module = processes.wrapped(LossModule(defense, self._objective))
        self.joined = processes.world > 1 or plan.accumulate > 1
        self.count = self.examples = 0

    def add(self, x: Inputs, y: Labels, where: tuple[int, int], progress: float | None) -> Tensor:
        """Adds the gradient of a batch; returns its loss, detached.

        Raises:
            TypeError: the loss is not one number with a gradient.
            FloatingPointError: it is NaN or infinite.
        """
        plan = self.plan
        options = {} if plan.kl_schedule is None else {"kl_weight": plan.kl_schedule(progress or 0.0)}
        if self.count == 0:
            self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        self.examples += len(x)
        with self.processes.unsynced(self.module, not self.complete):
            cast = torch.autocast(x.device.type, plan.autocast, enabled=plan.autocast is not None)
            with explained(x), cast, self._weights(where[1], x.device):
                loss = self.module(x, y, **options)
            check_loss(loss, *where)
            self.processes.backward(loss * len(x) if self.joined else loss)
        return loss.detach()

    def _objective(self, defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        """The objective with its KL weight, which it may require."""
        return self.plan.objective(defense, x, y, **options)

    def _weights(self, batch: int, device: torch.device) -> AbstractContextManager[None]:
        if self.seed is None:
            return nullcontext()
        return self.defense.model.weights_from(derive(self.seed, "weights", batch), device)

    @property
    def complete(self) -> bool:
        """Whether the batches of a step are together."""
        return self.count == self.plan.accumulate

    def step(self) -> Tensor:
        """Moves the parameters; returns the norm of the gradient."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in trained if p.grad is not None]
        if not self.complete:
            self.processes.average_(gradients)  # the epoch ended early, so nothing was synchronized
        if self.joined:
            (total,) = self.processes.summed([self.examples])
            torch._foreach_mul_(gradients, self.processes.world / total)
        limit = torch.inf if self.plan.max_grad_norm is None else self.plan.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(trained, limit, foreach=True)
        if watching.immediate(norm):
            self.optimizer.step()
        else:
            self._step_if_finite(gradients, norm)
        self.count = self.examples = 0
        return norm

    def _step_if_finite(self, gradients: list[Tensor], norm: Tensor) -> None:
        """A step on a device, where the epoch ends before anybody hears of a loss that was not finite.

        Fused optimizers skip it then. Others go on by what they remember, with a gradient of zero.
        """
        bad = ~torch.isfinite(norm)
        if all(group.get("fused") for group in self.optimizer.param_groups):
            skipping: Any = self.optimizer
            skipping.found_inf, skipping.grad_scale = bad.float(), None
            self.optimizer.step()
            del skipping.found_inf, skipping.grad_scale
            return
        for gradient in gradients:
            gradient.masked_fill_(bad, 0.0)
        self.optimizer.step()
