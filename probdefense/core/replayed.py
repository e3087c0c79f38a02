"""How a user's own Pyro model and guide draw: trace the guide, replay the model, one draw at a time.

The pair is ordinary Pyro and may do anything, so this is the general path; `Vectorized` is the fast
one. Parameters stay local to their modules (no global parameter store).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from probdefense.core.evidence import (
    Given,
    Parents,
    Structure,
    batch_dim,
    evidence,
    is_subsample,
    made_of,
    random_sites,
)
from probdefense.core.sites import join
from probdefense.nn.passes import held_still
from probdefense.rng import GLOBAL, derive, forked
from probdefense.types import Draws, Inputs, Labels, Step
from probdefense.validation import check_output


@contextmanager
def own_params() -> Iterator[None]:
    """The parameter store is empty for the block and as it was afterwards: modules bring their own.

    So modules work whether or not they were made under ``module_local_params``. The store, the setting and
    Pyro's stack of handlers belong to all threads, so one of them is here at a time.
    """
    with GLOBAL, pyro.settings.context(module_local_params=False), pyro.get_param_store().scope():
        yield


_STRUCTURES: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Structure]] = WeakKeyDictionary()


class Replayed:
    """The drawing strategy for any other pair of Pyro modules."""

    stochastic = True

    def __init__(self, model: nn.Module, guide: nn.Module):
        self.model, self.guide = model, guide
        self.num_data: int | None = None  # as the plate of the last step said

    def prepare(self, example: Inputs | None) -> None:
        """Lets lazily made parameters come into being, and refuses a pair that fit could not train.

        Raises:
            ValueError: a guide that is lazy without an example, or parameters outside the modules.
        """
        if example is not None:
            try:
                with torch.no_grad(), forked(0, example.device), held_still(self.model):
                    self._refuse_loose(self.trace(example))
            except (ValueError, RuntimeError, NotImplementedError) as error:
                if not isinstance(self.guide, AutoGuide):
                    raise
                raise ValueError(
                    f"the guide failed on the example: {error}; hide the labels from an autoguide, as in "
                    "AutoNormal(poutine.block(model, hide=['y'])), or call guide(x, y) once before, "
                    "without example="
                ) from error
        elif isinstance(self.guide, AutoGuide) and self.guide.prototype_trace is None:
            raise ValueError(
                f"{type(self.guide).__name__} makes its parameters on its first call, so there is "
                "nothing to train yet; pass example=x, a batch of inputs"
            )
        _refuse_rows(self.guide)
        _warn_of_store(self.model, self.guide)

    def _refuse_loose(self, trace: Trace) -> None:
        """Refuses parameters that no module owns: nothing would train them."""
        known = {id(p) for p in [*self.model.parameters(), *self.guide.parameters()]}
        for name, site in trace.nodes.items():
            value: Any = site.get("value")
            if site["type"] == "param" and id(_unconstrained(value)) not in known:
                raise ValueError(
                    f"the pyro.param statement {name!r} belongs to no module, so fit would not train it; "
                    "make it an attribute, as in self.loc = PyroParam(...)"
                )

    def logits(
        self,
        x: Inputs,
        num_samples: int,
        max_batch: int | None,
        backend: str,
        seed: int | None = None,
        antithetic: bool = False,
    ) -> Tensor:
        """Logits of fresh draws, ``(samples, batch, classes)``; with `seed` of draws that belong to it."""
        members = []
        for member in range(num_samples):
            with forked(None if seed is None else derive(seed, member), x.device):
                members.append(self.at(x, _values(self.trace(x), plates=True)))
        return torch.cat(members)

    def freeze(self, num_samples: int, seed: int, ids: Tensor | None = None) -> "FrozenReplay":
        """`num_samples` functions whose latent values are drawn from `seed`."""
        return FrozenReplay(self, num_samples, seed)

    def step(self, x: Inputs, y: Labels, draws: Draws | None) -> Step:
        """One training forward: fresh draws (or the given ones), log-likelihood and KL by site."""
        with own_params(), Given(draws or {}):
            guide = poutine.trace(self.guide).get_trace(x, y)
            with Given(_values(guide, plates=True)):
                model = poutine.trace(self.model).get_trace(x.clone(), y)
        for seen in (guide, model):
            self._refuse_loose(seen)
        values = _values(model) | _values(guide)
        if draws is not None and (missing := values.keys() - draws.keys()):
            raise ValueError(
                f"the draws lack sites {', '.join(sorted(missing))}; take all of them from defense.draw(x)"
            )
        found = evidence(model, guide, self._structure(x, y, guide), len(x))
        self.num_data = found.num_data
        logits = self._answer(model.nodes["_RETURN"]["value"], x)
        return Step(logits, found.log_lik, found.kl, values, found.score)

    def _structure(self, x: Inputs, y: Labels, seen: Trace) -> Structure:
        """What the guide's sites are made of: found by a second run, once per set of sites."""
        known = _STRUCTURES.setdefault(self.guide, {})
        key = tuple(seen.nodes)
        if key not in known:
            given = Given(_values(seen, plates=True))
            with torch.no_grad(), forked(0, x.device), held_still(self.guide), own_params(), given, Parents():
                known[key] = made_of(poutine.trace(self.guide).get_trace(x, y))
        return known[key]

    def draw(self, x: Inputs) -> Draws:
        """One joint draw of all latent sites for a batch: the guide's, and those of the model alone."""
        guide, model = self.traces(x)
        return _values(model) | _values(guide)

    def at(self, x: Inputs, draws: Draws) -> Tensor:
        """Logits at one given draw, ``(1, batch, classes)``."""
        with own_params(), held_still(self.model), Given(draws):
            return self._answer(self.model(x.clone()), x).unsqueeze(0)

    def mean(self, x: Inputs) -> Tensor:
        """Logits with every latent site at the mean of the guide, ``(1, batch, classes)``."""
        with GLOBAL, Means():
            guide = self.trace(x)
            with own_params(), held_still(self.model), Given(_values(guide, plates=True)):
                return self._answer(self.model(x.clone(), _any_labels(x)), x).unsqueeze(0)

    @staticmethod
    def _answer(logits: Any, x: Inputs) -> Tensor:
        check_output(logits, len(x))
        return logits

    def log_prior(self, x: Inputs, draws: Draws) -> Draws:
        """Log density of every latent site of the model at given values of some, in nats, by site."""
        with own_params(), held_still(self.model), Given(draws):
            model = poutine.trace(self.model).get_trace(x.clone(), _any_labels(x))
        return {n: site["fn"].log_prob(site["value"]).sum() for n, site in random_sites(model).items()}

    def traces(self, x: Inputs) -> tuple[Trace, Trace]:
        """One run of the guide and one of the model at its values."""
        guide = self.trace(x)
        with own_params(), held_still(self.model), Given(_values(guide, plates=True)):
            return guide, poutine.trace(self.model).get_trace(x.clone(), _any_labels(x))

    def trace(self, x: Inputs) -> Trace:
        """One trace of the guide."""
        with own_params(), held_still(self.guide):
            return poutine.trace(self.guide).get_trace(x)

    def global_sites(self, x: Inputs) -> dict[str, bool]:
        """The model's latent sites outside the data plate: whether the guide has fitted each."""
        guide, model = self.traces(x)
        fitted = random_sites(guide)
        dim = _data_dim(model, len(x))
        sites = random_sites(model).items()
        return {name: name in fitted for name, site in sites if _batch_axis(site, dim, len(x)) is None}

    @torch.enable_grad()
    def hyper_parameters(self, x: Inputs) -> set[str]:
        """The latent sites that the prior of another one depends on."""
        drawn = _values(self.traces(x)[1])
        leaves = {name: value.detach().clone() for name, value in drawn.items()}
        leaves = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in leaves.items()}
        with own_params(), held_still(self.model), Given(leaves):
            model = poutine.trace(self.model).get_trace(x.clone(), _any_labels(x))
        found: set[str] = set()
        for name, site in random_sites(model).items():
            density = site["fn"].log_prob(site["value"].detach()).sum()
            others = {n: v for n, v in leaves.items() if v.requires_grad and n != name}
            if density.requires_grad and others:
                slopes = torch.autograd.grad(
                    density, list(others.values()), allow_unused=True, retain_graph=True
                )
                found |= {n for n, slope in zip(others, slopes, strict=True) if slope is not None}
        return found


