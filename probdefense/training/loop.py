"""`fit`: one loop for every defense and objective."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probdefense.nn.passes import explained
from probdefense.objectives import Schedule, elbo
from probdefense.progress import progress_bar
from probdefense.training.averages import Average, Mean, check_average
from probdefense.training.batches import Batches, batches, check_loader, length, num_examples, seeded
from probdefense.training.schedules import Pace
from probdefense.types import Labels, Objective, Step
from probdefense.validation import check_count, check_function, check_positive, check_seed


@dataclass
class History:
    """What training saw, one number per epoch, averaged over its examples.

    Attributes:
        loss: The objective, nats per example.
        log_lik: Log-likelihood, nats per example, on what was trained (attacked inputs included).
        kl: KL over all sites, nats per data set.
        accuracy: Share of training forwards with the right class.
        validation: What `validation` returned; empty without it.
    """

    loss: list[float] = field(default_factory=list)
    log_lik: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


def fit(
    defense: Any,
    loader: Batches,
    *,
    epochs: int,
    objective: Objective = elbo,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Any = None,
    kl_schedule: Schedule | None = None,
    validation: Callable[[Any], float] | None = None,
    average: Average | None = None,
    callbacks: Sequence[Callable[[int, History], None]] = (),
    max_grad_norm: float | None = 10.0,
    seed: int | None = None,
    progress: bool = True,
) -> History:
    """Trains a defense in place and returns what happened.

    Every epoch starts in training mode, whatever validation or a callback left; at the end each module
    has the mode it was found in. An epoch ends with validation, schedule and callbacks, in this order.

    Args:
        defense: A `Defense`.
        loader: Batches ``(x, y)``, iterated once per epoch; moved to the defense's device. A
            `DataLoader`, a list of batches, or any iterable that starts anew; it may have no length.
        epochs: Passes over the loader.
        objective: What is minimized.
        optimizer: Adam at 1e-3 over ``defense.param_groups()`` by default.
        schedule: A torch learning-rate scheduler of this `optimizer`. `OneCycleLR`, `CyclicLR` and what
            is marked by `PerStep` move after every step, all others after every epoch;
            `ReduceLROnPlateau` sees the number of `validation`, or without it the loss of the epoch.
        kl_schedule: Multiplier of the KL weight as a function of progress in [0, 1], passed to the
            objective as ``kl_weight``.
        validation: ``validation(defense) -> number`` after every epoch, in evaluation mode.
        average: ``training.ema(decay)`` or ``training.swa(start)``: the average of the weights, which
            validation and callbacks see and which is left at the end; the steps go on from the last.
        callbacks: ``callback(epoch, history)`` after every epoch, counted from 0.
        max_grad_norm: Gradients are clipped to this total L2 norm; None switches it off.
        seed: Of all that torch draws meanwhile: the model, the attack, the order of the loader. Nothing
            outside moves. By default torch's global state is used.
        progress: Whether to show a bar with the time left.

    Returns:
        A `History`.

    Raises:
        TypeError: something else than a `Defense`, a loader of pairs of tensors, or functions.
        ValueError: nothing to train, `num_data` other than the data set's size, an epoch without a
            batch, a schedule that needs a length the loader does not have, an average without an epoch,
            or bad data.
        FloatingPointError: the loss became NaN or infinite; the message says where.

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.deterministic(torch.nn.Linear(4, 3))
        >>> batches = [(torch.rand(8, 4), torch.zeros(8).long())]
        >>> len(fit(defense, batches, epochs=2, progress=False).loss)
        2
    """
    size, total = _check_data(defense, loader, epochs)
    _check_functions(objective, kl_schedule, validation, callbacks)
    check_average(average, epochs)
    if max_grad_norm is not None:
        check_positive("max_grad_norm", max_grad_norm)
    seed = None if seed is None else check_seed(seed)
    pace = Pace(schedule)
    pace.check(optimizer, total, validation is not None)
    if kl_schedule is not None and total is None:
        raise ValueError(
            "kl_schedule is a function of progress, which needs the number of batches, and this loader has "
            "no length; give its data set a __len__, or fix the weight by partial(elbo, kl_weight=...)"
        )
    optimizer = _check_optimizer(defense, optimizer)
    device, done, history = next(defense.parameters()).device, 0, History()
    mean = Mean(average, defense)
    with seeded(seed, loader, device), _modes_kept(defense), progress_bar("fit", total, progress) as advance:
        for epoch in range(epochs):
            defense.train()
            with _Meter(defense, history) as meter:
                for x, y in batches(loader, device):
                    options = {} if kl_schedule is None else {"kl_weight": kl_schedule(done / (total or 1))}
                    with explained(x):
                        loss = objective(defense, x, y, **options)
                    _check_size(defense, size, meter.examples + len(x))
                    _check_loss(loss, epoch, done)
                    _descend(loss, optimizer, max_grad_norm)
                    pace.after_step()
                    mean.after_step()
                    meter.add(loss, len(x))
                    done += 1
                    advance()
            mean.after_epoch(epoch)
            with mean.shown():
                _end_epoch(defense, history, validation, pace)
                for callback in callbacks:
                    callback(epoch, history)
        mean.keep()
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
            self.history.loss.append(self.sums.pop("loss") / self.examples)
            for name, value in self.sums.items():
                getattr(self.history, name).append(value / max(self.forwards, 1))


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if max_grad_norm is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm, foreach=True)
    optimizer.step()


def _end_epoch(
    defense: nn.Module, history: History, validation: Callable[[Any], float] | None, pace: Pace
) -> None:
    """Validates, and moves a schedule that counts epochs."""
    watched = history.loss[-1]
    if validation is not None:
        found = validation(defense.eval())
        try:
            watched = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"expected validation(defense) to return one number, got {type(found).__name__}; return what "
                "is to be watched"
            ) from error
        history.validation.append(watched)
    pace.after_epoch(watched)


@contextmanager
def _modes_kept(defense: nn.Module) -> Iterator[None]:
    """After the block every module has the mode it had before."""
    modes = {module: module.training for module in defense.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_data(defense: Any, loader: Any, epochs: Any) -> tuple[int | None, int | None]:
    """Refuses a wrong `num_data` and an empty loader; returns examples per epoch and all steps, if known."""
    check_count("epochs", epochs)
    if not all(hasattr(defense, name) for name in ("step", "register_step_hook", "param_groups")):
        raise TypeError(
            f"expected a Defense, got {type(defense).__name__}; wrap a network with "
            "probdefense.deterministic(net)"
        )
    check_loader(loader, epochs)
    size, steps = num_examples(loader), length(loader)
    _check_size(defense, size)
    return size, None if steps is None else epochs * steps


def _check_size(defense: Any, size: int | None, seen: int = 0) -> None:
    """Refuses a wrong `num_data`; a user's own model says it with its first step, in the plate."""
    known = defense.num_data
    size = seen if size is None and known is not None and seen > known else size
    if known is not None and size is not None and known != size:
        raise ValueError(
            f"the defense was built with num_data={known} but the loader's data set has {size} examples, "
            f"so the KL term would have the wrong weight; build it with num_data={size}, or in a model of "
            f"your own write pyro.plate(..., size={size}, subsample=x)"
        )


