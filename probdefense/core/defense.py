r"""`Defense`: a classifier whose randomness is all in Pyro sample sites.

A defense is a Pyro model and its guide. Calling it gives logits with a sample axis; objectives train
it through one function, `Defense.step`; attacks see it as a differentiable `LogitsFn`.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probdefense.core.compiled import compiled
from probdefense.core.description import describe, describe_as_html
from probdefense.core.programs import Guide, Model
from probdefense.core.registry import BUILDERS, Call, builder
from probdefense.core.replayed import Replayed
from probdefense.core.settings import check_settings, packed, settings_of, unpacked
from probdefense.core.sites import Site, noise_sites
from probdefense.core.smoothing import input_noise
from probdefense.core.vectorized import Vectorized
from probdefense.logits.adapters import Decided, Samples, Static, paired, with_options
from probdefense.nn.passes import averaging
from probdefense.types import Draws, Inputs, Labels, Logits, LogitsFn, Rule, Step
from probdefense.validation import check_count, check_kind, check_labels, check_member, check_positive

BACKENDS = ("auto", "loop", "vmap", "fold")


class Defense(nn.Module):
    r"""A model $p(y, \theta, \varepsilon \mid x)$ and a guide $q(\theta, \varepsilon)$, as one module.

    Builders in `probdefense.defenses` make it from a network. Your own pair of Pyro modules makes one
    too: ``model(x, y=None)`` returns logits ``(batch, classes)`` and observes `y` in a plate scaled to
    the data set; ``guide(x, y=None)`` samples every latent site.

    Args:
        model: A module.
        guide: A module.
        example: A batch of inputs with which the guide is run once, so that parameters that it
            makes lazily (autoguides) exist before training.

    Raises:
        TypeError: plain functions instead of modules.
        ValueError: a guide that has no parameters yet.

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn())
        >>> defense(torch.rand(2, 1, 8, 8), num_samples=4).shape
        torch.Size([4, 2, 10])
    """

    def __init__(self, model: nn.Module, guide: nn.Module, *, example: Inputs | None = None):
        super().__init__()
        for name, part in (("model", model), ("guide", guide)):
            if not isinstance(part, nn.Module):
                raise TypeError(
                    f"expected {name} as an nn.Module, got {type(part).__name__}; parameters of plain "
                    "functions live in a global store that fit cannot see: write it as a PyroModule"
                )
        self.model, self.guide = model, guide
        self._step_hooks: OrderedDict[int, Callable[[Step, Labels], None]] = OrderedDict()
        self._num_data: int | None = None
        self.calls: tuple[Call, ...] | None = None  # of builders, noted by them
        self.origin: dict[str, Any] | None = None  # the record of the network, noted by them too
        self.notes: dict[str, Any] = {}
        self._example = None if example is None else example[:1].detach().clone()
        self._averaging = averaging(self)
        if isinstance(self._engine, Replayed):
            self._engine.prepare(example)

    @classmethod
    def from_sites(cls, net: nn.Module, sites: Iterable[Site], num_data: int | None = None) -> Defense:
        """The defense of a network and its random sites: the constructor that builders share.

        Holes of the network that no site fills (a `Noise` layer of your own) get a fixed site.

        Args:
            net: The network; parameters that became sites have been moved out of it.
            sites: What is random, in the order in which it is drawn.
            num_data: Size of the training set, which weighs the KL term against the likelihood.

        Examples:
            >>> import probdefense as pd
            >>> net = torch.nn.Sequential(pd.nn.Noise(0.1), torch.nn.Flatten(), torch.nn.Linear(64, 10))
            >>> [name for name in Defense.from_sites(net, []).sites]
            ['0']
        """
        if num_data is not None:
            check_count("num_data", num_data)
        sites = list(sites)
        model = Model(net, [*sites, *noise_sites(net, sites)], num_data)
        return cls(model, Guide(model))

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        return describe_as_html(self)

    @property
    def num_data(self) -> int | None:
        """Size of the training set; None if it was not given."""
        return self.model.num_data if isinstance(self.model, Model) else self._num_data

    @property
    def sites(self) -> dict[str, Site]:
        """The random sites by name (of a defense made of sites)."""
        return dict(self.model.sites) if isinstance(self.model, Model) else {}

    @property
    def net(self) -> nn.Module:
        """The network, without the parameters that became random."""
        return self.model.net if isinstance(self.model, Model) else self.model

    @property
    def stochastic(self) -> bool:
        """Whether two calls with the same `x` may differ."""
        return self._engine.stochastic

    @property
    def shares_draws(self) -> bool:
        """Whether one draw serves the whole batch: true where weights are random."""
        return not self.sites or any(not site.local for site in self.sites.values())

    @property
    def input_noise(self) -> tuple[str, Tensor] | None:
        r"""Family and scale (in pixels, rounded down) of centered noise on the raw input, or None.

        ``"normal"`` with $\sigma$, ``"laplace"`` with $\lambda$, or ``"uniform"`` on
        $[-\lambda, \lambda]$. Only a layer that everything else in the network sees the input through
        counts, with independent noise whose scale is neither random nor a function of the input.
        """
        return input_noise(self.net, self.sites.values())

    def forward(
        self,
        x: Inputs,
        num_samples: int | None = None,
        *,
        max_batch: int | None = None,
        backend: str = "auto",
        draws: str = "independent",
        recompute: bool = False,
    ) -> Logits:
        """Logits of fresh draws, differentiable in `x` and in the parameters, never averaged.

        Args:
            x: ``(batch, *event)``.
            num_samples: Draws, 1 by default.
            max_batch: Images per forward pass; chosen by measurement when None.
            backend: ``"auto"``, ``"loop"``, ``"vmap"`` or ``"fold"``.
            draws: As in `samples`, and so is `recompute`.

        Returns:
            ``(samples, batch, classes)``; one sample if nothing is random.
        """
        check_kind("x", x, Tensor, "convert with torch.as_tensor, as a torch.Tensor (batch, *event)")
        num_samples = 1 if num_samples is None or not self.stochastic else num_samples
        check_count("num_samples", num_samples)
        if max_batch is not None:
            check_count("max_batch", max_batch)
        check_member("backend", backend, BACKENDS)
        if self.training and not torch.is_grad_enabled() and averaging(self) - self._averaging:
            self.move_statistics(x)  # torch's update_bn is at work: nothing else makes layers average
        if recompute and self.stochastic:
            seed = int(torch.randint(2**62, ()))
            return self.drawn(x, num_samples, seed=seed, max_batch=max_batch or len(x), draws=draws)
        return self._engine.logits(x, num_samples, max_batch, backend, antithetic=paired(self, draws))

    def drawn(
        self,
        x: Inputs,
        num_samples: int | None = None,
        *,
        seed: int,
        max_batch: int | None = None,
        draws: str = "independent",
    ) -> Logits:
        """As the call, with draws that belong to `seed`, and memory for one pass: what an attack is given.

        Differentiable in `x` only. Passes too large to be held together run again in the backward pass.

        Args:
            x: ``(batch, *event)``.
            num_samples: Draws, 1 by default.
            seed: Of the draws.
            max_batch: Images (rows times draws) per pass; it changes no draw.
            draws: As in `samples`.

        Returns:
            ``(samples, batch, classes)``.
        """
        num_samples = 1 if num_samples is None or not self.stochastic else num_samples
        check_count("num_samples", num_samples)
        return self._engine.logits(x, num_samples, max_batch, "auto", seed, paired(self, draws))

    @property
    def pairs_draws(self) -> bool:
        """Whether draws can come in antithetic pairs: not those of Pyro programs of your own."""
        return isinstance(self._engine, Vectorized)

    def samples(self, num_samples: int, draws: str = "independent", *, recompute: bool = False) -> Samples:
        """The same function with a fixed number of draws per call; see `adapters.with_options` for pairs.

        Args:
            num_samples: Draws per call.
            draws: ``"independent"`` or ``"antithetic"``.
            recompute: Whether a gradient takes the memory of one draw: passes run again in the backward pass
                with the same draws, about a third more time. Differentiable in `x` only.
        """
        found = with_options(self, num_samples, draws)
        return Samples(self, num_samples, **found.draw_options, recompute=True) if recompute else found

    def freeze(self, num_samples: int = 1, generator: torch.Generator | None = None) -> LogitsFn:
        """`num_samples` fixed functions of the input: common random numbers.

        Weights are drawn once; noise is drawn once per sample and event shape from a stored seed and
        shared by the batch. Any batch size or subset gives the same result per image. Parameters are
        copied and detached.

        Args:
            num_samples: How many functions.
            generator: Where the seed comes from; torch's global state by default.

        Raises:
            ValueError: a latent value of a user's guide depends on `x`.
        """
        check_count("num_samples", num_samples)
        if generator is not None:
            check_kind("generator", generator, torch.Generator, "such as torch.Generator().manual_seed(0)")
        device = generator.device if generator is not None else "cpu"
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        frozen = self._engine.freeze(num_samples if self.stochastic else 1, seed)
        if self._example is not None:
            frozen(self._example)
        return frozen

    def keyed(self, seed: int, ids: Tensor, num_samples: int) -> LogitsFn:
        """As `freeze`, with noise that belongs to each example's id instead of being shared.

        Args:
            seed: Of the draws.
            ids: One integer per example, ``(batch,)``; the function is for these examples.
            num_samples: Draws.
        """
        return self._engine.freeze(num_samples if self.stochastic else 1, seed, ids)

    def compile(self, **options: Any) -> Defense:  # type: ignore[override]
        """Compiles the network as a pure function of draws and inputs, with options of ``torch.compile``."""
        setattr(self.model, "compiled", compiled(self.model, options))  # noqa: B010
        return self

    def step(self, x: Inputs, y: Labels, draws: Draws | None = None) -> Step:
        """The one training forward: `Step(logits, log_lik, kl, draws)`.

        Args:
            x: ``(batch, *event)``.
            y: ``(batch,)``.
            draws: Values of all sites from `draw`; fresh ones by default, with a choice between the
                members of an ensemble enumerated so that every member is trained.

        Raises:
            ValueError: a batch larger than `num_data`, or labels that the logits have no column for.
        """
        check_labels(y, len(x))
        engine, limit = self._engine, self.model.num_data if isinstance(self.model, Model) else None
        if limit is not None and len(x) > limit:
            raise ValueError(
                f"expected a batch of at most num_data={limit} examples, got {len(x)}; "
                "build the defense with num_data=len(train_set)"
            )
        step = engine.step(x, y, draws)
        if isinstance(engine, Replayed):
            self._num_data = engine.num_data
        for hook in self._step_hooks.values():
            hook(step, y)
        return step

    def move_statistics(self, x: Inputs) -> None:
        """Moves the running statistics of layers in training mode by one batch at one draw.

        Nothing is trained and no step hook sees it.
        """
        with torch.no_grad():
            self._engine.step(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), None)

    def draw(self, x: Inputs) -> Draws:
        """One joint draw of every site for a batch, differentiable in the parameters."""
        return self._engine.draw(x)

    def at(self, draws: Draws) -> LogitsFn:
        """The function ``x -> (1, batch, classes)`` at one given draw."""
        return Static(partial(self._engine.at, draws=draws))

    def mean(self) -> LogitsFn:
        """The static base: guide means, noise 0."""
        return Static(self._engine.mean)

    def as_module(
        self, rule: Rule | str = "mean_prob", num_samples: int = 1, frozen: bool = False
    ) -> nn.Module:
        """A plain module ``x -> (batch, classes)`` of scores, for foolbox, AutoAttack or ART.

        Args:
            rule: How draws become scores; log-probabilities with the default.
            num_samples: Draws per call.
            frozen: Whether every call uses the same draws.
        """
        return Decided(self, rule, num_samples, frozen)

    def rebuilt(self, builder: str, **options: Any) -> Defense:
        """What a registered builder makes of this defense, by its name: for rooms that know no builders."""
        made: Defense = BUILDERS[builder](self, **options)
        return made

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameters for an optimizer: no decay on guide parameters or noise coefficients."""
        check_positive("weight_decay", weight_decay, zero=True)
        free = {id(p) for p in self.guide.parameters()}
        for module in self.model.modules():
            if getattr(module, "noise_coefficients", False):
                free |= {id(p) for p in module.parameters(recurse=False)}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in free], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in free], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def get_extra_state(self) -> Tensor:
        """Thresholds, rates, ceilings, floors and families, which no tensor of the state holds."""
        return packed(settings_of(self))

    def set_extra_state(self, state: Any) -> None:
        """Refuses a state that was made with other settings.

        Raises:
            ValueError: they differ; names them.
        """
        check_settings(unpacked(state), settings_of(self))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As torch does it; a state without our entry is taken as one of these settings, with a warning."""
        entry = f"{prefix}_extra_state"
        if entry not in state_dict:
            own = settings_of(self)
            if own:
                warnings.warn(
                    f"the state does not say with which settings it was made; these are taken: {own}",
                    stacklevel=2,
                )
            state_dict[entry] = packed(own)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def register_step_hook(self, hook: Callable[[Step, Labels], None]) -> RemovableHandle:
        """Calls `hook(step, y)` after every training forward, until the handle is removed."""
        handle = RemovableHandle(self._step_hooks)
        self._step_hooks[handle.id] = hook
        return handle

    @property
    def _engine(self) -> Vectorized | Replayed:
        if isinstance(self.model, Model) and isinstance(self.guide, Guide):
            return Vectorized(self.model, self.guide)
        return Replayed(self.model, self.guide)


@builder
def deterministic(net: nn.Module, *, num_data: int | None = None) -> Defense:
    """A plain network as a defense with nothing random: it wraps and copies nothing.

    Args:
        net: Any module ``x -> (batch, classes)``.
        num_data: Size of the training set; not needed without a KL term.

    Returns:
        A `Defense` without sites, whose answers have one row.

    Raises:
        TypeError: not a module, or a `Defense` already.

    Examples:
        >>> deterministic(torch.nn.Linear(4, 3))(torch.rand(2, 4)).shape
        torch.Size([1, 2, 3])
    """
    if isinstance(net, Defense) or not isinstance(net, nn.Module):
        raise TypeError(
            f"expected a plain nn.Module, got {type(net).__name__}; a Defense is used as it is, and a "
            "function is "
            "written as a module"
        )
    return Defense.from_sites(net, [], num_data)
