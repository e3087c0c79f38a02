"""Does adversarial training go on getting better, and when should it stop?

A callback sees the history after every epoch; this one writes it for TensorBoard, if that is installed, and
prints it otherwise. Robust accuracy on held-out images chooses the weights and ends the training, which keeps
checkpoints: stopped with Ctrl-C and started again it goes on where it was.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.objectives import adversarial, elbo, warm_up
from probdefense.tables import format_table
from probdefense.training import Checkpoints, Validation, ema

EPS = 0.2


def tensorboard(folder: str) -> Callable[[int, pd.History], None]:
    """A callback that writes every number of the history."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(folder)

    def write(epoch: int, history: pd.History) -> None:
        for name, values in vars(history).items():
            if values:
                writer.add_scalar(name, values[-1], epoch)
        writer.flush()

    return write


def printed(epoch: int, history: pd.History) -> None:
    """A callback that prints what matters most."""
    print(f"epoch {epoch}: loss {history.loss[-1]:.3f}, robust {history.validation[-1]:.3f}")


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    train, test = pd.data.digits()
    count = 300 if quick else len(train)
    data = TensorDataset(*(part[:count] for part in train.tensors))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    held_out = tuple(part[:100] for part in test.tensors)
    attack = partial(pd.attacks.pgd, eps=EPS, num_steps=10)
    inner = warm_up(
        partial(pd.attacks.pgd, num_steps=4, step_size=EPS / 2), eps=EPS, num_steps=5 * len(loader)
    )
    defense = pd.deterministic(pd.models.small_cnn())
    optimizer = torch.optim.Adam(defense.param_groups(), lr=8e-3)
    installed = importlib.util.find_spec("tensorboard") is not None
    with tempfile.TemporaryDirectory() as folder:
        history = pd.fit(
            defense,
            loader,
            epochs=3 if quick else 25,
            objective=adversarial(elbo, inner),
            optimizer=optimizer,
            average=ema(0.99),
            validation=Validation(held_out, attack=attack, patience=10),
            checkpoints=Checkpoints(folder),
            callbacks=[tensorboard("runs/digits") if installed and not quick else printed],
        )
    best = history.validation.index(max(history.validation))
    rows = [
        {"epoch": epoch, "loss": history.loss[epoch], "robust": history.validation[epoch]}
        for epoch in sorted({0, best, len(history.loss) - 1})
    ]
    print(format_table(rows, ("epoch", "loss", "robust")))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
