"""`fit`: one loop for every defense and objective."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from probdefense.objectives import Schedule, elbo
from probdefense.processes import Processes
from probdefense.progress import progress_bar
from probdefense.training.averages import Average, Mean, check_average
from probdefense.training.batches import Batches
from probdefense.training.checkpoints import Checkpoints
from probdefense.training.checks import check_data, check_functions, check_optimizer, check_steps
from probdefense.training.descent import Descent, Plan
from probdefense.training.history import History
from probdefense.training.run import Run, settings_of
from probdefense.training.schedules import Pace
from probdefense.training.shares import shared
from probdefense.training.streams import seeded
from probdefense.training.validation import Validation, Watch
from probdefense.types import Objective
from probdefense.validation import check_seed


def fit(
    defense: Any,
    loader: Batches,
    *,
    epochs: int,
    objective: Objective = elbo,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Any = None,
    kl_schedule: Schedule | None = None,
    validation: Validation | Callable[[Any], float] | None = None,
    average: Average | None = None,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[Callable[[int, History], Any]] = (),
    max_grad_norm: float | None = 10.0,
    seed: int | None = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    fabric: Any = None,
    weight_draws: Literal["independent", "shared"] = "independent",
    progress: bool = True,
) -> History:
    """Trains a defense in place and returns what happened.

    Every epoch starts in training mode, whatever validation or a callback left; at the end each module
    has the mode it was found in. An epoch ends with validation, schedule and callbacks, in this order.
    With several processes the batch of a step is the loader's, of which each process trains its rows; noise
    is independent across processes, and checkpoints are written by the first.

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
        validation: ``validation(defense) -> number`` after every epoch, in evaluation mode, is recorded;
            a `Validation`, which also keeps the best weights and stops.
        average: ``training.ema(decay)`` or ``training.swa(start)``: the average of the weights, which
            validation and callbacks see and which is left at the end; the steps go on from the last.
        checkpoints: A folder in which the state is kept, and from which a training that was killed or
            interrupted goes on.
        callbacks: ``callback(epoch, history)`` after every epoch, counted from 0; one that returns True
            stops training, and one with a method ``begin(defense)`` gets the defense first. With several
            processes all of them call back. One with ``state_dict`` and ``load_state_dict`` is part of
            checkpoints.
        max_grad_norm: Gradients are clipped to this total L2 norm; None switches it off.
        seed: Of all that torch draws meanwhile: the model, the attack, the order of the loader. Nothing
            outside moves. By default torch's global state is used.
        autocast: ``torch.bfloat16`` to compute forward passes in it where torch deems that safe; parameters
            stay as they are.
        accumulate: Batches per step: the gradient is that of all of them joined, except that layers such as
            BatchNorm see one at a time.
        fabric: A `lightning_fabric.Fabric` after ``launch()``, for many processes; the defense and
            `optimizer` are made before, the same in each.
        weight_draws: Whether processes draw random weights by themselves, which averages over more draws, or
            ``"shared"``, as one process would.
        progress: Whether to show a bar with the time left.

    Returns:
        A `History`.

    Raises:
        TypeError: something else than a `Defense`, a loader of pairs of tensors, or functions.
        OSError: checkpoints cannot be written.
        KeyboardInterrupt: Ctrl-C; with `checkpoints` after the step that was under way, which is kept.
        ValueError: nothing to train, `num_data` other than the data set's size, an epoch without a
            batch, a schedule that needs a length the loader does not have, an average without an epoch,
            checkpoints of another training, or bad data.
        FloatingPointError: the loss became NaN or infinite; the message says where.

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.deterministic(torch.nn.Linear(4, 3))
        >>> batches = [(torch.rand(8, 4), torch.zeros(8).long())]
        >>> len(fit(defense, batches, epochs=2, progress=False).loss)
        2
    """
    seed = None if seed is None else check_seed(seed)
    plan = Plan(objective, kl_schedule, max_grad_norm, autocast, accumulate, weight_draws)
    size, batches = check_data(defense, loader, epochs)
    check_steps(defense, plan, checkpoints)
    check_functions(objective, kl_schedule, validation, callbacks)
    check_average(average, epochs)
    pace, processes = Pace(schedule), Processes(fabric)
    total = None if batches is None else epochs * batches
    steps = None if batches is None else epochs * -(-batches // accumulate)
    pace.check(optimizer, steps, validation)
    if kl_schedule is not None and total is None:
        raise ValueError(
            "kl_schedule is a function of progress, which needs the number of batches, and this loader has "
            "no length; give its data set a __len__, or fix the weight by partial(elbo, kl_weight=...)"
        )
    optimizer = check_optimizer(defense, optimizer)
    if processes.world > 1 and seed is None:
        seed = processes.from_first(int(torch.randint(2**62, ())))
    descent = Descent(defense, optimizer, plan, processes, seed)
    device = next(defense.parameters()).device
    with ExitStack() as stack:
        streams = stack.enter_context(seeded(seed, loader, device, processes.rank))
        stack.enter_context(_modes_kept(defense))
        run = Run(
            defense=defense,
            loader=shared(loader, processes),
            descent=descent,
            pace=pace,
            mean=Mean(average, defense),
            watch=Watch(validation),
            callbacks=callbacks,
            processes=processes,
            streams=streams,
            checkpoints=checkpoints,
            settings=settings_of(defense, seed, average, descent, pace),
            size=size,
            total=total,
            advance=stack.enter_context(progress_bar("fit", total, progress)),
        )
        if checkpoints is not None:
            checkpoints.prepare(defense)
            stack.enter_context(run.interrupts.noted())
            run.resume()
        run.go(epochs)
    return run.history


@contextmanager
def _modes_kept(defense: nn.Module) -> Iterator[None]:
    """After the block every module has the mode it had before."""
    modes = {module: module.training for module in defense.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
