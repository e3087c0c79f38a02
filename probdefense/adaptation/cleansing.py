r"""Runtime masking and cleansing: a defense that refines itself on the neighbors of every input.

Wu, Yuan and Wu, 2020, [Adversarial Robustness via Runtime Masking and
Cleansing](https://proceedings.mlr.press/v119/wu20f.html). Before it answers, the defense trains on the
training examples (clean and attacked) nearest to the input in feature space; seen as inference, it
refines a local posterior whose prior is the global one:

$$ \max_q \sum_{j \in N(x)} \mathbb{E}_q \log p(y_j | x_j, \theta) - \beta\, \mathrm{KL}(q \| q_0) $$

The paper is the case of a plain network, $\beta = 0$ and early stopping. An adaptive defense answers
differently after every input, so it must face attacks that simulate it (`attacks.fpa`, `attacks.gmsa`)
and must be shown beside its static base.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probdefense.adaptation.neighbors import Bank, attacked_copy
from probdefense.core.defense import Defense
from probdefense.core.families import Fixed
from probdefense.core.programs import Model
from probdefense.evaluation.examples import gather
from probdefense.nn.passes import explained
from probdefense.objectives import elbo
from probdefense.progress import track
from probdefense.rng import derive, forked
from probdefense.types import Attack, Inputs, Logits, LogitsFn, Objective
from probdefense.validation import (
    check_classes,
    check_count,
    check_examples,
    check_function,
    check_inputs,
    check_member,
    check_positive,
    check_seed,
    check_share,
)

NORMALIZATION = nn.modules.batchnorm._NormBase
Adapt = Literal["all", "last", "norm", "guide"]
Policy = Literal["carry", "reset", "decay"]


@dataclass(frozen=True)
class Settings:
    """How an adaptive defense refines itself; see `rmc` for each."""

    num_neighbors: int
    objective: Objective
    policy: Policy
    decay: float
    calibrate: bool
    group: int
    learning_rate: float
    max_epochs: int
    patience: int
    batch_size: int


def rmc(
    defense: Defense,
    data: Any,
    *,
    attack: Attack,
    num_neighbors: int = 1024,
    objective: Objective = elbo,
    num_copies: int = 1,
    adapt: Adapt = "all",
    policy: Policy = "carry",
    decay: float = 0.5,
    calibrate: bool = True,
    group: int = 1,
    learning_rate: float = 2.5e-5,
    max_epochs: int = 100,
    patience: int = 5,
    batch_size: int = 128,
    seed: int = 0,
) -> "RMC":
    r"""Makes an adaptive defense from a trained one: a `LogitsFn` that refines itself at run time.

    Args:
        defense: The trained base; it is copied and stays as it is.
        data: Training examples ``(x, y)``, a data set or a loader.
        attack: Makes the attacked copies on the base; they keep their true labels.
        num_neighbors: $K$, neighbors per input, by L2 distance in the base's penultimate features.
        objective: What refinement minimizes. On a Bayesian base its KL is to the global posterior.
        num_copies: Attacked copies of the training set.
        adapt: What moves: everything, the last layer, normalization layers, or the guide.
        policy: After an answer the weights are carried on (the paper), reset to the base, or moved
            back toward it by the factor `decay`.
        decay: Share of the way from the base that is kept under ``policy="decay"``.
        calibrate: Whether $K$ random examples are trained on after each answer, against forgetting.
        group: Inputs of the stream that adapt together; 1 is the paper.
        learning_rate: Of Adam, whose state lives on along the stream.
        max_epochs: Passes over the neighbors, at most.
        patience: Epochs without a better validation loss before stopping; the best weights are kept.
        batch_size: Of refinement.
        seed: Of the attacked copies.

    Returns:
        An `RMC`: ``static``, ``simulate``, ``respond``, ``state`` and ``restore`` beside the call.

    Raises:
        TypeError: a base that no builder made, or an `attack` or `objective` that is no function.
        ValueError: $K$ larger than the data, nothing to adapt, data that do not fit each other or the
            base, or settings out of range.

    References:
        Wu et al., 2020, [Adversarial Robustness via Runtime Masking and
        Cleansing](https://proceedings.mlr.press/v119/wu20f.html)

    Examples:
        >>> import probdefense as pd
        >>> base = pd.deterministic(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)))
        >>> data = torch.rand(40, 4), torch.randint(3, (40,))
        >>> attack = partial(pd.attacks.fgsm, eps=0.1)
        >>> adaptive = rmc(base, data, attack=attack, num_neighbors=16, max_epochs=2)
        >>> adaptive.respond(torch.rand(2, 4), seed=0).shape
        torch.Size([1, 2, 3])
    """
    settings = Settings(
        num_neighbors=num_neighbors,
        objective=objective,
        policy=policy,
        decay=decay,
        calibrate=calibrate,
        group=group,
        learning_rate=learning_rate,
        max_epochs=max_epochs,
        patience=patience,
        batch_size=batch_size,
    )
    _check(defense, settings, num_copies)
    check_function("attack", attack, "logits_fn", "x", "y")
    seed, (x, y) = check_seed(seed), _checked_data(defense, gather(data))
    copies = [attacked_copy(defense, attack, x, y, derive(seed, "copy", i)) for i in range(num_copies)]
    bank = Bank(defense, torch.cat([x, *copies]), y.repeat(1 + num_copies))
    if not 8 <= num_neighbors <= len(bank.x):
        raise ValueError(
            f"expected 8 <= num_neighbors <= {len(bank.x)}, the clean and attacked training examples, "
            f"got {num_neighbors}; set num_neighbors= to the size of the data or below"
        )
    return RMC(defense, bank, settings, adapt)


class RMC:
    """An adaptive `LogitsFn`; see `rmc`.

    A call answers with the present weights and changes nothing; only `respond` moves them.

    Attributes:
        static: The base, as it was trained.
        input_noise: None: an adaptive defense has no smoothing certificate.
        diverged: How many refinements ended in NaN and were undone.
    """

    input_noise = None

    def __init__(self, defense: Defense, bank: Bank, settings: Settings, adapt: Adapt):
        self.static, self.bank, self.settings = copy.deepcopy(defense).eval(), bank, settings
        self.adapted = _local(self.static, settings.num_neighbors)
        self.parameters = _chosen(self.adapted, bank.layer, adapt)
        for parameter in self.adapted.parameters():
            parameter.requires_grad_(any(parameter is p for p in self.parameters))
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        self.base, self.diverged = self.state(), 0

    @property
    def stochastic(self) -> bool:
        """As the base."""
        return self.static.stochastic

    @property
    def group(self) -> int:
        """How many inputs of the stream adapt together."""
        return self.settings.group

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """Logits of the present weights, ``(samples, batch, classes)``; nothing adapts."""
        return self.adapted(x, num_samples)

    def freeze(self, num_samples: int = 1) -> LogitsFn:
        """The present weights with their randomness fixed."""
        return self.adapted.freeze(num_samples)

    def mean(self) -> LogitsFn:
        """The present weights at their means, noise 0."""
        return self.adapted.mean()

    def state(self) -> dict[str, Any]:
        """Weights and optimizer, copied."""
        return copy.deepcopy({"adapted": self.adapted.state_dict(), "optimizer": self.optimizer.state_dict()})

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave, bit for bit.

        Raises:
            TypeError: something else.
        """
        if not isinstance(state, dict) or state.keys() != {"adapted", "optimizer"}:
            raise TypeError(
                f"expected what state() gave, got {type(state).__name__} {state!r:.60}; keep that"
            )
        self.adapted.load_state_dict(state["adapted"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def simulate(self, x: Inputs, *, seed: int) -> LogitsFn:
        """The function that would answer `x`, all of it in one group; the defense stays as it is."""
        self._check_stream(x, seed)
        twin = self._twin()
        with forked(seed, x.device):
            twin._refine(self.bank.nearest(x, self.settings.num_neighbors))
        return twin.adapted

    def respond(self, x: Inputs, *, seed: int, num_samples: int = 1) -> Logits:
        """Answers the inputs in stream order, ``(samples, batch, classes)``, adapting as it goes.

        When the objective fails, the defense is found again as it was before the first of them.

        Args:
            x: ``(batch, *event)``, a piece of the stream.
            seed: Of the splits, the order of training examples, and the draws.
            num_samples: Draws behind every answer.
        """
        self._check_stream(x, seed)
        check_count("num_samples", num_samples)
        twin, answers = self._twin(), []
        for number, part in enumerate(track(x.split(self.settings.group), "adapt")):
            with forked(derive(seed, number), x.device):
                twin._refine(self.bank.nearest(part, self.settings.num_neighbors))
                with torch.no_grad():
                    answers.append(twin.adapted(part, num_samples))
                twin._settle_down()
        vars(self).update(vars(twin))  # only now: what failed on the way leaves no trace
        return torch.cat(answers, dim=1)

    @property
    def model(self) -> Model:
        """The model under refinement, whose data are the neighbors."""
        assert isinstance(self.adapted.model, Model)
        return self.adapted.model

    def _twin(self) -> "RMC":
        """A copy that may move, or fail, without a trace here."""
        twin = copy.copy(self)
        moving = self.adapted, self.parameters, self.optimizer
        twin.adapted, twin.parameters, twin.optimizer = copy.deepcopy(moving)
        return twin

    def _check_stream(self, x: Inputs, seed: int) -> None:
        """Refuses inputs of another shape than the bank's."""
        check_inputs(x)
        check_seed(seed)
        if x.shape[1:] != self.bank.x.shape[1:]:
            raise ValueError(
                f"expected inputs (batch, {', '.join(map(str, self.bank.x.shape[1:]))}), like the data that "
                f"the defense adapts on, got {tuple(x.shape)}; give it images of that size"
            )

    def _refine(self, nearest: Tensor) -> None:
        """Trains on the neighbors; a quarter of the nearest fifth decides when to stop."""
        head = nearest[:, : max(1, nearest.shape[1] // 5)].unique()
        head = head[torch.randperm(len(head), device=head.device)]
        validation = head[: max(1, len(head) // 4)]
        everything = nearest.unique()
        self._train(everything[~torch.isin(everything, validation)], validation)

    def _settle_down(self) -> None:
        """After an answer: calibration replay, then the policy."""
        settings = self.settings
        if settings.policy == "reset":
            self.restore(self.base)
            return
        if settings.calibrate:
            drawn = torch.randperm(len(self.bank.x), device=self.bank.x.device)[: settings.num_neighbors]
            size = max(1, settings.num_neighbors // 8)
            self._train(drawn[size:], drawn[:size])
        if settings.policy == "decay":
            with torch.no_grad():
                for name, value in self.adapted.state_dict().items():
                    if value.is_floating_point():
                        value.lerp_(self.base["adapted"][name], 1 - settings.decay)

    def _train(self, train: Tensor, validation: Tensor) -> None:
        """Epochs over `train` until the loss on `validation` stops falling; keeps the best weights."""
        settings, found = self.settings, self.state()
        self.model.num_data = max(len(train), len(validation))
        best, lowest, waited = self._weights(), self._loss(validation), 0
        for _ in range(settings.max_epochs):
            for batch in train[torch.randperm(len(train), device=train.device)].split(settings.batch_size):
                loss = settings.objective(self.adapted, self.bank.x[batch], self.bank.y[batch])
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
            now = self._loss(validation)
            if not math.isfinite(now):
                self.restore(found)
                self.diverged += 1
                warnings.warn("a refinement diverged and was undone; lower learning_rate", stacklevel=2)
                return
            best, lowest, waited = (self._weights(), now, 0) if now < lowest else (best, lowest, waited + 1)
            if waited >= settings.patience:
                break
        with torch.no_grad():
            for parameter, value in zip(self.parameters, best, strict=True):
                parameter.copy_(value)

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def _loss(self, rows: Tensor) -> float:
        """Expected negative log-likelihood on some examples of the bank, nats per example."""
        with torch.no_grad():
            return -float(self.adapted.step(self.bank.x[rows], self.bank.y[rows]).log_lik.mean())


def _checked_data(defense: Defense, data: Any) -> tuple[Inputs, Tensor]:
    """Refuses data that do not fit each other or the base."""
    x, y = check_examples(data)
    with torch.no_grad(), explained(x):
        check_classes(y, defense.mean()(x[:1]).shape[-1])
    return x, y


def _check(defense: Defense, settings: Settings, num_copies: int) -> None:
    if not isinstance(defense, Defense) or not hasattr(defense.model, "sites"):
        raise TypeError(
            f"expected a Defense made by a builder, got {type(defense).__name__}; wrap a plain network with "
            "probdefense.deterministic(net)"
        )
    for name in ("num_neighbors", "group", "max_epochs", "patience", "batch_size"):
        check_count(name, getattr(settings, name))
    check_count("num_copies", num_copies, least=0)
    check_function("objective", settings.objective, "defense", "x", "y")
    check_positive("learning_rate", settings.learning_rate)
    check_member("policy", settings.policy, ("carry", "reset", "decay"))
    check_share("decay", settings.decay, ends="[]")


def _local(defense: Defense, num_data: int) -> Defense:
    """A copy to refine: the global posterior becomes the prior of the local one."""
    twin = copy.deepcopy(defense)
    sites = [
        site if site.posterior is None or site.prior is None else replace(site, prior=Fixed(site.posterior()))
        for site in twin.sites.values()
    ]
    return Defense.from_sites(twin.net, sites, num_data).eval()


def _chosen(defense: Defense, last: str, adapt: Adapt) -> list[nn.Parameter]:
    """The parameters that adapt.

    Raises:
        ValueError: there are none of that kind.
    """
    check_member("adapt", adapt, ("all", "last", "norm", "guide"))
    owners: dict[str, Callable[[], Iterator[nn.Parameter]]] = {
        "all": defense.parameters,
        "guide": defense.guide.parameters,
        "last": lambda: _of_layers(defense, lambda path, _: path == last),
        "norm": lambda: _of_layers(defense, lambda _, module: isinstance(module, NORMALIZATION)),
    }
    chosen = [parameter for parameter in owners[adapt]() if parameter.requires_grad]
    if not chosen:
        raise ValueError(
            f"nothing to adapt with adapt={adapt!r}: the layers have no parameters of their own; random "
            "weights of one layer can adapt alone with layout='per_tensor'"
        )
    return chosen


def _of_layers(defense: Defense, where: Callable[[str, nn.Module], bool]) -> Iterator[nn.Parameter]:
    """Parameters of some layers, and of the guides of sites that hold nothing but such layers."""
    paths = {path for path, module in defense.net.named_modules() if where(path, module)}
    for path in paths:
        yield from defense.net.get_submodule(path).parameters()
    for site in defense.sites.values():
        names = [name.rpartition(".")[0] for group in getattr(site, "names", ()) for name in group]
        if names and set(names) <= paths and site.posterior is not None:
            yield from site.posterior.parameters()
