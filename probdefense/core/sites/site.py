r"""`Site`: one random variable of a defense, with a prior, a posterior, and what a draw of it fills.

A site has a prior (the model's) and a posterior (the guide's). A *global* site is drawn once per
draw of the network, as one flat vector; a *local* site is drawn for every example, inside the data
plate.
"""

import itertools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core.families import Fixed, drawn, filled, mirrored
from probdefense.core.joint import copied

EMPTY: Mapping[str, Tensor] = {}


class Known:
    """A posterior whose numbers are computed already."""

    def __init__(self, distribution: Distribution):
        self.distribution = distribution

    def __call__(self) -> Distribution:
        """The distribution."""
        return self.distribution


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

    def distribution(self, of: str, given: Mapping[str, Tensor] = EMPTY) -> Distribution:
        """The distribution of the elements, ``of="prior"`` (model) or ``"posterior"`` (guide).

        A prior that depends on another site takes its value from `given`.
        """
        module = self.prior if of == "prior" else self.posterior
        module = module or self.prior or self.posterior
        assert module is not None, f"site {self.name} has neither prior nor posterior"
        above = given.get(getattr(self, "scaled_by", "")) if module is self.prior else None
        return module() if above is None else module(above)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Elements of the posterior, of a shape that ends in that of its distribution."""
        if self.posterior is None and isinstance(self.prior, Fixed) and self.prior.standard_normal:
            like = self.prior.get_buffer("loc")  # the numbers of rsample(), without its two extra passes
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
        return drawn(self.distribution("posterior"), shape, generator)

    def mirrored(self, value: Tensor) -> Tensor:
        """The value of the other draw of an antithetic pair."""
        return mirrored(self.distribution("posterior"), value)

    def known(self, copy: bool = False) -> "Site":
        """The site with its posterior computed once, and with `copy` as it is now whatever is trained."""
        if self.posterior is None:
            return self
        found = self.distribution("posterior")
        made: Any = Known(copied(found, lambda tensor: tensor.detach().clone()) if copy else found)
        return replace(self, posterior=made)

    def center(self) -> Tensor:
        """The value of a global site in the static base: the mean of the posterior."""
        return filled(self.distribution("posterior"), (self.size,)).mean

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        """The tensors of the network, by name, that a value stands for; `given` replaces those of `net`."""
        raise TypeError(f"site {self.name} does not say what it fills")


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


def unused(name: str, taken: Container[str]) -> str:
    """The name, or the first of ``name_1``, ``name_2``, ... that is not taken."""
    numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return next(candidate for candidate in numbered if candidate not in taken)


def join(path: str, name: str) -> str:
    """A name inside the module at `path`; the network itself has the empty path."""
    return f"{path}.{name}" if path else name
