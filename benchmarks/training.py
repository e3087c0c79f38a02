"""A training step beside that of the plain network, and beside Pyro as its documentation teaches it."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.optim import PyroOptim
from torch import Tensor, nn

import probdefense as pd
from benchmarks import peers
from benchmarks.measure import Variants, benchmark
from benchmarks.nets import cnn, many_tensors, mlp
from benchmarks.prediction import uses
from probdefense.objectives import elbo


def svi_step(defense: pd.Defense, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of ours."""
    optimizer = torch.optim.Adam(defense.param_groups(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        elbo(defense, x, y).backward()
        optimizer.step()

    return step


def plain_step(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Callable[[], None]:
    """One step of the network without randomness."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, **options)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def by_hand(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of the same posterior, written for the purpose with torch alone."""
    names, shapes = zip(*((n, p.shape) for n, p in net.named_parameters()), strict=True)
    loc = nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]))
    rho = nn.Parameter(torch.full_like(loc, -4.0))
    optimizer = torch.optim.Adam([loc, rho], lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        scale = rho.exp()
        parts = torch.addcmul(loc, scale, torch.randn_like(loc)).split([s.numel() for s in shapes])
        weights = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        kl = (torch.dot(loc, loc) + torch.dot(scale, scale)) / 2 - rho.sum()
        logits = torch.func.functional_call(net, weights, (x,))
        (nn.functional.cross_entropy(logits, y) + kl / 60_000).backward()
        optimizer.step()

    return step


def stock_step(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """One site per tensor, AutoNormal and Trace_ELBO."""
    pyro.clear_param_store()  # where another benchmark may have left parameters of the same names
    to_pyro_module_(net)
    for module in list(net.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            prior = pyro.distributions.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())
            setattr(module, name, PyroSample(prior))

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            logits = self.net(x)
            with pyro.plate("data", 60_000, subsample=x):
                pyro.sample("y", pyro.distributions.Categorical(logits=logits), obs=y)

    model = Model()
    guide = AutoNormal(pyro.poutine.block(model, hide=["y"]))
    svi = pyro.infer.SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-3}), Trace_ELBO())
    return lambda: svi.step(x, y)


def batch(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.rand(shape, device=device), torch.arange(shape[0], device=device) % 8


def steps(make: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Ours, the plain step and the hand-written one."""
    x, y = batch(shape, device)
    bayesian = pd.defenses.bayesian(make().to(device), num_data=60_000)
    return {
        "floor": plain_step(make().to(device), x, y, fused=True),
        "ours": svi_step(bayesian, x, y),
        "by hand": by_hand(make().to(device), x, y),
    }


@benchmark("svi-cnn", "SVI step, CNN 100k, B=128 / deterministic Adam", 1.05, rounds=25)
def svi_cnn(device: torch.device) -> Variants:
    found, given = steps(cnn, (128, 1, 28, 28), device), batch((128, 1, 28, 28), device)
    found |= {"stock Pyro": stock_step(cnn().to(device), *given)}
    return found | peers.steps(cnn().to(device), *given)


@benchmark(
    "svi-tensors",
    "SVI step, 120 tensors, B=8 / per-tensor Adam",
    0.6,
    rounds=25,
    why="the plain network with a fused optimizer alone costs nearly as much, and the same posterior by hand "
    "more",
)
def svi_tensors(device: torch.device) -> Variants:
    x, y = batch((8, 8), device)
    found = steps(many_tensors, (8, 8), device)
    return found | {
        "floor": plain_step(many_tensors().to(device), x, y, foreach=False),
        "deterministic, fused Adam": plain_step(many_tensors().to(device), x, y, fused=True),
        "stock Pyro": stock_step(many_tensors().to(device), x, y),
    }


@benchmark(
    "svi-mlp",
    "SVI step, MLP 270k, B=64 / deterministic",
    2.6,
    rounds=101,
    why="the step is bound by memory: twice the parameters, their normals and KL; by hand it costs more",
)
def svi_mlp(device: torch.device) -> Variants:
    return steps(mlp, (64, 1, 28, 28), device)


@benchmark(
    "svi-resnet18",
    "SVI step, ResNet-18 (11M), B=32 / deterministic",
    1.2,
    rounds=3,
    why="11 million normals and Adam on twice the parameters; by hand it costs more",
)
def svi_resnet18(device: torch.device) -> Variants:
    return steps(pd.models.resnet18, (32, 3, 32, 32), device)


@benchmark(
    "rse-resnet20",
    "RSE step, ResNet-20, B=64 / deterministic",
    1.2,
    rounds=9,
    why="one normal number for every activation before a convolution costs more than that alone",
)
def rse_resnet20(device: torch.device) -> Variants:
    x, y = batch((64, 3, 32, 32), device)
    defense = pd.defenses.rse(pd.models.resnet20().to(device))
    plain = plain_step(pd.models.resnet20().to(device), x, y, fused=True)
    count = len(x) * sum(use.shape.numel() for use in uses(defense, x))
    return {
        "floor": plain,
        "ours": svi_step(defense, x, y),
        "floor and its normals": lambda: (torch.randn(count, device=device), plain()),
    }


@benchmark("estimator", "local / weights: SVI step, MLP 270k, B=64", None, group="estimators", rounds=10)
def estimator(device: torch.device) -> Variants:
    x, y = batch((64, 1, 28, 28), device)
    both = {
        name: pd.defenses.bayesian(mlp().to(device), num_data=60_000, estimator=name)
        for name in ("weights", "local")
    }
    return {"floor": svi_step(both["weights"], x, y), "ours": svi_step(both["local"], x, y)}
