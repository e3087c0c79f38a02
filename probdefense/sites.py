r"""What is random in a defense: families, priors, posteriors, and what a draw fills in the network.

A site has a prior (the model's) and a posterior (the guide's). A *global* site is drawn once per
draw of the network, as one flat vector; a *local* site is drawn for every example, inside the data
plate. The KL term of the ELBO is closed wherever the pair of families has a closed form.
"""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from probdefense.nn.placeholder import placeholders

Prior = Distribution | Callable[[str, Tensor], Distribution | None] | None
"""One distribution for every element, one by parameter name, or None: no prior, no KL."""

Where = Callable[[str, Tensor], bool]
"""Which parameters, by name and value."""


class Fixed(nn.Module):
    """A distribution without trained parameters, kept in buffers so that it moves with its module."""

    def __init__(self, distribution: Distribution):
        super().__init__()
        # The Pyro class of the same name, so that torch's own distributions may be given.
        self.kind: Any = getattr(dist, type(distribution).__name__, type(distribution))
        known = inspect.signature(self.kind.__init__).parameters
        self.names = [name for name in distribution.arg_constraints if name in known]
        if {"probs", "logits"} <= set(self.names):
            self.names.remove("probs" if "logits" in distribution.__dict__ else "logits")
        for name in self.names:
            self.register_buffer(name, torch.as_tensor(getattr(distribution, name)).detach().clone())
        values = [getattr(self, name).tolist() for name in self.names]
        self.standard_normal = self.kind is dist.Normal and values == [0.0, 1.0]

    def forward(self) -> Distribution:
        """The distribution, on the device where the module is."""
        return self.kind(**{name: getattr(self, name) for name in self.names}, validate_args=False)


class MeanField(nn.Module):
    r"""Independent elements with trained location and scale, $\sigma = \text{floor} + e^{\rho}$.

    Args:
        loc: Where the locations start, ``(D,)``.
        init_scale: Where every scale starts.
        family: A location-scale family, ``Normal`` or ``Laplace``.
        floor: The smallest scale.
    """

    def __init__(
        self,
        loc: Tensor,
        init_scale: float,
        family: Any = dist.Normal,
        floor: float = 0.0,
    ):
        super().__init__()
        self.kind, self.floor = family, floor
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(init_scale)))

    @property
    def scale(self) -> Tensor:
        """The current scales, ``(D,)``."""
        scale = self.log_scale.exp()
        return scale + self.floor if self.floor else scale

    def forward(self) -> Distribution:
        """The distribution of the flat vector, one element each."""
        return self.kind(self.loc, self.scale, validate_args=False)


class Spread(nn.Module):
    """A zero-mean posterior whose scale is a trained multiple of the standard prior's."""

    def __init__(self, shape: tuple[int, ...], family: Any = dist.Normal):
        super().__init__()
        self.kind = family
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Distribution:
        """The distribution of one element, batch shape that of the scale."""
        return self.kind(torch.zeros_like(self.log_scale), self.log_scale.exp(), validate_args=False)


