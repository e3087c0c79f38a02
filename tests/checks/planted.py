"""Planted faults: what makes a network look robust without making it so, and which checks must say so.

Every fault is a function of an undefended network. It counts as found if one of the named checks fires; with
few gradients or examples, "not enough budget to tell" is an answer too, silence is not. k-WTA and stochastic
activation pruning exist only here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import probdefense as pd
from probdefense.checks.results import MORE_BUDGET

Make = Callable[[nn.Module], Any]


class Planted(NamedTuple):
    """How the fault is planted, and the checks of which one must fire."""

    make: Make
    checks: tuple[str, ...]


class Changed(nn.Module):
    """A network with something done to its input and its logits."""

    def __init__(self, net: nn.Module, before: Callable = lambda x: x, after: Callable = lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def before(change: Callable[[Tensor], Tensor]) -> Make:
    return lambda net: pd.deterministic(Changed(net, before=change))


def after(change: Callable[[Tensor], Tensor]) -> Make:
    return lambda net: pd.deterministic(Changed(net, after=change))


def of_both(answer: Callable[[nn.Module, Tensor], Tensor]) -> Make:
    """A fault that sees the network and the input."""

    class Both(nn.Module):
        def __init__(self, net: nn.Module):
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return answer(self.net, x)

    return lambda net: pd.deterministic(Both(net))


def bare(answer: Callable[[nn.Module, Tensor, int], Tensor]) -> Make:
    """A random function ``(net, x, draws) -> (draws, batch, classes)``."""
    return lambda net: lambda x, num_samples: answer(net, x, num_samples or 1)


# What is done to pixels


def levels(count: int) -> Callable[[Tensor], Tensor]:
    return lambda x: (x * count).round() / count


def straight_through(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x + (change(x) - x).detach()


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform."""
    k, n = torch.arange(size).unsqueeze(1), torch.arange(size) + 0.5
    scale = torch.full((size, 1), (2 / size) ** 0.5)
    scale[0] = (1 / size) ** 0.5
    return scale * torch.cos(torch.pi * k * n / size)


def jpeg(x: Tensor, coarse: float = 0.6) -> Tensor:
    """Blocks of eight by eight: cosine transform, rounding, coarser for higher frequencies, and back."""
    basis = cosines(8).to(x)
    table = coarse * (1 + torch.arange(8).unsqueeze(1) + torch.arange(8)) / 4
    coefficients = basis @ x @ basis.T / table
    return (basis.T @ (coefficients.round() * table) @ basis).clamp(0.0, 1.0)


def smoothed(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def suspicious(x: Tensor) -> Tensor:
    """Whether an image is off the sixteen gray levels of the data, ``(batch, 1, 1, 1)``."""
    return (x - levels(16)(x)).abs().amax((1, 2, 3), keepdim=True) > 1e-3


def purified(x: Tensor) -> Tensor:
    return torch.where(suspicious(x), levels(3)(smoothed(x)), x)


def hashed(x: Tensor) -> Tensor:
    """A number in [-1, 1) for every pixel that no gradient sees."""
    return ((x.detach() * 7919.0 + 0.1).sin() * 43758.5453).frac()


# What is done to logits


def one_hot(z: Tensor) -> Tensor:
    return nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)


def faked(z: Tensor, x: Tensor, sign: Tensor | float, size: float = 300.0) -> Tensor:
    """Logits whose values are right and whose gradient is that of a decoy."""
    weights = torch.randn(x[0].numel(), 10, generator=torch.Generator().manual_seed(5)).to(x)
    decoy = x.flatten(1) @ weights
    return z + sign * size * (decoy - decoy.detach())


def opposing(shared: bool) -> Make:
    """Draws with the gradient of a decoy, of random sign: of each draw, or of each draw and example."""

    def answer(net: nn.Module, x: Tensor, draws: int) -> Tensor:
        signs = torch.randn(draws, 1 if shared else len(x), 1).sign()
        return torch.stack([faked(net(x), x, sign) for sign in signs])

    return bare(answer)


def wavy(z: Tensor, x: Tensor, phase: float, height: float = 0.7, pitch: float = 700.0) -> Tensor:
    waves = (pitch * x.flatten(1) @ torch.ones(x[0].numel(), 1).to(x) + phase + torch.arange(10)).sin()
    return z + height * waves


