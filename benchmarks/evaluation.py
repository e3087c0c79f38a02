"""Where an evaluation spends its time, and how often a loop waits for the device."""

import time
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from benchmarks.measure import benchmark
from benchmarks.nets import digits_nets
from benchmarks.syncs import counted_syncs

SHARE = "evaluate, S=50, 5 attacks of 128 gradients per image, RSE digits: verdicts / whole"


@benchmark("verdicts", SHARE, 0.25)
def verdicts(device: torch.device) -> dict[str, Any]:
    defense = digits_nets(("rse",))["rse"].to(device)
    data = tuple(part[:100].to(device) for part in pd.data.digits()[1].tensors)
    attacks = {f"pgd {k}": pd.with_draws(partial(pd.attacks.pgd, num_steps=8), 16) for k in range(5)}
    inside = 0.0

    def noted(attack: Any, *args: Any, **options: Any) -> Any:
        nonlocal inside
        start = time.process_time()
        points = attack(*args, **options)
        inside += time.process_time() - start
        return points

    timed = {name: _wrapped(attack, noted) for name, attack in attacks.items()}
    start = time.process_time()
    pd.evaluate(defense, data, timed, eps=0.1, num_samples=50)
    whole = time.process_time() - start
    return {
        "value": 1 - inside / whole,
        "about": {"attacks, s": round(inside, 2), "whole, s": round(whole, 2)},
    }


def _wrapped(attack: Any, noted: Any) -> Any:
    def timed(logits_fn: Any, x: Any, y: Any, *, eps: float, seed: Any = None) -> Any:
        return noted(attack.attack, logits_fn, x, y, eps=eps, seed=seed)

    return pd.with_draws(timed, attack.num_samples)


@benchmark("syncs-fit", "host syncs, per epoch of fit (12 steps)", 1)
def syncs_fit(device: torch.device) -> dict[str, Any]:
    defense = pd.defenses.bayesian(pd.models.small_cnn(), num_data=96)
    loader = [(torch.rand(8, 1, 8, 8), torch.arange(8) % 10) for _ in range(12)]
    pd.fit(defense, loader, epochs=1, progress=False)
    fit = partial(pd.fit, defense, loader, progress=False)
    counts = [counted_syncs(partial(fit, epochs=n)) for n in (1, 3)]
    return {"value": (counts[1] - counts[0]) / 2}


def _per_step(attack: Any, **options: Any) -> float:
    net, x = pd.deterministic(pd.models.small_cnn()).eval(), torch.rand(8, 1, 8, 8)
    y = net(x)[0].argmax(-1)
    few, many = (counted_syncs(partial(attack, net, x, y, num_steps=n, seed=0, **options)) for n in (5, 25))
    return (many - few) / 20


@benchmark("syncs-pgd", "host syncs, per PGD step", 0)
def syncs_pgd(device: torch.device) -> dict[str, Any]:
    return {"value": _per_step(pd.attacks.pgd, eps=0.1)}


@benchmark("syncs-fmn", "host syncs, per FMN step", 1)
def syncs_fmn(device: torch.device) -> dict[str, Any]:
    return {"value": _per_step(pd.attacks.fmn)}


@benchmark(
    "adaptation", "RMC, groups of 50 / one input at a time: CPU saved", 5.0, least=True, group="others"
)
def adaptation(device: torch.device) -> dict[str, Any]:
    train, test = pd.data.digits()
    base = pd.deterministic(pd.models.small_cnn())
    pd.fit(base, DataLoader(train, 64, shuffle=True), epochs=3, progress=False)
    seconds = {}
    for group in (1, 50):
        settings: dict[str, Any] = {"num_neighbors": 256, "max_epochs": 5, "learning_rate": 1e-3}
        inner = partial(pd.attacks.pgd, eps=0.1, num_steps=10)
        adaptive = pd.rmc(base, train, attack=inner, group=group, **settings)
        start, count = time.process_time(), 5 if group == 1 else 50
        adaptive.respond(test.tensors[0][:count], seed=0)
        seconds[group] = (time.process_time() - start) / count
    return {"value": seconds[1] / seconds[50]}
