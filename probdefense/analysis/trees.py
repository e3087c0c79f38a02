"""Containers of either version of ArviZ, put together from groups with named axes."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import probdefense
from probdefense.analysis.fits import Drawn, Named, random
from probdefense.analysis.pictures import groups_of
from probdefense.rng import derive, forked
from probdefense.types import Inputs, Labels
from probdefense.validation import check_classes, check_kind

DRAWN = ("posterior", "posterior_predictive", "prior", "prior_predictive")
"""Groups of draws."""

Groups = dict[str, dict[str, np.ndarray]]


class Names(NamedTuple):
    """What the caller calls things: coordinates by axis, and names of axes by variable."""

    coords: dict[str, list[Any]]
    dims: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        coords: Mapping[str, Sequence[Any]] | None,
        dims: Mapping[str, Sequence[str]] | None,
        class_names: Sequence[str] | None,
    ) -> "Names":
        """From the arguments of `to_arviz`."""
        check_kind("coords", coords or {}, Mapping, "give values by axis, as in {'example': file_names}")
        check_kind("dims", dims or {}, Mapping, "give names of axes by variable, as in {'weight': ['class']}")
        own = dict(coords or {}) | ({} if class_names is None else {"class": class_names})
        return cls({axis: [*v] for axis, v in own.items()}, {name: [*v] for name, v in (dims or {}).items()})


def from_groups(
    groups: Groups,
    *,
    coords: Mapping[str, Any],
    dims: Mapping[str, list[str]],
    pred_dims: Mapping[str, list[str]] | None = None,
) -> Any:
    """``arviz.from_dict`` under either of its two signatures; `pred_dims` are for the predictions."""
    import arviz

    from_dict: Any = arviz.from_dict
    named: dict[str, Any] = {"coords": coords, "dims": dims, "pred_dims": pred_dims, "pred_coords": coords}
    known = inspect.signature(from_dict).parameters
    if "data" in known:
        return from_dict(groups, **named)
    tree = from_dict(**{name: values for name, values in groups.items() if name in known}, **named)
    for name in groups.keys() - known:  # which 0.23 reads, and does not make
        tree.add_groups({name: groups[name]}, coords=coords, dims=dims)
    return tree


def predicted(
    log_probs: Tensor, data: tuple[Inputs, Labels], attacked: Mapping[float, Tensor], seed: int
) -> Named:
    """Groups of what draws say of the data, ``(chain, draw, batch, classes)``, and of attacked inputs."""
    x, y = data
    check_classes(y, log_probs.shape[-1])
    groups: Groups = {
        "posterior_predictive": predictive(log_probs, derive(seed, "labels")),
        "log_likelihood": {"y": at_labels(log_probs, y).numpy()},
        "observed_data": {"y": y.cpu().numpy()},
        "constant_data": {"x": x.detach().cpu().numpy()},
    }
    sizes: dict[str, Any] = {"example": np.arange(len(y)), "class": np.arange(log_probs.shape[-1])}
    if attacked:
        probs = torch.stack([*attacked.values()], dim=2).exp().float().numpy()
        groups["predictions"], sizes["eps"] = {"probs": probs}, [float(radius) for radius in attacked]
    return Named(groups, {"y": ["example"], "x": ["example"], "probs": ["example", "class"]}, sizes)  # type: ignore[arg-type]


PREDICTIONS = {"probs": ["eps", "example", "class"]}
"""Axes behind ``(chain, draw)`` in the group ``predictions``."""


def of_draws(drawn: Mapping[str, Sequence[Drawn]], y: Labels, names: Names) -> list[Any]:
    """A container by group, ``posterior`` first, of what varies by draw.

    Raises:
        ValueError: names of axes that do not fit.
    """
    found = {
        group: random(several, [at_labels(each.log_probs, y) for each in several])
        for group, several in drawn.items()
    }
    if unknown := names.dims.keys() - found["posterior"].values.keys():
        known = ", ".join(found["posterior"].values)
        raise ValueError(
            f"expected dims of variables of the posterior, got {sorted(unknown)}; known: {known}"
        )
    for named in found.values():
        for variable, axes in names.dims.items():
            known_values = named.values.get(variable)
            if known_values is not None and known_values.ndim - 2 != len(axes):
                raise ValueError(
                    f"expected {known_values.ndim - 2} names for the axes of {variable!r}, shape "
                    f"{known_values.shape[2:]}, got {axes}; name every axis behind (chain, draw)"
                )
            named.dims |= {variable: axes} if known_values is not None else {}
    return [placed({group: named.values}, named, names) for group, named in found.items()]


def placed(
    groups: Groups,
    named: Named,
    names: Names,
    pred_dims: Mapping[str, list[str]] | None = None,
) -> Any:
    """A container with the coordinates of the caller where they fit.

    Raises:
        ValueError: they do not.
    """
    sizes = {axis: len(values) for axis, values in named.coords.items()}
    for group, variables in groups.items():
        leading = 0 if group in ("observed_data", "constant_data") else 2
        for name, values in variables.items():
            axes = (pred_dims if group == "predictions" and pred_dims else named.dims).get(name, [])
            sizes |= dict(zip(axes, values.shape[leading:], strict=False))
    coords = names.coords
    for axis in coords.keys() & sizes:
        if len(coords[axis]) != sizes[axis]:
            raise ValueError(
                f"expected {sizes[axis]} coordinates of the axis {axis!r}, got {len(coords[axis])}; give one "
                "each"
            )
    own = {axis: values for axis, values in coords.items() if axis in sizes}
    return from_groups(groups, coords=named.coords | own, dims=named.dims, pred_dims=pred_dims)


def predictive(log_probs: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Probabilities and a sampled label of every draw."""
    with forked(seed):
        labels = torch.distributions.Categorical(logits=log_probs, validate_args=False).sample()
    return {"probs": log_probs.exp().float().numpy(), "y": labels.numpy()}


def at_labels(log_probs: Tensor, y: Labels) -> Tensor:
    """Log-probability of the true class, ``(..., batch)``."""
    return log_probs.gather(-1, y.cpu().expand(log_probs.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def whole(parts: Sequence[Any], names: Names, about: Mapping[str, Any]) -> Any:
    """One container of all groups, with what made it as attributes, of itself and of its groups of draws.

    Raises:
        ValueError: coordinates of an axis that no group has.
    """
    tree = parts[0]
    for part in parts[1:]:
        tree = joined(part, tree)
    axes = {str(axis) for group in groups_of(tree) for axis in tree[group].sizes}
    if unknown := names.coords.keys() - axes:
        raise ValueError(
            f"expected coordinates of axes of the container, got {sorted(unknown)}; known: "
            f"{', '.join(sorted(axes))}"
        )
    signature = {"library": "probdefense", "version": probdefense.__version__, **about}
    for place in (tree, *(tree[name] for name in groups_of(tree) & {*DRAWN})):
        place.attrs.update(signature)
    return tree


def joined(tree: Any, other: Any) -> Any:
    """One container with the groups of both."""
    if hasattr(tree, "extend"):
        tree.extend(other)
    else:
        tree.update(dict(other.children))
    return tree