def wavy_members(net: nn.Module) -> Any:
    """An ensemble, one member a draw, each with a high-frequency term of its own."""

    def answer(x: Tensor, num_samples: int) -> Tensor:
        phases = torch.randint(8, (num_samples or 1,)).tolist()
        return torch.stack([wavy(net(x), x, float(phase)) for phase in phases])

    return answer


def drifting() -> Callable[[Tensor], Tensor]:
    queries: list[int] = []

    def change(z: Tensor) -> Tensor:
        queries.append(0)
        return z + 0.1 * len(queries) * torch.eye(10)[0]

    return change


def cached(net: nn.Module) -> Any:
    """Answers are remembered by the rounded input, so only a first question keeps its gradient."""
    known: dict[bytes, Tensor] = {}

    def answer(net: nn.Module, x: Tensor) -> Tensor:
        z = net(x)
        keys = [(row * 4).round().to(torch.int8).numpy().tobytes() for row in x.detach().cpu()]
        rows = [known.setdefault(key, row.detach()) for key, row in zip(keys, z, strict=True)]
        return torch.stack(rows) + 0 * z

    return of_both(answer)(net)


def cached_draws(net: nn.Module) -> Any:
    """A random defense that draws once for every size of batch and remembers it."""
    known: dict[tuple[int, ...], Tensor] = {}

    def answer(x: Tensor, num_samples: int) -> Tensor:
        noise = known.setdefault((num_samples or 1, *x.shape), 0.3 * torch.randn(num_samples or 1, *x.shape))
        return torch.stack([net(x + each) for each in noise])

    return answer


# What is done inside


