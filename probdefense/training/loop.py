"""`fit`: one loop for every defense and objective."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probdefense.objectives import Schedule, elbo
from probdefense.progress import progress_bar
from probdefense.types import Labels, Objective, Step
from probdefense.validation import check_count, check_inputs, check_positive

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class History:
    """What training saw, one number per epoch, averaged over its examples.

    Attributes:
        loss: The objective, nats per example.
        log_lik: Log-likelihood, nats per example, on what was trained (attacked inputs included).
        kl: KL over all sites, nats per data set.
        accuracy: Share of training forwards with the right class.
    """

    loss: list[float] = field(default_factory=list)
    log_lik: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def fit(
    defense: Any,
    loader: Batches,
    *,
    epochs: int,
    objective: Objective = elbo,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Any = None,
    kl_schedule: Schedule | None = None,
    callbacks: Sequence[Callable[[int, History], None]] = (),
    max_grad_norm: float | None = 10.0,
    progress: bool = True,
) -> History:
    """Trains a defense in place and returns what happened.

    Args:
        defense: A `Defense`.
        loader: Batches ``(x, y)``, iterated once per epoch; moved to the defense's device.
        epochs: Passes over the loader.
        objective: What is minimized.
        optimizer: Adam at 1e-3 over ``defense.param_groups()`` by default.
        schedule: A torch learning-rate scheduler, stepped once per epoch.
        kl_schedule: Multiplier of the KL weight as a function of progress in [0, 1], passed to the
            objective as ``kl_weight``.
        callbacks: ``callback(epoch, history)`` after every epoch.
        max_grad_norm: Gradients are clipped to this total L2 norm; None switches it off.
        progress: Whether to show a bar with the time left.

    Returns:
        A `History`.

    Raises:
        ValueError: nothing to train, `num_data` other than the data set's size, or bad data.
        FloatingPointError: the loss became NaN or infinite; the message says where.

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.deterministic(torch.nn.Linear(4, 3))
        >>> batches = [(torch.rand(8, 4), torch.zeros(8).long())]
        >>> len(fit(defense, batches, epochs=2, progress=False).loss)
        2
    """
    check_count("epochs", epochs)
    if max_grad_norm is not None:
        check_positive("max_grad_norm", max_grad_norm)
    num_batches = _check_data(defense, loader)
    optimizer = _check_optimizer(defense, optimizer)
    total, done, history = epochs * num_batches, 0, History()
    modes = {module: module.training for module in defense.modules()}
    defense.train()
    try:
        with progress_bar("fit", total or None, progress) as advance:
            for epoch in range(epochs):
                with _Meter(defense, history) as meter:
                    for x, y in _on_device(loader, defense):
                        options = (
                            {} if kl_schedule is None else {"kl_weight": kl_schedule(done / max(total, 1))}
                        )
                        loss = objective(defense, x, y, **options)
                        _check_size(defense, loader, meter.examples + len(x))
                        _stop_if_not_finite(loss, epoch, done)
                        _descend(loss, optimizer, max_grad_norm)
                        meter.add(loss, len(x))
                        done += 1
                        advance()
                if schedule is not None:
                    schedule.step()
                for callback in callbacks:
                    callback(epoch, history)
    finally:
        for module, training in modes.items():
            module.training = training
    return history


class _Meter:
    """Averages what the training forwards of one epoch saw, and files it when the epoch ends."""

    def __init__(self, defense: Any, history: History):
        self.defense, self.history = defense, history
        self.sums = dict.fromkeys(("loss", "log_lik", "kl", "accuracy"), 0.0)
        self.examples, self.forwards = 0, 0

    def __enter__(self) -> "_Meter":
        self.handle = self.defense.register_step_hook(self._see)
        return self

    def _see(self, step: Step, y: Labels) -> None:
        size = len(step.log_lik)
        self.forwards += size
        self.sums["log_lik"] += float(step.log_lik.detach().sum())
        self.sums["kl"] += size * float(sum(value.detach() for value in step.kl.values()))
        self.sums["accuracy"] += float((step.logits.argmax(-1) == y).sum())

    def add(self, loss: Tensor, size: int) -> None:
        self.examples += size
        self.sums["loss"] += size * float(loss.detach())

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.handle.remove()
        if kind is None:
            self.history.loss.append(self.sums.pop("loss") / max(self.examples, 1))
            for name, value in self.sums.items():
                getattr(self.history, name).append(value / max(self.forwards, 1))


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if max_grad_norm is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm, foreach=True)
    optimizer.step()


def _on_device(loader: Batches, defense: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(defense.parameters()).device
    for x, y in loader:
        check_inputs(x)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _check_data(defense: nn.Module, loader: Batches) -> int:
    """Refuses a wrong `num_data` and an empty loader; returns the batches per epoch (0 if unknown)."""
    if _size(loader) == 0:
        raise ValueError("the loader has no examples; expected batches (x, y)")
    _check_size(defense, loader)
    return len(loader) if isinstance(loader, Sized) else 0


def _size(loader: Batches) -> int | None:
    dataset = getattr(loader, "dataset", None)
    size = len(dataset) if isinstance(dataset, Sized) else None
    return sum(len(y) for _, y in loader) if size is None and isinstance(loader, Sequence) else size


def _check_size(defense: Any, loader: Batches, seen: int = 0) -> None:
    """Refuses a wrong `num_data`; a user's own model says it with its first step, in the plate."""
    known, size = getattr(defense, "num_data", None), _size(loader)
    size = seen if size is None and known is not None and seen > known else size
    if known is not None and size is not None and known != size:
        raise ValueError(
            f"the defense was built with num_data={known} but the loader's data set has {size} examples, "
            f"so the KL term would have the wrong weight; build it with num_data={size}, or in a model of "
            f"your own write pyro.plate(..., size={size}, subsample=x)"
        )


def _check_optimizer(defense: Any, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """Refuses to train nothing: no parameters, or an optimizer that holds those of another module."""
    parameters = {id(p) for p in defense.parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the defense has no parameter that requires a gradient, so there is nothing to fit")
    if optimizer is None:
        return torch.optim.Adam(defense.param_groups(), lr=1e-3, fused=True)
    if not any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer holds none of the defense's parameters, so nothing would be trained; builders "
            "copy the network: make the optimizer from defense.param_groups()"
        )
    return optimizer


def _stop_if_not_finite(loss: Tensor, epoch: int, step: int) -> None:
    if not bool(torch.isfinite(loss.detach())):
        raise FloatingPointError(
            f"the loss became {float(loss.detach())} in epoch {epoch}, step {step}; lower the learning "
            "rate, or look for scales that grew without a KL term or a prior"
        )
