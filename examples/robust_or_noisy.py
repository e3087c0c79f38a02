"""Is it robust, or just noisy? One honest defense, and three impostors on an undefended network.

    python examples/robust_or_noisy.py [--quick]

Two of the impostors look robust under PGD, and the third is not the function that attacks see. The checks
say what is wrong with each: a flat network, a flat loss, hidden noise.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.objectives import adversarial, elbo
from probdefense.tables import format_table

EPS = 0.15


class Changed(nn.Module):
    """A network with something done to its input and to its logits."""

    def __init__(self, net: nn.Module, before: Callable[..., Tensor], after: Callable[..., Tensor]):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def same(value: Tensor) -> Tensor:
    return value


def rounded(x: Tensor) -> Tensor:
    """Eight gray levels: the derivative is zero almost everywhere."""
    return (8 * x).round() / 8


def saturated(logits: Tensor) -> Tensor:
    """As after distillation at a temperature of 1000: the cross-entropy rounds to zero."""
    return 1000 * logits


def hidden_noise(x: Tensor) -> Tensor:
    """Noise whenever nobody takes a gradient."""
    return x if x.requires_grad else x + 0.1 * torch.randn_like(x)


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    train, test = pd.data.digits()
    epochs, count, gradients = (2, 60, 16) if quick else (30, 360, 160)
    x, y = (part[:count] for part in test.tensors)
    loader = DataLoader(train, 64, shuffle=True)
    robust, plain = (pd.deterministic(pd.models.small_cnn(width=8)) for _ in range(2))
    inner = partial(pd.attacks.pgd, eps=EPS, num_steps=3, step_size=0.07)
    for defense, objective in ((robust, adversarial(elbo, inner)), (plain, elbo)):
        optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
        pd.fit(defense, loader, epochs=epochs, objective=objective, optimizer=optimizer)
    net = plain.net.eval()
    defenses = {
        "adversarially trained": robust.eval(),
        "rounded input": pd.deterministic(Changed(net, rounded, same)),
        "saturated logits": pd.deterministic(Changed(net, same, saturated)),
        "hidden noise": pd.deterministic(Changed(net, hidden_noise, same)),
        "nothing": plain.eval(),
    }
    rows = []
    for name, defense in defenses.items():
        attack = {"pgd": partial(pd.attacks.pgd, num_steps=10)}
        report = pd.evaluate(defense, (x, y), attack, eps=EPS, rules=[pd.rules.mean_prob])
        found = pd.checks.run(defense, x, y, eps=EPS, num_gradients=gradients)
        fired = ", ".join(f"{check.name} ({check.verdict})" for check in found.fired) or "nothing"
        rows.append({"defense": name, "under pgd": report.rows[-1]["accuracy"], "fired": fired})
    print(format_table(rows, ("defense", "under pgd", "fired"), percent=["under pgd"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less training, fewer images and gradients")
    main(**vars(parser.parse_args()))