class KWinners(nn.Module):
    """k winners take all (Xiao et al., 2020): the largest activations stay, the others are zero."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, h: Tensor) -> Tensor:
        least = h.topk(max(1, int(self.share * h.shape[-1])), dim=-1).values[..., -1:]
        return torch.where(h >= least, h, 0.0)


class Pruned(nn.Module):
    """Stochastic activation pruning (Dhillon et al., 2018): draws of activations by size, rescaled."""

    def forward(self, h: Tensor) -> Tensor:
        share = h.abs() / h.abs().sum(-1, keepdim=True).clamp_min(1e-9) + 1e-9
        kept = torch.multinomial(share, h.shape[-1], replacement=True)
        hit = torch.zeros_like(h).scatter(-1, kept, 1.0)
        return h * hit / (1 - (1 - share / share.sum(-1, keepdim=True)) ** h.shape[-1])


def inside(make: Callable[[], nn.Module]) -> Make:
    """Something in the place of the ReLU of the network."""

    def planted(net: nn.Module) -> Any:
        layers = [make() if isinstance(layer, nn.ReLU) else layer for layer in net]  # type: ignore[attr-defined]
        return pd.deterministic(nn.Sequential(*layers))

    return planted


def k_winners(net: nn.Module) -> Any:
    """k-WTA needs a network trained with it: wide, and with few winners."""
    x, y = pd.data.digits()[0].tensors
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        wide = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 512),
            KWinners(0.04),
            nn.Linear(512, 256),
            KWinners(0.04),
            nn.Linear(256, 10),
        )
        optimizer = torch.optim.Adam(wide.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wide(x), y).backward()
            optimizer.step()
    return pd.deterministic(wide.eval())


class Rounded(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.relu().round()


# Refusals


def refusing(answer: Callable[[Tensor], Tensor]) -> Make:
    """Images off the gray levels of the data are refused."""
    return of_both(lambda net, x: torch.where(suspicious(x).flatten(1), answer(net(x)), net(x)))


def with_refusal(net: nn.Module, x: Tensor) -> Tensor:
    z = net(x)
    refusal = torch.where(suspicious(x).flatten(1), z.amax(1, keepdim=True) + 5, z.amin(1, keepdim=True) - 5)
    return torch.cat([z, refusal], dim=1)


class Drowned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0] + 1e3 * slopes[0].abs().mean() * torch.randn_like(slopes[0])


def numpy_noise(x: Tensor) -> Tensor:
    return x + torch.as_tensor(0.2 * np.random.standard_normal(x.shape), dtype=x.dtype)


def reversed_slope(net: nn.Module, x: Tensor) -> Tensor:
    z = net(x)
    return 2 * z.detach() - z


MASKS = ("gradient", "stable loss", "loss plateau", "gradient-free", "one step", "unbounded attack")
"""What can show that a gradient misleads."""

PLANTED: dict[str, Planted] = {
    "rounded input": Planted(before(levels(8)), ("gradient",)),
    "bit depth of 4": Planted(before(levels(15)), ("gradient",)),
    "JPEG": Planted(before(jpeg), ("gradient",)),
    "JPEG, straight through": Planted(before(straight_through(jpeg)), ("stable loss",)),
    "quantized first layer": Planted(inside(Rounded), ("gradient",)),
    "detached input": Planted(before(lambda x: x.detach()), ("gradient",)),
    "detect and purify": Planted(before(purified), MASKS),
    "shift by a hash of the input": Planted(before(lambda x: x + 0.15 * hashed(x)), MASKS),
    "logits shifted by a hash": Planted(
        of_both(lambda net, x: net(x) + 3 * hashed(x).flatten(1)[:, 20:30]), MASKS
    ),
    "k winners take all": Planted(k_winners, MASKS),
    "stochastic activation pruning": Planted(inside(Pruned), ("declared randomness",)),
    "saturated logits": Planted(after(lambda z: 1000 * z), ("gradient",)),
    "logits times 1e4": Planted(after(lambda z: 1e4 * z), ("gradient",)),
    "logits over 1e4": Planted(after(lambda z: z / 1e4), ("loss plateau",)),
    "nearly one-hot logits": Planted(
        after(lambda z: 10 * one_hot(z) + 1e-3 * z), ("loss plateau", "stable loss")
    ),
    "a step of the logits": Planted(after(lambda z: 10 * one_hot(z) + 0.1 * z), ("loss plateau",)),
    "rounded logits": Planted(after(lambda z: z + (8 * z).round() - (8 * z)), ("stable loss",)),
    "one-hot logits": Planted(after(lambda z: one_hot(z) + 0 * z), ("gradient",)),
    "probabilities": Planted(after(lambda z: z.softmax(-1)), ("logits",)),
    "reversed gradient": Planted(of_both(reversed_slope), MASKS),
    "gradient of a decoy": Planted(of_both(lambda net, x: faked(net(x), x, 1.0)), MASKS),
    "opposing decoys by draw": Planted(opposing(shared=True), ("gradient signal", *MASKS)),
    "opposing decoys by example": Planted(opposing(shared=False), ("gradient signal", *MASKS)),
    "high-frequency term": Planted(of_both(lambda net, x: wavy(net(x), x, 0.0)), MASKS),
    "high-frequency members": Planted(wavy_members, ("gradient signal", *MASKS)),
    "noise that drowns the gradient": Planted(
        bare(lambda net, x, draws: torch.stack([net(Drowned.apply(x)) for _ in range(draws)])),
        ("gradient signal",),
    ),
    "undeclared noise": Planted(before(lambda x: x + 0.2 * torch.randn_like(x)), ("declared randomness",)),
    "undeclared noise of numpy": Planted(before(numpy_noise), ("declared randomness",)),
    "noise unless a gradient is taken": Planted(
        before(lambda x: x if x.requires_grad else x + 0.2 * torch.randn_like(x)), ("declared randomness",)
    ),
    "noise unless a gradient is taken, declared": Planted(
        bare(lambda net, x, draws: net(x if x.requires_grad else x + 0.3 * torch.randn_like(x)).unsqueeze(0)),
        ("declared randomness",),
    ),
    "whole-batch coupling": Planted(before(lambda x: x - x.mean(0)), ("no adaptation",)),
    "answers that drift": Planted(lambda net: after(drifting())(net), ("no adaptation",)),
    "cached answers": Planted(cached, ("gradient", "no adaptation")),
    "cached draws": Planted(cached_draws, ("declared randomness", "no adaptation")),
    "NaN as a refusal": Planted(refusing(lambda z: z * torch.nan), ("logits",)),
    "a constant as a refusal": Planted(refusing(lambda z: 0 * z + torch.eye(10)[0]), ("logits",)),
    "a class for refusals": Planted(of_both(with_refusal), ("logits",)),
}


def outcome(found: pd.checks.Checks, fault: Planted) -> str:
    """``"found"``, ``"not enough budget"``, or ``"not found"``."""
    if any(found[name].fired for name in fault.checks):
        return "found"
    if any(MORE_BUDGET in check.advice for check in found):
        return "not enough budget"
    return "not found"
