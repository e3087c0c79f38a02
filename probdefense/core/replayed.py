"""How a user's own Pyro model and guide draw: trace the guide, replay the model, one draw at a time.

The pair is ordinary Pyro and may do anything, so this is the general path; `Vectorized` is the fast
one. Parameters stay local to their modules (no global parameter store).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from probdefense.nn.passes import held_still
from probdefense.rng import derive, forked
from probdefense.types import Draws, Inputs, Labels, Step


@contextmanager
def own_params() -> Iterator[None]:
    """The parameter store is empty for the block and as it was afterwards: modules bring their own.

    So modules work whether or not they were made under ``module_local_params``.
    """
    with pyro.settings.context(module_local_params=False), pyro.get_param_store().scope():
        yield


class Replayed:
    """The drawing strategy for any other pair of Pyro modules."""

    stochastic = True

    def __init__(self, model: nn.Module, guide: nn.Module):
        self.model, self.guide = model, guide

    def prepare(self, example: Inputs | None) -> None:
        """Lets lazily made parameters come into being, and refuses a pair that fit could not train.

        Raises:
            ValueError: a guide that is lazy without an example, or parameters outside the modules.
        """
        if example is None:
            if isinstance(self.guide, AutoGuide) and self.guide.prototype_trace is None:
                raise ValueError(
                    f"{type(self.guide).__name__} makes its parameters on its first call, so there is "
                    "nothing to train yet; pass example=x, a batch of inputs"
                )
            return
        with torch.no_grad(), forked(0, example.device), held_still(self.model), own_params():
            try:
                trace = poutine.trace(self.guide).get_trace(example)
            except ValueError as error:
                raise ValueError(
                    f"the guide failed on the example: {error}; hide the labels from an autoguide, as "
                    "in AutoNormal(poutine.block(model, hide=['y']))"
                ) from error
        self._refuse_loose(trace)

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

    def logits(self, x: Inputs, num_samples: int, chunk_size: int | None, backend: str) -> Tensor:
        """Logits of fresh draws, ``(samples, batch, classes)``."""
        return torch.stack([self._replay(x, self.trace(x)) for _ in range(num_samples)])

    def freeze(self, num_samples: int, seed: int, ids: Tensor | None = None) -> "FrozenReplay":
        """`num_samples` functions whose latent values are drawn from `seed`."""
        return FrozenReplay(self, num_samples, seed)

    def step(self, x: Inputs, y: Labels, draws: Draws | None) -> Step:
        """One training forward: fresh draws (or the given ones), log-likelihood and KL by site."""
        with own_params():
            guide = self.guide if draws is None else poutine.condition(self.guide, data=draws)
            guide_trace = poutine.trace(guide).get_trace(x, y)
            given = _latents(guide_trace, observed=draws is not None)
            values = {**(draws or {}), **{name: site["value"] for name, site in given.items()}}
            model = poutine.condition(self.model, data=values)
            model_trace = poutine.trace(model).get_trace(x, y)
        observed = _observed(model_trace, values)
        terms = [_per_example(site, site["fn"].log_prob(site["value"]), len(x)) for site in observed]
        log_lik = torch.stack(terms).sum(0)
        kl = {name: _kl(site, model_trace) for name, site in given.items()}
        logits: Any = model_trace.nodes["_RETURN"]["value"]
        return Step(logits, log_lik, {n: v for n, v in kl.items() if v is not None}, values)

    def draw(self, x: Inputs) -> Draws:
        """One joint draw of all latent sites for a batch, those that only the model has included."""
        return {name: site["value"] for name, site in self.latents(x).items()}

    def at(self, x: Inputs, draws: Draws) -> Tensor:
        """Logits at one given draw, ``(1, batch, classes)``."""
        with own_params(), held_still(self.model):
            return poutine.condition(self.model, data=draws)(x).unsqueeze(0)

    def mean(self, x: Inputs) -> Tensor:
        """Logits with every latent site at the mean of the guide, ``(1, batch, classes)``."""
        with own_params(), held_still(self.guide), MeanMessenger():
            trace = poutine.trace(self.guide).get_trace(x)
        with MeanMessenger():
            return self._replay(x, trace).unsqueeze(0)

    def latents(self, x: Inputs) -> dict[str, Any]:
        """The latent sites of one run of the model at one draw of the guide."""
        model = poutine.replay(self.model, trace=self.trace(x))
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # any labels: they mark what is observed
        with own_params(), held_still(self.model):
            return _latents(poutine.trace(model).get_trace(x, y))

    def trace(self, x: Inputs) -> Trace:
        """One trace of the guide."""
        with own_params(), held_still(self.guide):
            return poutine.trace(self.guide).get_trace(x)

    def num_data(self, x: Inputs, y: Labels) -> int:
        """The size of the data set, read off the plate around the observation."""
        with torch.no_grad(), forked(0), held_still(self.model), held_still(self.guide), own_params():
            guide_trace = self.trace(x)
            trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(x, y)
        for seen in (guide_trace, trace):
            self._refuse_loose(seen)
        sites = [s for s in trace.nodes.values() if s["type"] == "sample" and s["is_observed"]]
        scales = [float(s["scale"]) for s in sites if not _subsample(s)]
        return round(max(scales, default=1.0) * len(x))

    def _replay(self, x: Inputs, guide_trace: Trace) -> Tensor:
        with own_params(), held_still(self.model):
            return poutine.replay(self.model, trace=guide_trace)(x)


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
            sites = self.engine.latents(probe)
            for name, site in sites.items() if check else ():
                _refuse_dependence(name, site["value"], probe)
        return {name: (site["value"].detach(), _batch_axis(site)) for name, site in sites.items()}


class MeanMessenger(Messenger):
    """Puts every continuous latent site at the mean of its distribution instead of sampling it."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or _subsample(msg) or msg["fn"].support.is_discrete:
            return
        try:
            msg["value"] = msg["fn"].mean
        except NotImplementedError as error:
            raise ValueError(
                f"site {msg['name']!r} has no mean ({type(msg['fn']).__name__}); "
                "defense.mean() needs guide distributions with one"
            ) from error
        msg["done"] = True