def _check_functions(objective: Any, kl_schedule: Any, validation: Any, callbacks: Any) -> None:
    """Refuses, before any work, what `fit` could not call."""
    options = {} if kl_schedule is None else {"kl_weight": 1.0}
    check_function("objective", objective, "defense", "x", "y", **options)
    if kl_schedule is not None:
        check_function("kl_schedule", kl_schedule, "progress")
    if validation is not None:
        check_function("validation", validation, "defense")
    if not isinstance(callbacks, Sequence):
        raise TypeError(
            f"expected callbacks as a list of functions, got {type(callbacks).__name__}; pass [callback]"
        )
    for callback in callbacks:
        check_function("each callback", callback, "epoch", "history")


def _check_optimizer(defense: Any, optimizer: Any) -> torch.optim.Optimizer:
    """Refuses to train nothing: no parameters, or an optimizer that holds those of another module."""
    parameters = {id(p) for p in defense.parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the defense has no parameter that requires a gradient, so there is nothing to fit")
    if optimizer is None:
        return torch.optim.Adam(defense.param_groups(), lr=1e-3, fused=True)
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"expected optimizer as a torch.optim.Optimizer that steps without a closure, got "
            f"{type(optimizer).__name__}; make one such as torch.optim.Adam(defense.param_groups())"
        )
    if not any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer holds none of the defense's parameters, so nothing would be trained; builders "
            "copy the network: make the optimizer from defense.param_groups()"
        )
    return optimizer


def _check_loss(loss: Any, epoch: int, step: int) -> None:
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
    if not bool(torch.isfinite(loss.detach())):
        raise FloatingPointError(
            f"the loss became {float(loss.detach())} in epoch {epoch}, step {step}; lower the learning "
            "rate, or look for scales that grew without a KL term or a prior"
        )
