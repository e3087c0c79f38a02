"""What attacks cost beside the least that could be written, as ratios of one run, and foolbox's distances.

    python benchmarks/attacks.py [turns]

Read ratios only: variants take turns, and the median over turns is reported.
"""

import math
import sys
from functools import partial

import torch
from nets import digits_nets
from speed import cnn, medians, show
from torch import nn

import probdefense as pd
from probdefense.attacks import cw, ddn, fmn, pgd
from probdefense.logits.rules import mean_prob
from probdefense.ops import lp_norm


def hand_written(net: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float, steps: int) -> torch.Tensor:
    """Projected gradient descent in l-inf as anyone writes it."""
    low, high = (x - eps).clamp_min(0.0), (x + eps).clamp_max(1.0)
    point = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0.0, 1.0)
    for _ in range(steps):
        point.requires_grad_(True)
        loss = nn.functional.cross_entropy(net(point), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        point = (point.detach() + 2.5 * eps / steps * gradient.sign()).clamp(low, high)
    return point.detach()


def one_after_another(
    defense: pd.Defense, x: torch.Tensor, y: torch.Tensor, eps: float, steps: int, draws: int
) -> torch.Tensor:
    """Expectation over transformation as it is usually done: draw, differentiate, add."""
    low, high = (x - eps).clamp_min(0.0), (x + eps).clamp_max(1.0)
    point = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0.0, 1.0)
    for _ in range(steps):
        total = torch.zeros_like(x)
        for _ in range(draws):
            point.requires_grad_(True)
            loss = nn.functional.cross_entropy(defense(point)[0], y, reduction="sum")
            total += torch.autograd.grad(loss, point)[0]
        point = (point.detach() + 2.5 * eps / steps * total.sign()).clamp(low, high)
    return point.detach()


def loops(turns: int) -> None:
    """PGD beside a hand-written loop at equal gradients, and with the active set."""
    for parameter in (net := cnn()).parameters():
        parameter.requires_grad_(False)  # else both loops pay for gradients that nobody uses
    x, y = torch.rand(64, 1, 28, 28), torch.arange(64) % 10
    variants = {
        "hand-written loop": lambda: hand_written(net, x, y, 0.2, 10),
        "pgd": partial(pgd, pd.deterministic(net), x, y, eps=0.2, num_steps=10),
    }
    show("PGD-10, CNN of 100,000 parameters, batch 64", medians(variants, turns), unit="hand-written loop")
    function, (x, y) = digits_nets(("plain",))["plain"], pd.data.digits()[1].tensors
    x, y = x[:128], y[:128]
    ours = partial(pgd, function, x, y, eps=0.2, num_steps=40)
    variants = {
        "hand-written loop": lambda: hand_written(function.net, x, y, 0.2, 40),
        "pgd": ours,
        "pgd, active set": partial(ours, active_set=True),
    }
    title = "PGD-40, small undefended net, 128 digits"
    show(title, medians(variants, turns), unit="hand-written loop")


def draws(turns: int) -> None:
    """Sixteen draws at once beside one after another."""
    nets, (x, y) = digits_nets(("rse", "bayesian")), pd.data.digits()[1].tensors
    for name, defense in nets.items():
        for batch in (1, 8):
            part = x[:batch], y[:batch]
            variants = {
                "one after another": partial(one_after_another, defense, *part, 0.2, 5, 16),
                "pgd, vectorized": partial(pgd, defense.samples(16), *part, eps=0.2, num_steps=5),
            }
            title = f"EOT-PGD of 16 draws, {name}, batch {batch}"
            show(title, medians(variants, turns), unit="pgd, vectorized")


def distances() -> None:
    """Median L2 distances at 100 steps."""
    import foolbox

    defense, (x, y) = digits_nets(("plain",))["plain"], pd.data.digits()[1].tensors
    module, x, y = defense.as_module(), x[:100], y[:100]
    peer = foolbox.PyTorchModel(module.eval(), bounds=(0, 1))
    theirs = {
        "DDN": foolbox.attacks.DDNAttack(steps=100),
        "FMN": foolbox.attacks.L2FMNAttack(steps=100),
        "C&W": foolbox.attacks.L2CarliniWagnerAttack(steps=100, stepsize=0.1),
    }
    print("\nmedian L2 distance of 100 digits, 100 steps: ours, foolbox's")
    for (name, attack), ours in zip(theirs.items(), (ddn, fmn, cw), strict=True):
        found = [ours(defense, x, y, seed=0), attack(peer, x, y, epsilons=None)[1]]
        wrong = [mean_prob(defense(points)).argmax(-1) != y for points in found]
        medians_ = [
            float(torch.where(w, lp_norm(points - x, 2), math.inf).median())
            for w, points in zip(wrong, found, strict=True)
        ]
        print(f"  {name}  {medians_[0]:.3f}  {medians_[1]:.3f}")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    loops(turns)
    draws(turns)
    distances()


if __name__ == "__main__":
    main()
