r"""What is random in a defense: priors, posteriors, and what a draw fills in the network.

A site has a prior (the model's) and a posterior (the guide's). A *global* site is drawn once per
draw of the network, as one flat vector; a *local* site is drawn for every example, inside the data
plate. The KL term of the ELBO is closed wherever the pair of families has a closed form.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from probdefense.core.families import Fixed, MeanField, MultiplicativeLogNormal
from probdefense.nn.members import ALL
from probdefense.nn.placeholder import placeholders

Prior = Distribution | Callable[[str, Tensor], Distribution | None] | None
"""One distribution for every element, one by parameter name, or None: no prior, no KL."""

Where = Callable[[str, Tensor], bool]
"""Which parameters, by name and value."""

Family = type[Distribution] | Callable[[str, Tensor], type[Distribution]]
"""The posterior of every parameter: a class of ``(loc, scale)`` with mean ``loc``, or one by name."""

EMPTY: Mapping[str, Tensor] = {}


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
    perturbs = False  # whether it changes parameters that are in the network, or that other sites fill

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
        distribution = self.distribution("posterior").expand(shape)
        return distribution.rsample() if distribution.has_rsample else distribution.sample()

    def center(self) -> Tensor:
        """The value of a global site in the static base: the mean of the posterior."""
        return self.distribution("posterior").expand((self.size,)).mean

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        """The tensors of the network, by name, that a value stands for; `given` replaces those of `net`."""
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

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        views = self.views(value)
        return {name: views[names[0]] for names in self.names for name in names}


@dataclass(frozen=True, eq=False)
class WeightNoiseSite(WeightSite):
    """Standard noise for parameters that stay trained in the network; `layer` beside each scales it."""

    layer: str = ""

    perturbs = True

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        filled: dict[str, Tensor] = {}
        for names, eps in zip(self.names, self.views(value).values(), strict=True):
            layer = join(names[0].rpartition(".")[0], self.layer)
            coefficients = {
                name: given.get(f"{layer}.{name}", parameter)
                for name, parameter in net.get_submodule(layer).named_parameters()
            }
            weight = given[names[0]] if names[0] in given else _tensor(net, names[0])
            noisy = functional_call(net.get_submodule(layer), coefficients, (weight, eps))
            filled |= dict.fromkeys(names, noisy)
        return filled


@dataclass(frozen=True, eq=False)
class MemberSite(Site):
    """Which of `count` networks answers, each equally often; `path` is the buffer that chooses."""

    path: str = ""
    count: int = 1

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Rounds through all members in random order: a multiple of `count` has each equally often."""
        rounds = [torch.randperm(self.count) for _ in range(0, shape[0], self.count)]
        return torch.cat(rounds)[: shape[0]].view(shape)

    def center(self) -> Tensor:
        return torch.tensor([ALL])

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        return {self.path: value.reshape(())}


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
    family: Family = dist.Normal,
    floor: float = 0.0,
    layout: str = "flat",
    taken: Iterable[str] = (),
) -> list[Site]:
    """Moves parameters out of `net` into flat sites, one per pair of families (or one per tensor).

    The values become the posterior locations. Each parameter leaves a placeholder buffer of its
    shape behind, under the same name.

    Raises:
        ValueError: no parameter was chosen, an unknown layout, or an infinite KL.
    """
    if layout not in ("flat", "per_tensor"):
        raise ValueError(f"expected layout 'flat' or 'per_tensor', got {layout!r}")
    chosen = _choose(net, where)
    groups: dict[object, list[tuple[tuple[str, ...], nn.Parameter, Distribution | None]]] = {}
    kinds: dict[object, type[Distribution]] = {}
    for names, parameter in chosen:
        p = prior if prior is None or isinstance(prior, Distribution) else prior(names[0], parameter)
        kind = family if isinstance(family, type) else family(names[0], parameter)
        _refuse_zeros(kind, p, names[0], parameter)
        key = names[0] if layout == "per_tensor" else (type(p), kind)
        groups.setdefault(key, []).append((names, parameter, p))
        kinds[key] = kind
    sites: list[Site] = []
    used = set(taken)
    for group, members in groups.items():
        name = unused(members[0][0][0] if layout == "per_tensor" else "weights", used)
        used.add(name)
        loc = torch.cat([parameter.detach().flatten() for _, parameter, _ in members])
        sites.append(
            WeightSite(
                name=name,
                prior=_joined_prior([(p, parameter.shape) for _, parameter, p in members], loc),
                posterior=MeanField(loc, init_scale, kinds[group], floor),
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
    names = tied_names(net)

    def default(name: str, _: Tensor) -> bool:
        owner = net.get_submodule(name.rpartition(".")[0])
        return not isinstance(owner, normal) and not getattr(owner, "noise_coefficients", False)

    accept = where or default
    chosen = [(n, p) for p, n in names.items() if accept(n[0], p)]
    if not chosen:
        known = ", ".join(n[0] for n in itertools.islice(names.values(), 8)) or "(no parameters left)"
        raise ValueError(
            f"no parameter of {type(net).__name__} was chosen; expected where(name, tensor) to accept "
            f"one of: {known}"
        )
    return chosen


def tied_names(net: nn.Module) -> dict[nn.Parameter, tuple[str, ...]]:
    """Every parameter with all the names it has in the network."""
    names: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names[parameter] = (*names.get(parameter, ()), name)
    return names


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


def _refuse_zeros(kind: Any, prior: Distribution | None, name: str, parameter: Tensor) -> None:
    if kind is MultiplicativeLogNormal and prior is not None and not bool(parameter.all()):
        raise ValueError(
            f"{name} holds zeros, where multiplicative noise has an infinite KL; give it another family, "
            "as in family=lambda name, tensor: ..., or prior=None"
        )


def _leave_placeholder(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    owner = net.get_submodule(path)
    del owner._parameters[attribute]
    hollow = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    owner.register_buffer(attribute, hollow, persistent=False)


def _tensor(net: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(net.get_submodule(path), attribute)


def join(path: str, name: str) -> str:
    """A name inside the module at `path`; the network itself has the empty path."""
    return f"{path}.{name}" if path else name


def unused(name: str, taken: Container[str]) -> str:
    """The name, or the first of ``name_1``, ``name_2``, ... that is not taken."""
    numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return next(candidate for candidate in numbered if candidate not in taken)


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