@dataclass
class FrozenReplay:
    """`num_samples` fixed functions of the input, for a user's own pair.

    The guide is traced on one example per event shape; values inside the data plate are shared by
    the batch. A guide whose latent values depend on the input is refused: holding them while the
    input moves would hide the gradient.
    """

    engine: Replayed
    num_samples: int
    seed: int
    latents: dict[tuple[int, ...], list[dict[str, tuple[Tensor, int | None]]]] = field(default_factory=dict)

    stochastic = False
    runtime_attributes = ("latents",)  # which no fingerprint holds

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Tensor:
        """Logits of every member, ``(num_samples, batch, classes)``; the count is fixed."""
        members = []
        for latents in self.values(x):
            data = {name: _over_batch(value, axis, len(x)) for name, (value, axis) in latents.items()}
            members.append(self.engine.at(x, data))
        return torch.cat(members)

    def freeze(self, num_samples: int | None = None) -> "FrozenReplay":
        """Itself: it is frozen already."""
        return self

    def values(self, x: Inputs) -> list[dict[str, tuple[Tensor, int | None]]]:
        """Per member: each latent's value for one example and its batch axis (None if global)."""
        key = tuple(x.shape[1:])
        if key not in self.latents:
            self.latents[key] = []
            for member in range(self.num_samples):
                with forked(derive(self.seed, member), x.device):
                    self.latents[key].append(self._one(x[:1], check=member == 0))
        return self.latents[key]

    def _one(self, x: Inputs, check: bool) -> dict[str, tuple[Tensor, int | None]]:
        probe = x.detach().clone().requires_grad_(check)
        with torch.enable_grad():
            guide, model = self.engine.traces(probe)
            sites, dim = random_sites(model), _data_dim(model, len(x))
            for name, site in {**sites, **random_sites(guide)}.items() if check else ():
                _refuse_dependence(name, site, probe)
        return {
            name: (site["value"].detach(), _batch_axis(site, dim, len(x))) for name, site in sites.items()
        }


