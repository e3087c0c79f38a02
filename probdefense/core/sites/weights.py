r"""Random parameters: one flat vector per pair of families, seen by the network as named views."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core.families import Fixed, MeanField, MultiplicativeLogNormal, filled
from probdefense.core.joint import Joint, allows_all, fits, is_nested, joint_shape
from probdefense.core.low_rank import LowRank
from probdefense.core.priors import LayerScales
from probdefense.core.sites.scales import ScaleSite
from probdefense.core.sites.site import EMPTY, Site, unused
from probdefense.validation import check_function, check_kind, kind_of

Prior = Distribution | LayerScales | Callable[[str, Tensor], Distribution | LayerScales | None] | None
"""One distribution for every element, one with scales of its own, one by name, or None: no prior, no KL."""

Where = Callable[[str, Tensor], bool]
"""Which parameters, by name and value."""

Member = tuple[tuple[str, ...], nn.Parameter, Any]
"""A parameter with all its names and its prior."""

Family = type[Distribution] | Callable[[str, Tensor], type[Distribution]]
"""The posterior of every parameter: a class of ``(loc, scale)`` with mean ``loc``, or one by name."""


@dataclass(frozen=True, eq=False)
class WeightSite(Site):
    """A flat vector that holds parameters of the network; tied parameters share their elements."""

    names: tuple[tuple[str, ...], ...] = ()
    shapes: tuple[torch.Size, ...] = ()
    scaled_by: str = ""
    estimator: str = "weights"

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Per-parameter views of a flat vector ``(..., D)``, one name per parameter."""
        # One split, never slices: the backward of S slices costs S times the whole vector.
        parts = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        leading = flat.shape[:-1]
        return {
            names[0]: part if part.shape == leading + shape else part.reshape(leading + shape)
            for names, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def random_rows(self, net: nn.Module) -> dict[str, list[int]]:
        """Of parameters that are random in part alone, the rows that are."""
        return {}

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every element under the posterior, ``(D,)`` each."""
        q = filled(self.distribution("posterior"), (self.size,))
        return q.mean, q.variance

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        views = self.views(value)
        return {name: views[names[0]] for names in self.names for name in names}


def flat_weights(
    net: nn.Module,
    *,
    prior: Prior,
    init_scale: float,
    where: Where | None = None,
    family: Family = dist.Normal,
    floor: float = 0.0,
    ceiling: float | None = None,
    rank: int = 0,
    layout: str = "flat",
    taken: Iterable[str] = (),
) -> list[Site]:
    """Moves parameters out of `net` into flat sites, one per pair of families (or one per tensor).

    The values become the posterior locations. Each parameter stays registered under its name, as None:
    there is nothing to copy, average, save or broadcast, and a draw is filled in by name.

    Raises:
        ValueError: no parameter was chosen, an unknown layout, or an infinite KL.
    """
    if not isinstance(layout, str) or layout not in ("flat", "per_tensor"):
        raise ValueError(f"expected layout 'flat' or 'per_tensor', got {layout!r}; choose one of them")
    if where is not None:
        check_function("where", where, "name", "tensor")
    chosen = _choose(net, where)
    groups: dict[object, list[Member]] = {}
    kinds: dict[object, type[Distribution]] = {}
    for names, parameter in chosen:
        p, kind = _prior_of(prior, names[0], parameter), _family_of(family, names[0], parameter)
        _refuse_zeros(kind, p, names[0], parameter)
        key = names[0] if layout == "per_tensor" else (_likeness(p, names[0]), kind)
        groups.setdefault(key, []).append((names, parameter, p))
        kinds[key] = kind
    sites: list[Site] = []
    used = set(taken)
    for group, members in groups.items():
        name = unused(members[0][0][0] if layout == "per_tensor" else "weights", used)
        used.add(name)
        loc = torch.cat([parameter.detach().flatten() for _, parameter, _ in members])
        if rank:
            posterior: nn.Module = LowRank(loc, init_scale, rank, floor, ceiling)
        else:
            posterior = MeanField(loc, init_scale, kinds[group], floor, ceiling)
        sites += _with_scales(name, members, posterior, loc, used)
    for names, _ in chosen:
        for parameter_name in names:
            take_out(net, parameter_name)
    return sites


def _with_scales(
    name: str, members: list[Member], posterior: nn.Module, loc: Tensor, used: set[str]
) -> list[Site]:
    """The site of one flat vector, after that of the scales that its prior depends on, if it does."""
    prior = members[0][2]
    about: dict[str, Any] = {
        "names": tuple(names for names, _, _ in members),
        "shapes": tuple(parameter.shape for _, parameter, _ in members),
    }
    if not isinstance(prior, LayerScales):
        joined = _joined_prior([(p, parameter.shape) for _, parameter, p in members], loc)
        return [WeightSite(name, joined, posterior, **about)]
    scales = prior.prior([n[0] for n, _, _ in members], [p.numel() for _, p, _ in members], loc)
    sides = prior.sides(scales, loc)
    if sides is None:
        return [WeightSite(name, scales, posterior, **about)]
    above = unused(f"{name}_scale", used)
    used.add(above)
    return [
        ScaleSite(above, *sides, layers=tuple(scales.layers)),
        WeightSite(name, scales, posterior, scaled_by=above, **about),
    ]


def _prior_of(prior: Any, name: str, parameter: Tensor) -> Any:
    """The prior of a parameter, checked.

    Raises:
        TypeError: no distribution.
        ValueError: one of another shape, or that does not allow every real number.
    """
    given = prior is None or isinstance(prior, Distribution | LayerScales)
    if not given:
        check_function("prior", prior, "name", "tensor")
    found = prior if given else prior(name, parameter)
    if found is None or isinstance(found, LayerScales):
        return found
    check_kind(
        "prior", found, Distribution, "such as Normal(0.0, 1.0), a function of (name, tensor), or None"
    )
    if not fits(found, parameter.shape):
        raise ValueError(
            f"expected a prior of one element, or of shape {tuple(parameter.shape)} for {name}, got batch "
            f"shape {tuple(found.batch_shape)} and event shape {tuple(found.event_shape)}; give each "
            "parameter its own by prior=lambda name, tensor: ..."
        )
    if not allows_all(found):
        raise ValueError(
            f"expected a prior whose support is every real number, as that of the posterior, got {found}; "
            "the KL would be infinite: take Normal, Laplace or a mixture of them"
        )
    return found


def _family_of(family: Any, name: str, parameter: Tensor) -> type[Distribution]:
    """The posterior of a parameter, checked.

    Raises:
        TypeError: no class of distributions.
        ValueError: one without location and scale, or with another mean than its location.
    """
    kind = family
    if not isinstance(family, type):
        if isinstance(family, Distribution):
            raise TypeError(f"expected family as a class, got the distribution {family}; give type(family)")
        check_function("family", family, "name", "tensor")
        kind = family(name, parameter)
    if not isinstance(kind, type) or not issubclass(kind, Distribution):
        raise TypeError(f"expected family as a class of distributions, got {kind_of(kind)}; such as Normal")
    made: Any = kind
    if not {"loc", "scale"} <= set(made.arg_constraints):
        raise ValueError(
            f"expected a family of (loc, scale), got {kind.__name__}; take Normal, Laplace or "
            "MultiplicativeLogNormal"
        )
    one = torch.ones(())
    if not bool(made(one, one).mean == one):
        raise ValueError(
            f"expected a family with mean loc, got {kind.__name__}; take Normal, Laplace or "
            "MultiplicativeLogNormal"
        )
    return kind


def _likeness(prior: Any, name: str) -> object:
    """What priors must share to be one flat vector; nested ones of some shape stand alone."""
    if isinstance(prior, LayerScales):
        return prior
    if prior is None or not is_nested(prior):
        return type(prior)
    return (name, prior) if prior.batch_shape + prior.event_shape else id(prior)


def _choose(net: nn.Module, where: Where | None) -> list[tuple[tuple[str, ...], nn.Parameter]]:
    """Chosen parameters with all their names; by default all trained ones outside normalization layers."""
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

    def default(name: str, parameter: Tensor) -> bool:
        owner = net.get_submodule(name.rpartition(".")[0])
        fixed = isinstance(owner, normal) or getattr(owner, "noise_coefficients", False)
        return parameter.requires_grad and not fixed

    accept = where or default
    chosen = [(n, p) for p, n in names.items() if accept(n[0], p)]
    if not chosen:
        known = ", ".join(n[0] for n in itertools.islice(names.values(), 8)) or "(no parameters left)"
        frozen = bool(names) and not any(parameter.requires_grad for parameter in names)
        why = "; all of them are frozen (requires_grad=False), and only where= makes those random"
        raise ValueError(
            f"found that no parameter of {type(net).__name__} was "
            f"chosen{why if frozen and where is None else ''}; "
            f"expected where(name, tensor) to accept one of: {known}"
        )
    return chosen


def tied_names(net: nn.Module) -> dict[nn.Parameter, tuple[str, ...]]:
    """Every parameter with all the names it has in the network."""
    names: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names[parameter] = (*names.get(parameter, ()), name)
    return names


def _joined_prior(members: list[tuple[Any, torch.Size]], like: Tensor) -> nn.Module | None:
    """One flat prior for parameters that share a family; scalar if all elements share its numbers."""
    first = members[0][0]
    if first is None:
        return None
    if is_nested(first):
        return Joint(first, joint_shape(first, members[0][1], like.numel())).to(like)
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


def _refuse_zeros(kind: Any, prior: Any, name: str, parameter: Tensor) -> None:
    if kind is MultiplicativeLogNormal and prior is not None and not bool(parameter.all()):
        raise ValueError(
            f"{name} holds zeros, where multiplicative noise has an infinite KL; give it another family, "
            "as in family=lambda name, tensor: ..., or prior=None"
        )


def removed(sites: Iterable[Site]) -> dict[str, Tensor]:
    """The parameters that became random, by name, at their means: the network cannot run without them."""
    filled: dict[str, Tensor] = {}
    for site in sites:
        if isinstance(site, WeightSite) and not site.perturbs:
            filled |= site.fill(site.center().detach(), nn.Identity())
    return filled


def take_out(net: nn.Module, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    owner = net.get_submodule(path)
    setattr(owner, attribute, None)
    if isinstance(owner, nn.RNNBase) and _collect not in owner._forward_pre_hooks.values():
        owner.register_forward_pre_hook(_collect)
        owner.register_forward_hook(_let_go, always_call=True)


def _collect(layer: nn.Module, _: Any) -> None:
    """Recurrent layers read a list of their weights: it is made of what is filled in."""
    layer._init_flat_weights()  # type: ignore[operator]


def _let_go(layer: nn.Module, *_: Any) -> None:
    """The list would keep the last draw and its graph alive, and could not be copied."""
    empty: Any = [None] * len(layer._flat_weights)  # type: ignore[arg-type]
    layer._flat_weights, layer._flat_weight_refs = empty, empty
