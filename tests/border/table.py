"""A row of the table of bad inputs, the world it is called in, and what every refusal must keep."""

import math
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor, nn

import probdefense as pd

ALLOWED = (ValueError, TypeError, FloatingPointError, OSError)
PACKAGE = Path(pd.__file__).parent
EXPECTED = re.compile(r"expected|unknown|no certificate")
CAME = re.compile(r"got|returned|found|unknown|has|came|NaN|no certificate")
TO_DO = re.compile(r"; |known: ")


@dataclass
class World:
    """Small defenses, data and a generator: what the calls of the table work on."""

    x: Tensor = field(default_factory=lambda: torch.rand(4, 6, generator=torch.Generator().manual_seed(1)))
    y: Tensor = field(default_factory=lambda: torch.tensor([0, 1, 2, 0]))
    images: Tensor = field(default_factory=lambda: torch.full((2, 1, 6, 6), 0.5))
    net: nn.Module = field(default_factory=lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))

    def __post_init__(self) -> None:
        self.plain = pd.deterministic(self.net, num_data=4)
        self.noisy = pd.defenses.rse(self.net, sigma_init=0.25, before_linear=True, num_data=4)
        self.bayes = pd.defenses.bayesian(self.net, num_data=4)
        self.conv = pd.deterministic(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)))
        self.generator = torch.Generator().manual_seed(5)

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        return [self.data]

    @property
    def logits(self) -> Tensor:
        return torch.linspace(-1, 1, 2 * 4 * 3).view(2, 4, 3)

    @property
    def pgd(self) -> Any:
        return partial(pd.attacks.pgd, eps=0.1, num_steps=1)

    def answering(self, answer: Any) -> pd.Defense:
        """A defense whose network returns that, or the answer of a function of its logits."""
        return pd.deterministic(Answering(self.net, answer))

    def state(self) -> dict[str, Any]:
        """Everything that a refusal must leave alone."""
        found: dict[str, Any] = {"x": self.x.clone(), "y": self.y.clone(), "images": self.images.clone()}
        for name in ("plain", "noisy", "bayes", "conv"):
            defense = getattr(self, name)
            found |= {f"{name}/{n}": t.detach().clone() for n, t in tensors(defense)}
            found[f"{name}/modes"] = [module.training for module in defense.modules()]
            found[f"{name}/grads"] = [parameter.grad is None for parameter in defense.parameters()]
            found[f"{name}/hooks"] = [
                len(m._forward_hooks) + len(m._forward_pre_hooks) for m in defense.modules()
            ]
        found["random"], found["generator"] = torch.get_rng_state(), self.generator.get_state()
        found["gradients"] = torch.is_grad_enabled()
        found["figures"] = pyplot.get_fignums()
        return found


def tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


class Answering(nn.Module):
    """A network with another answer."""

    def __init__(self, net: nn.Module, answer: Any):
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return self.answer(logits) if callable(self.answer) else self.answer


@dataclass(frozen=True)
class Case:
    """One bad input: the call, the class of the exception and a pattern of its message."""

    name: str
    call: Callable[[World], Any]
    kind: type[Exception] | tuple[type[Exception], ...]
    match: str

    def __str__(self) -> str:
        return self.name


def named(cases: list[Case]) -> dict[str, Any]:
    """Arguments of ``pytest.mark.parametrize``."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return {"argnames": "case", "argvalues": cases, "ids": str}


def refused(case: Case) -> None:
    """The call is refused by us, in our words, and leaves everything as it was."""
    world = World()
    before = world.state()
    try:
        case.call(world)
    except Exception as found:
        error = found
    else:
        raise AssertionError("accepted without a word")
    message = str(error)
    assert isinstance(error, ALLOWED), f"{type(error).__name__}: {message}"
    assert raised_by_us(error), f"raw {type(error).__name__}: {message}"
    assert isinstance(error, case.kind), f"{type(error).__name__}, expected {case.kind}: {message}"
    assert re.search(case.match, message), f"{case.match!r} is not in: {message}"
    for part in (EXPECTED, CAME, TO_DO):
        assert part.search(message), f"nothing of {part.pattern!r} in: {message}"
    unchanged(before, world.state())


def raised_by_us(error: Exception) -> bool:
    """Whether the innermost frame is a ``raise`` of the package."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return PACKAGE in Path(last.filename).parents and str(last.line).startswith("raise ")


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, f"changed: {name}"


@cache
def report() -> pd.Report:
    """Of two attacks at two radii on a random defense."""
    with torch.random.fork_rng():
        world = World()
        attacks = {"pgd": world.pgd.func, "fgsm": pd.attacks.fgsm}
        attacks = {"pgd": partial(pd.attacks.pgd, num_steps=1), "fgsm": pd.attacks.fgsm}
        return pd.evaluate(world.noisy, world.data, attacks, eps=[0.1, 0.2], num_samples=3)


@cache
def prediction() -> pd.Prediction:
    with torch.random.fork_rng():
        world = World()
        return pd.predict(world.noisy, world.x, 3, seed=0)


@cache
def tree() -> Any:
    with torch.random.fork_rng():
        world = World()
        return pd.to_arviz(world.bayes, world.data, num_samples=4)


INF = math.inf
