"""Attacks beside the loop that anyone would write, and beside other libraries."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import probdefense as pd
from benchmarks import peers
from benchmarks.measure import Variants, benchmark, quartiles, timed
from benchmarks.nets import cnn, digits_nets
from probdefense.attacks import pgd
from probdefense.attacks.tools.border import guarded
from probdefense.evaluation.intervals import wilson
from probdefense.logits.adapters import as_logits_fn
from probdefense.prediction.drawing import draw_keyed


def hand_written(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Projected gradient descent in l-inf as anyone writes it."""
    low, high = (x - eps).clamp_min(0.0), (x + eps).clamp_max(1.0)
    point = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0.0, 1.0)
    for _ in range(steps):
        point.requires_grad_(True)
        loss = nn.functional.cross_entropy(net(point), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        point = (point.detach() + 2.5 * eps / steps * gradient.sign()).clamp(low, high)
    return point.detach()


def one_after_another(defense: Any, x: Tensor, y: Tensor, eps: float, steps: int, draws: int) -> Tensor:
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


def frozen_cnn(device: torch.device) -> nn.Module:
    """Without gradients of weights, which both loops would pay for and nobody uses."""
    return cnn().to(device).eval().requires_grad_(False)


@benchmark(
    "eot",
    "EOT-PGD S=16, Bayes, CNN 100k, B=16 / its plain passes and normals",
    1.05,
    rounds=7,
    why="the graphs of 16 passes are held at once and fall out of the cache, by hand, too",
)
def eot(device: torch.device) -> Variants:
    x, y = torch.rand(16, 1, 28, 28, device=device), torch.arange(16, device=device) % 10
    net = frozen_cnn(device)
    defense = pd.defenses.bayesian(cnn().to(device)).eval()
    named = list(net.named_parameters())
    sizes = [p.numel() for _, p in named]
    size, loc = sum(sizes), torch.cat([p.flatten() for _, p in named])
    scale = torch.full_like(loc, 0.01)

    def drawn(x: Tensor, count: int) -> Tensor:
        """Logits of so many draws of one flat vector of weights, by hand."""
        flats = (torch.addcmul(loc, scale, torch.randn_like(loc)).split(sizes) for _ in range(count))
        draws = ({n: part.view_as(p) for part, (n, p) in zip(flat, named, strict=True)} for flat in flats)
        return torch.stack([torch.func.functional_call(net, draw, (x,)) for draw in draws])

    def by_hand() -> None:
        for _ in range(3):
            point = x.clone().requires_grad_(True)
            loss = pd.losses.expected_cross_entropy(drawn(point, 16), y).sum()
            torch.autograd.grad(loss, point)

    def floor() -> None:
        for _ in range(3 * 16):
            torch.randn(size, device=device)
            point = x.clone().requires_grad_(True)
            torch.autograd.grad(nn.functional.cross_entropy(net(point), y), point)

    return {
        "floor": floor,
        "ours": partial(pgd, defense.samples(16), x, y, eps=0.1, num_steps=3),
        "by hand": by_hand,
        "one draw after another": partial(one_after_another, defense, x, y, 0.1, 3, 16),
    }


def _loops(batch: int, device: torch.device) -> dict[str, Any]:
    net = frozen_cnn(device)
    x, y = torch.rand(batch, 1, 28, 28, device=device), torch.arange(batch, device=device) % 10
    found: dict[str, Any] = {
        "floor": lambda: hand_written(net, x, y, 0.2, 10),
        "ours": partial(pgd, pd.deterministic(net), x, y, eps=0.2, num_steps=10),
    }
    return found | peers.attacks(net, x, y, 0.2, 10)


@benchmark(
    "pgd-4",
    "PGD-10 / hand-written loop, CNN 100k, B=4",
    1.05,
    rounds=25,
    why="the checks of every answer cost the same whatever the batch, and a step of four images takes 2 ms: "
    "the figures add one layer of them after the other to the loop",
)
def pgd_4(device: torch.device) -> Variants:
    return _loops(4, device) | _layers(4, device)


def _layers(batch: int, device: torch.device) -> dict[str, Any]:
    """The hand-written loop around what stands between an attack and a network, outermost last."""
    net, y = frozen_cnn(device), torch.arange(batch, device=device) % 10
    x, defense = torch.rand(batch, 1, 28, 28, device=device), pd.deterministic(net)
    border, model = guarded(as_logits_fn(defense), x, y), cast(Any, defense.model)
    functions = {
        "through the network as a pure function": lambda point: model.logits(point, {}),
        "through the defense": lambda point: defense(point)[0],
        "through the border of attacks": lambda point: border(point)[0],
    }
    return {name: partial(hand_written, each, x, y, 0.2, 10) for name, each in functions.items()}


@benchmark("pgd-32", "PGD-10 / hand-written loop, CNN 100k, B=32", 1.05, rounds=7)
def pgd_32(device: torch.device) -> Variants:
    return _loops(32, device)


@benchmark("antithetic", "EOT-PGD at equal gradients: robust accuracy, antithetic - independent draws")
def antithetic(device: torch.device) -> dict[str, Any]:
    """The difference of robust accuracies, of four defenses and of each; 95 % intervals paired by image."""
    x, y = (part[:200].to(device) for part in pd.data.digits()[1].tensors)
    cells: dict[str, str] = {}
    differences = []
    for name, defense in digits_nets(("rse", "bayesian", "pni", "rse on bayesian")).items():
        right = {}
        for draws in ("independent", "antithetic"):
            logits_fn = defense.to(device).samples(8, draws=draws)
            points = pgd(logits_fn, x, y, eps=0.1, num_steps=20, seed=0)
            verdicts = draw_keyed(defense, points, 50, 1)
            right[draws] = (pd.rules.mean_prob(verdicts).argmax(-1) == y).double()
        gap = right["antithetic"] - right["independent"]
        low, high = wilson(int(right["independent"].sum()), len(gap))
        differences.append(gap)
        variance = _variance(defense, x[:32], y[:32])
        cells[name] = (
            f"{float(right['independent'].mean()):.3f} [{low:.3f}, {high:.3f}], difference "
            f"{float(gap.mean()):+.3f} ± {_half(gap):.3f}; variance of the gradient {variance:.2f}x"
        )
    mean = torch.stack(differences).mean(0)  # of an image, which all four are asked about
    value, half = float(mean.mean()), _half(mean)
    return {"value": value, "interval": [value - half, value + half], "about": cells}


def _half(gap: Tensor) -> float:
    """Half the 95 % interval of a mean over images."""
    return 1.96 * float(gap.std()) / math.sqrt(len(gap))


def _variance(defense: pd.Defense, x: Tensor, y: Tensor) -> float:
    """That of the gradient of two draws, antithetic / independent."""
    found = []
    for draws in ("antithetic", "independent"):
        slopes = []
        for _ in range(24):
            point = x.clone().requires_grad_(True)
            logits = defense.samples(2, draws=draws)(point)
            slopes.append(torch.autograd.grad(pd.losses.expected_cross_entropy(logits, y).sum(), point)[0])
        found.append(float(torch.stack(slopes).var(0).mean()))
    return found[0] / found[1]


@benchmark(
    "suite", "suite / pyautoattack rand, RSE digits, 40 images: seconds", 0.33, rounds=1, group="peers"
)
def suite(device: torch.device) -> dict[str, Any]:
    import pyautoattack

    defense = digits_nets(("rse",))["rse"].to(device)
    x, y = (part[:40].to(device) for part in pd.data.digits()[1].tensors)

    def theirs() -> None:
        peer = pyautoattack.AutoAttack(defense.as_module(), norm="Linf", eps=0.1, version="rand", seed=0)
        peer.run_standard_evaluation(x, y)

    times = timed(
        {"theirs": theirs, "ours": partial(pd.attacks.suite, defense, x, y, eps=0.1, seed=0)}, 1, device
    )
    middle = {name: quartiles(spent["cpu"])[1] for name, spent in times.items()}
    return {"value": middle["ours"] / middle["theirs"]}
