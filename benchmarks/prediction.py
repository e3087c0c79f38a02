"""Averages over draws beside as many plain forward passes and the random numbers that they need."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import probdefense as pd
from benchmarks import peers
from benchmarks.measure import Variants, benchmark, quartiles, timed
from benchmarks.nets import cnn, digits_nets, mlp

DRAWS = 50


def forwards(net: nn.Module, x: torch.Tensor, draws: int, normals: int = 0) -> None:
    """So many passes, and so many normal numbers for each."""
    for _ in range(draws):
        net(x)
        torch.randn(normals, device=x.device) if normals else None


def held(run: Any) -> Any:
    """Without gradients."""

    def one() -> None:
        with torch.no_grad():
            run()

    return one


@benchmark(
    "predict-weights",
    "predictive S=50, weights, CNN 100k, B=1 / (50 forwards + their normals)",
    1.1,
    rounds=41,
    why="a pass takes 0.4 ms, of which the key of its draw and putting its weights into the network are some",
)
def predict_weights(device: torch.device) -> Variants:
    net, x = cnn().to(device).eval(), torch.rand(1, 1, 28, 28, device=device)
    size = sum(p.numel() for p in net.parameters())
    bayesian = pd.defenses.bayesian(net).eval()
    others = {name: held(run) for name, run in peers.predictions(net, x, DRAWS).items()}
    return {
        "floor": held(partial(forwards, net, x, DRAWS, size)),
        "forwards alone": held(partial(forwards, net, x, DRAWS)),
        "ours": lambda: pd.predict(bayesian, x, DRAWS),
        **others,
    }


def uses(defense: pd.Defense, x: torch.Tensor) -> list[Any]:
    """The local sites of a defense of our own, for inputs like `x`."""
    model: Any = defense.model
    return model.uses(x)


def _noise_elements(defense: pd.Defense, x: torch.Tensor) -> int:
    return sum(use.shape.numel() for use in uses(defense, x))


@benchmark(
    "predict-shared",
    "predictive noise, ResNet-20 B=64, shared draws / forwards",
    1.10,
    rounds=9,
    why="adding the noise writes every activation once more",
)
def predict_shared(device: torch.device) -> Variants:
    net, x = pd.models.resnet20().to(device).eval(), torch.rand(64, 3, 32, 32, device=device)
    rse = pd.defenses.rse(net).eval()
    floor = held(partial(forwards, net, x, 4))
    return {"floor": floor, "ours": lambda: pd.predict(rse, x, 4)}


@benchmark("predict-fresh", "the same, fresh / (forwards + their normals)", 1.05, rounds=9)
def predict_fresh(device: torch.device) -> Variants:
    net, x = pd.models.resnet20().to(device).eval(), torch.rand(64, 3, 32, 32, device=device)
    rse = pd.defenses.rse(net).eval()
    floor = held(partial(forwards, net, x, 2, len(x) * _noise_elements(rse, x)))
    return {"floor": floor, "ours": held(partial(rse, x, 2))}


@benchmark("backends", "backend auto / best of loop, vmap, fold", 1.10)
def backends(device: torch.device) -> dict[str, Any]:
    """The largest of all cells is compared with the target."""
    cells: dict[str, float] = {}
    nets: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "CNN": (cnn, (1, 28, 28)),
        "MLP": (mlp, (1, 28, 28)),
        "ResNet-20": (pd.models.resnet20, (3, 32, 32)),
    }
    for name, (make, shape) in nets.items():
        builds: dict[str, Callable[..., pd.Defense]]
        builds = {"noise": partial(pd.defenses.rse, before_linear=True), "weights": pd.defenses.bayesian}
        for kind, build in builds.items():
            defense = build(make().to(device)).eval()
            for size in (1, 4, 16, 128) if name != "ResNet-20" else (1, 4, 16):
                x = torch.rand(size, *shape, device=device)
                names = ("auto", "loop", "fold" if kind == "noise" else "vmap")
                variants = {each: held(partial(defense, x, 8, backend=each)) for each in names}
                times = timed(variants, 5 if size < 16 else 3, device)
                middle = {each: quartiles(spent["cpu"])[1] for each, spent in times.items()}
                cells[f"{name}, {kind}, B={size}"] = round(middle["auto"] / min(middle.values()), 3)
    return {"value": max(cells.values()), "about": cells}


@benchmark("sequential-draws", "sequential prediction, clean digits, alpha .05: draws saved", 5.0, least=True)
def sequential_draws(device: torch.device) -> dict[str, Any]:
    defense, x = digits_nets(("rse",))["rse"].to(device), pd.data.digits()[1].tensors[0].to(device)
    used = pd.predict(defense, x, DRAWS, alpha=0.05, seed=0).num_samples
    return {"value": DRAWS / float(torch.as_tensor(used, dtype=torch.float32).mean())}


@benchmark(
    "sequential-cpu",
    "the same: CPU saved",
    3.5,
    least=True,
    why="images that stay undecided go through all draws in passes of a few rows, which cost the overhead of "
    "a call and of the wagers, and noise is drawn for each image, where the fixed draws share theirs",
)
def sequential_cpu(device: torch.device) -> dict[str, Any]:
    defense, x = digits_nets(("rse",))["rse"].to(device), pd.data.digits()[1].tensors[0].to(device)
    variants = {
        "fixed": lambda: pd.predict(defense, x, DRAWS, seed=0),
        "sequential": lambda: pd.predict(defense, x, DRAWS, alpha=0.05, seed=0),
    }
    times = timed(variants, 21, device)
    middle = {name: quartiles(spent["cpu"])[1] for name, spent in times.items()}
    return {"value": middle["fixed"] / middle["sequential"], "about": {"fixed draws": "shared by the batch"}}
