"""What one kind of randomness costs: each builder beside the plain network, and what grows with what."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

import probdefense as pd
from benchmarks.measure import benchmark, quartiles, timed
from benchmarks.nets import cnn, many_tensors
from benchmarks.prediction import held
from benchmarks.training import plain_step, svi_step
from probdefense.defenses import bayesian, brelu, ensemble, jump_relu, mc_dropout, pni, rse


def builders(net: nn.Module) -> dict[str, pd.Defense]:
    """One defense per kind of layer."""
    return {
        "noise before every convolution": rse(net),
        "multiplicative noise, learned": rse(net, multiplicative=True, scale="learned"),
        "JumpReLU": jump_relu(net, kappa=0.1),
        "JumpReLU, random": jump_relu(net, kappa=dist.Uniform(0.06, 0.1)),
        "bounded ReLU": brelu(net),
        "dropout masks": mc_dropout(net, rate=0.2),
        "parametric noise on weights": pni(net),
        "random weights": bayesian(net, num_data=60_000),
        "ensemble of one draw": ensemble([net, net]),
    }


def _beside(variants: dict[str, Callable[[], object]], device: torch.device) -> dict[str, Any]:
    times = timed(variants, 5, device)
    middle = {name: quartiles(spent["cpu"])[1] for name, spent in times.items()}
    cells = {name: round(value / middle["plain"], 3) for name, value in middle.items() if name != "plain"}
    return {"value": max(cells.values()), "about": cells}


@benchmark("layers-draw", "a draw / a forward pass, CNN 100k, B=64: the dearest builder", group="layers")
def layers_draw(device: torch.device) -> dict[str, Any]:
    net, x = cnn().to(device).eval(), torch.rand(64, 1, 28, 28, device=device)
    found = {"plain": held(partial(net, x))}
    return _beside(found | {n: held(partial(d.eval(), x)) for n, d in builders(net).items()}, device)


@benchmark(
    "layers-step", "a training step / a plain one, CNN 100k, B=64: the dearest builder", group="layers"
)
def layers_step(device: torch.device) -> dict[str, Any]:
    net, x = cnn().to(device), torch.rand(64, 1, 28, 28, device=device)
    y = torch.arange(64, device=device) % 10
    found: dict[str, Callable[[], object]] = {"plain": plain_step(net, x, y, fused=True)}
    return _beside(found | {n: svi_step(d, x, y) for n, d in builders(net).items()}, device)


def slope(make: Callable[[int], Callable[[], object]], sizes: tuple[int, int], device: torch.device) -> float:
    r"""$\Delta \log t / \Delta \log n$: 0 is flat, 1 is linear."""
    times = timed({str(size): make(size) for size in sizes}, 5, device)
    first, last = (quartiles(times[str(size)]["cpu"])[1] for size in sizes)
    return round(math.log(last / first) / math.log(sizes[1] / sizes[0]), 2)


@benchmark("slopes", "how CPU time grows: the largest slope, log time by log size", group="scaling")
def slopes(device: torch.device) -> dict[str, Any]:
    weights, image = bayesian(cnn().to(device)).eval(), torch.rand(64, 1, 28, 28, device=device)

    def steps(count: int) -> Callable[[], object]:
        y = torch.arange(8, device=device)
        return partial(
            pd.attacks.pgd, pd.deterministic(cnn().to(device)), image[:8], y, eps=0.1, num_steps=count
        )

    def tensors(count: int) -> Callable[[], object]:
        x, y = torch.rand(8, 8, device=device), torch.arange(8, device=device)
        return svi_step(bayesian(many_tensors(count // 2).to(device), num_data=100), x, y)

    def width(count: int) -> Callable[[], object]:
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, count), nn.ReLU(), nn.Linear(count, 10)).to(device)
        return svi_step(bayesian(net, num_data=100), image, torch.arange(64, device=device) % 10)

    cells = {
        "predictive by draws, 8 to 64, B=1": slope(
            lambda s: partial(pd.predict, weights, image[:1], s), (8, 64), device
        ),
        "predictive by batch, 8 to 64, S=8": slope(
            lambda b: partial(pd.predict, weights, image[:b], 8), (8, 64), device
        ),
        "SVI step by tensors, 20 to 120": slope(tensors, (20, 120), device),
        "SVI step by width, 64 to 512": slope(width, (64, 512), device),
        "PGD by steps, 5 to 20": slope(steps, (5, 20), device),
    }
    return {"value": max(cells.values()), "about": cells}


@benchmark("import", "import probdefense / import torch, pyro", group="others", rounds=3)
def importing(device: torch.device) -> dict[str, Any]:
    import subprocess
    import sys

    def run(code: str) -> float:
        code = f"import time; {code}; print(time.process_time())"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(answer.stdout)

    pairs = [(run("import probdefense"), run("import torch, pyro")) for _ in range(3)]
    return {"value": quartiles([a / b for a, b in pairs])[1]}