def _unconstrained(value: Any) -> Any:
    """The parameter behind a param site: the value itself unless Pyro transformed it."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _subsample(site: Any) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _latents(trace: Trace, observed: bool = False) -> dict[str, Any]:
    """Latent sites of a guide trace; `observed` counts conditioned ones too."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not _subsample(site) and (observed or not site["is_observed"])
    }


def _observed(trace: Trace, given: dict[str, Any]) -> list[Any]:
    sites = [s for s in _latents(trace, observed=True).values() if s["is_observed"]]
    sites = [site for site in sites if site["name"] not in given]
    if not sites:
        raise ValueError(
            "the model observed nothing; expected model(x, y) to sample one site with obs=y inside "
            "a pyro.plate(size=num_data, subsample=x)"
        )
    return sites


def _per_example(site: Any, log_prob: Tensor, batch: int) -> Tensor:
    if log_prob.shape != (batch,):
        raise ValueError(
            f"expected one log-likelihood per example ({batch},) at site {site['name']!r}, got "
            f"{tuple(log_prob.shape)}; put the observation in a pyro.plate over the batch"
        )
    return log_prob


def _kl(site: Any, model_trace: Trace) -> Tensor | None:
    """KL of one latent site for the whole data set; None where it is masked or auxiliary."""
    prior: Any = model_trace.nodes.get(site["name"])
    if prior is None:  # auxiliary sites of autoguides carry log q alone
        return (_weighted(site, site["fn"].log_prob(site["value"]))).sum()
    if site["mask"] is False and prior["mask"] is False:
        return None
    if not isinstance(site["fn"], dist.Delta):  # an autoguide's density may hold a Jacobian
        with suppress(NotImplementedError):
            return _weighted(site, kl_divergence(site["fn"], prior["fn"])).sum()
    q = _weighted(site, site["fn"].log_prob(site["value"])).sum()
    return q - _weighted(prior, prior["fn"].log_prob(site["value"])).sum()


def _weighted(site: Any, log_prob: Tensor) -> Tensor:
    mask = site["mask"]
    log_prob = log_prob if mask is None else torch.where(torch.as_tensor(mask), log_prob, 0.0)
    return site["scale"] * log_prob


def _batch_axis(site: Any) -> int | None:
    """Where the value of a site in a plate over one example has that example, from the right."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    if not frames:
        return None
    return frames[-1].dim - len(site["fn"].event_shape)


def _over_batch(value: Tensor, axis: int | None, batch: int) -> Tensor:
    if axis is None:
        return value
    shape = list(value.shape)
    shape[axis] = batch
    return value.expand(shape)


def _refuse_dependence(name: str, value: Tensor, x: Tensor) -> None:
    if not value.requires_grad:
        return
    (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True, retain_graph=True)
    if gradient is not None:
        raise ValueError(
            f"the value of site {name!r} depends on x, so freezing it would hide its gradient from an "
            "attack; sample standard noise and scale it in the model (out = x + scale(x) * eps)"
        )