@dataclass(frozen=True, eq=False)
class Site:
    """One random variable of a defense.

    Attributes:
        name: Its Pyro name.
        prior: Gives the model's distribution; None masks the site, in model and guide.
        posterior: Gives the guide's distribution; None says that it is the prior.
    """

    name: str
    prior: nn.Module | None
    posterior: nn.Module | None

    local = False

    @property
    def size(self) -> int:
        """The number of elements of a global site."""
        return 1

    def distribution(self, of: str) -> Distribution:
        """The distribution of the elements, ``of="prior"`` (model) or ``"posterior"`` (guide)."""
        module = self.prior if of == "prior" else self.posterior
        module = module or self.prior or self.posterior
        assert module is not None, f"site {self.name} has neither prior nor posterior"
        return module()

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Elements of the posterior, of a shape that ends in that of its distribution."""
        if self.posterior is None and isinstance(self.prior, Fixed) and self.prior.standard_normal:
            like = self.prior.get_buffer("loc")  # the numbers of rsample(), without its two extra passes
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        return self.distribution("posterior").expand(shape).rsample()

    def fill(self, value: Tensor, net: nn.Module) -> dict[str, Tensor]:
        """The tensors of the network, by name, that a value of the site stands for."""
        raise TypeError(f"site {self.name} does not say what it fills")


@dataclass(frozen=True, eq=False)
class WeightSite(Site):
    """A flat vector that holds parameters of the network; tied parameters share their elements."""

    names: tuple[tuple[str, ...], ...] = ()
    shapes: tuple[torch.Size, ...] = ()

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Per-parameter views of a flat vector ``(..., D)``, one name per parameter."""
        # One split, never slices: the backward of S slices costs S times the whole vector.
        parts = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        leading = flat.shape[:-1]
        return {
            names[0]: part.reshape(leading + shape)
            for names, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def fill(self, value: Tensor, net: nn.Module) -> dict[str, Tensor]:
        views = self.views(value)
        return {name: views[names[0]] for names in self.names for name in names}


@dataclass(frozen=True, eq=False)
class NoiseSite(Site):
    """The hole of a layer, filled anew for every example (and every use, if the layer is reused)."""

    path: str = ""

    local = True


def flat_weights(
    net: nn.Module,
    *,
    prior: Prior,
    init_scale: float,
    where: Where | None = None,
    family: Any = dist.Normal,
    floor: float = 0.0,
    layout: str = "flat",
    taken: Iterable[str] = (),
) -> list[Site]:
    """Moves parameters out of `net` into flat sites, one per prior family (or one per tensor).

    The values become the posterior locations. Each parameter leaves a placeholder buffer of its
    shape behind, under the same name.

    Raises:
        ValueError: no parameter was chosen, or an unknown layout.
    """
    if layout not in ("flat", "per_tensor"):
        raise ValueError(f"expected layout 'flat' or 'per_tensor', got {layout!r}")
    chosen = _choose(net, where)
    groups: dict[object, list[tuple[tuple[str, ...], nn.Parameter, Distribution | None]]] = {}
    for names, parameter in chosen:
        p = prior if prior is None or isinstance(prior, Distribution) else prior(names[0], parameter)
        key = names[0] if layout == "per_tensor" else type(p)
        groups.setdefault(key, []).append((names, parameter, p))
    sites: list[Site] = []
    used = set(taken)
    for members in groups.values():
        base = members[0][0][0] if layout == "per_tensor" else "weights"
        name = next(n for n in _numbered(base) if n not in used)
        used.add(name)
        loc = torch.cat([parameter.detach().flatten() for _, parameter, _ in members])
        sites.append(
            WeightSite(
                name=name,
                prior=_joined_prior([(p, parameter.shape) for _, parameter, p in members], loc),
                posterior=MeanField(loc, init_scale, family, floor),
                names=tuple(names for names, _, _ in members),
                shapes=tuple(parameter.shape for _, parameter, _ in members),
            )
        )
    for names, parameter in chosen:
        for parameter_name in names:
            _leave_placeholder(net, parameter_name, parameter)
    return sites


def noise_sites(net: nn.Module, sites: Iterable[Site] = ()) -> list[Site]:
    """A site with no posterior of its own for every hole of `net` that no given site fills."""
    covered = {site.path for site in sites if isinstance(site, NoiseSite)}
    return [
        NoiseSite(layer_name(path), prior=Fixed(hole.family).to(hole.value), posterior=None, path=path)
        for path, hole in placeholders(net).items()
        if path not in covered
    ]


def layer_name(path: str) -> str:
    """The name of the layer that owns a hole: ``conv1.noise.eps -> conv1.noise``."""
    return path.rpartition(".")[0] or path


def divergence(q: Distribution, p: Distribution, value: Tensor, name: str) -> Tensor:
    r"""Total $\mathrm{KL}(q \| p)$ over all elements: closed if known, else $\log q - \log p$ at `value`."""
    if type(q) is dist.Normal and type(p) is dist.Normal and p.scale.dim() == 0 and q.loc.dim() == 1:
        return _flat_normal_kl(q, p)
    try:
        return kl_divergence(q, p).sum()
    except NotImplementedError:
        warnings.warn(
            f"KL({type(q).__name__} || {type(p).__name__}) of site {name!r} has no closed form and is "
            "estimated from one draw; expect noise in the reported KL",
            stacklevel=2,
        )
        return (q.log_prob(value) - p.log_prob(value)).sum()


def _flat_normal_kl(q: Any, p: Any) -> Tensor:
    """KL of a long diagonal Normal from a shared scalar one, by sums that make no temporary."""
    loc = q.loc if p.loc == 0 else q.loc - p.loc
    squares = torch.dot(loc, loc) + torch.dot(q.scale, q.scale)
    logs = q.scale.log().sum() - q.loc.numel() * p.scale.log()
    return squares / (2 * p.scale**2) - logs - q.loc.numel() / 2


def _choose(net: nn.Module, where: Where | None) -> list[tuple[tuple[str, ...], nn.Parameter]]:
    """Chosen parameters with all their names; by default every one outside normalization layers."""
    normal = tuple(
        kind
        for kind in (
            nn.modules.batchnorm._NormBase,
            nn.GroupNorm,
            nn.LayerNorm,
            getattr(nn, "RMSNorm", nn.LayerNorm),
        )
    )
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)

    def default(name: str, _: Tensor) -> bool:
        owner = net.get_submodule(name.rpartition(".")[0])
        return not isinstance(owner, normal) and not getattr(owner, "noise_coefficients", False)

    accept = where or default
    chosen = [(tuple(n), p) for p, n in names.items() if accept(n[0], p)]
    if not chosen:
        known = ", ".join(n[0] for n in itertools.islice(names.values(), 8)) or "(no parameters left)"
        raise ValueError(
            f"no parameter of {type(net).__name__} was chosen; expected where(name, tensor) to accept "
            f"one of: {known}"
        )
    return chosen


def _joined_prior(members: list[tuple[Distribution | None, torch.Size]], like: Tensor) -> nn.Module | None:
    """One flat prior for parameters that share a family; scalar if all elements share its numbers."""
    first = members[0][0]
    if first is None:
        return None
    fixed = [Fixed(p) for p, _ in members if p is not None]
    joined = {}
    for name in fixed[0].names:
        values = [getattr(f, name) for f in fixed]
        if all(v.dim() == 0 for v in values) and all(bool(v == values[0]) for v in values):
            joined[name] = values[0]
        else:
            parts = zip(values, members, strict=True)
            joined[name] = torch.cat([v.expand(shape).flatten() for v, (_, shape) in parts])
    return Fixed(fixed[0].kind(**joined, validate_args=False)).to(like)


def _leave_placeholder(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    owner = net.get_submodule(path)
    del owner._parameters[attribute]
    hollow = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    owner.register_buffer(attribute, hollow, persistent=False)


def _numbered(name: str) -> Iterable[str]:
    return itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))


def unique_names(sites: Iterable[Site]) -> Mapping[str, Site]:
    """The sites by name.

    Raises:
        ValueError: two sites share a name.
    """
    by_name: dict[str, Site] = {}
    for site in sites:
        if site.name in by_name:
            raise ValueError(f"two sites are named {site.name!r}; expected unique names")
        by_name[site.name] = site
    return by_name
