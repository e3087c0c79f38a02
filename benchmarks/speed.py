"""What randomness costs: ratios to the plain network, all measured in one run.

    python benchmarks/speed.py

Absolute times are noise; only ratios within one run mean something. Variants take turns, and the
median over turns is reported.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

import probdefense as pd
from probdefense.objectives import elbo


def cnn() -> nn.Sequential:
    """About 100,000 parameters in eight tensors, for 28x28 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 49, 56), nn.ReLU(), nn.Linear(56, 10)),
    )


def many_tensors() -> nn.Sequential:
    """60 linear layers of width 8: 120 tensors, all overhead."""
    return nn.Sequential(*(layer for _ in range(60) for layer in (nn.Linear(8, 8), nn.Tanh())))


def medians(variants: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each variant; they take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 2):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, seconds: dict[str, float], unit: str) -> None:
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:42s} {1e3 * value:8.2f} ms  {value / seconds[unit]:6.3f}x")


def svi_step(defense: pd.Defense, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(defense.param_groups(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        elbo(defense, x, y).backward()
        optimizer.step()

    return step


def plain_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def stock_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor, num_data: int) -> Callable[[], object]:
    """One site per tensor, AutoNormal and Trace_ELBO, as Pyro's documentation teaches it."""
    to_pyro_module_(net)
    for module in list(net.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            prior = pyro.distributions.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
            setattr(module, name, PyroSample(prior))

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
            logits = self.net(x)
            with pyro.plate("data", num_data, subsample=x):
                pyro.sample("y", pyro.distributions.Categorical(logits=logits), obs=y)

    model = Model()
    guide = AutoNormal(pyro.poutine.block(model, hide=["y"]))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: svi.step(x, y)


def training(turns: int) -> None:
    x, y = torch.rand(128, 1, 28, 28), torch.randint(10, (128,))
    net = cnn()
    variants = {
        "plain Adam step": plain_step(net, x, y),
        "deterministic (target 1.00)": svi_step(pd.deterministic(cnn()), x, y),
        "bayesian (target 1.15)": svi_step(pd.defenses.bayesian(cnn(), num_data=60_000), x, y),
        "rse (target 1.35)": svi_step(pd.defenses.rse(cnn()), x, y),
    }
    count = sum(p.numel() for p in net.parameters())
    show(
        f"one training step, CNN of {count:,} parameters, batch 128",
        medians(variants, turns),
        "plain Adam step",
    )


def overhead(turns: int) -> None:
    x, y = torch.rand(8, 8), torch.randint(8, (8,))
    variants = {
        "plain Adam step": plain_step(many_tensors(), x, y),
        "bayesian": svi_step(pd.defenses.bayesian(many_tensors(), num_data=1000), x, y),
        "stock Pyro (AutoNormal, Trace_ELBO)": stock_step(many_tensors(), x, y, 1000),
    }
    seconds = medians(variants, turns)
    show("one SVI step, 120 tensors, batch 8", seconds, "plain Adam step")
    ours, stock = seconds["bayesian"], seconds["stock Pyro (AutoNormal, Trace_ELBO)"]
    print(f"  ours is {stock / ours:.1f}x faster (target 8x)")


def prediction(turns: int) -> None:
    x, net = torch.rand(128, 1, 28, 28), cnn()
    bayesian, rse = pd.defenses.bayesian(cnn()), pd.defenses.rse(cnn())
    with torch.no_grad():
        variants = {
            "50 plain forwards": lambda: [net(x) for _ in range(50)],
            "bayesian, predict S=50 (target 1.1)": lambda: pd.predict(bayesian, x, 50),
            "rse, predict S=50 (target 1.3)": lambda: pd.predict(rse, x, 50),
            "rse, fresh noise for every image": lambda: rse(x, 50),
        }
        show("posterior predictive, 50 draws, batch 128", medians(variants, turns), "50 plain forwards")


def importing(turns: int) -> None:
    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    seconds = medians(
        {"torch and pyro": run("import torch, pyro"), "probdefense": run("import probdefense")}, turns
    )
    show("import (target: at most 500 ms more)", seconds, "torch and pyro")


def main(turns: int = 30) -> None:
    torch.manual_seed(0)
    training(turns)
    overhead(turns)
    prediction(max(3, turns // 6))
    importing(max(3, turns // 6))


if __name__ == "__main__":
    main(turns=3 if "--quick" in sys.argv else 30)