class Means(Messenger):
    """Puts every latent site at the mean of its distribution instead of sampling it."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or is_subsample(msg):
            return
        kind = type(msg["fn"]).__name__
        if getattr(msg["fn"].support, "is_discrete", False):
            raise ValueError(
                f"site {msg['name']!r} is discrete ({kind}), so its mean is not a value it can take; "
                "average draws instead of defense.mean()"
            )
        try:
            msg["value"] = msg["fn"].mean
        except NotImplementedError as error:
            raise ValueError(
                f"site {msg['name']!r} has no mean ({kind}); defense.mean() needs distributions with one"
            ) from error
        msg["done"] = True


def _unconstrained(value: Any) -> Any:
    """The parameter behind a param site: the value itself unless Pyro transformed it."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _values(trace: Trace, plates: bool = False) -> Draws:
    """The latent values of a trace, with the rows that its plates chose if asked for."""
    nodes: dict[str, Any] = dict(trace.nodes)
    rows = {n: s for n, s in nodes.items() if plates and s["type"] == "sample" and is_subsample(s)}
    return {name: site["value"] for name, site in {**random_sites(trace), **rows}.items()}


def _any_labels(x: Inputs) -> Labels:
    """Labels that mark what is observed, whatever they say."""
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _data_dim(model: Trace, batch: int) -> int:
    """The axis of the examples in the plates of the model, from the right."""
    sites = random_sites(model, observed=True).values()
    dims = [batch_dim(site, site["fn"].batch_shape, batch) for site in sites]
    return next((dim for dim in dims if dim is not None), -1)


def _batch_axis(site: Any, dim: int, batch: int) -> int | None:
    """Where the value of a site in a plate over the batch has the examples, from the right."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.dim == dim and frame.size in (batch, -1)]
    return dim - len(site["fn"].event_shape) if frames else None


def _over_batch(value: Tensor, axis: int | None, batch: int) -> Tensor:
    if axis is None:
        return value
    shape = list(value.shape)
    shape[axis] = batch
    return value.expand(shape)


def _refuse_dependence(name: str, site: Any, x: Tensor) -> None:
    """A value that depends on x, or, where values are drawn without a gradient, a density that does."""
    reparameterized = getattr(site["fn"], "has_rsample", False)
    made = site["value"] if reparameterized else site["fn"].log_prob(site["value"])
    if not made.requires_grad:
        return
    (gradient,) = torch.autograd.grad(made.sum(), x, allow_unused=True, retain_graph=True)
    if gradient is not None:
        raise ValueError(
            f"the value of site {name!r} depends on x, so freezing it would hide its gradient from an "
            "attack; sample standard noise and scale it in the model (out = x + scale(x) * eps)"
        )


def _refuse_rows(guide: nn.Module) -> None:
    """Refuses an autoguide with a posterior per example: each batch would get that of random others."""
    if not isinstance(guide, AutoGuide) or guide.create_plates is not None:
        return
    plates = [name for name, frame in guide._prototype_frames.items() if frame.full_size != frame.size]
    for name, site in guide.prototype_trace.nodes.items() if plates else ():
        if site["type"] == "sample" and any(frame.name in plates for frame in site["cond_indep_stack"]):
            raise ValueError(
                f"{type(guide).__name__} would fit one value of site {name!r} to every row of the plate "
                f"{plates[0]!r} and draw the rows at random; hide the site from it, so that it keeps its "
                "prior, write a guide for it, or say which rows a batch is with create_plates="
            )


def _warn_of_store(*modules: nn.Module) -> None:
    """Warns if Pyro's global store holds other values under the names of these modules' parameters."""
    store = pyro.get_param_store()
    found = []
    for module in modules:
        for name, parameter in module.named_parameters():
            key = join(getattr(module, "_pyro_name", ""), name.removesuffix("_unconstrained"))
            if key in store and not _equal(_unconstrained(store[key]), parameter):
                found.append(key)
    if found:
        warnings.warn(
            f"Pyro's parameter store holds other values of {', '.join(found)} than these modules, which a "
            "Defense does not read; call guide(x) and model(x) outside of it first, so that the modules "
            "take them over, or pyro.clear_param_store()",
            stacklevel=4,
        )


def _equal(stored: Tensor, own: Tensor) -> bool:
    return stored is own or (stored.shape == own.shape and bool((stored == own).all()))
