"""Where the values of the sites come from: torch's global state, keys, or what was drawn before.

A stream gives the values of any draws and rows of one call. From keys they are the same whatever the
passes in which the call is computed, so a pass can be run again instead of being remembered.
"""

import itertools
from typing import Protocol

import torch
from torch import Tensor

from probdefense.core.programs import Model
from probdefense.core.sites import MemberSite, Site
from probdefense.rng import keyed, mixed
from probdefense.types import Draws, Inputs

TILE = 32
"""Rows of a call whose noise has one key."""


class Stream(Protocol):
    """The values of a call: of global sites ``(draws, D)``, of local ones ``(draws, rows, *event)``."""

    @property
    def repeats(self) -> bool:
        """Whether the same values can be had again."""
        ...

    def weights(self, draws: range) -> Draws:
        """The values of the global sites."""
        ...

    def noise(self, x: Inputs, draws: range, rows: range) -> Draws:
        """The values of the local sites for the rows `x` of the call, or one row that they share."""
        ...


class Fresh:
    """Values from torch's global state, in the order in which they are asked for."""

    repeats = False

    def __init__(self, model: Model, num_samples: int):
        self.model = model
        chosen = [site for site in model.global_sites if isinstance(site, MemberSite)]
        self.members = {site.name: site.draw((num_samples, site.size)) for site in chosen}

    def weights(self, draws: range) -> Draws:
        """Drawn now; a choice of members was made for the whole call."""
        return {
            site.name: self.members[site.name][draws.start : draws.stop]
            if site.name in self.members
            else site.draw((len(draws), site.size))
            for site in self.model.global_sites
        }

    def noise(self, x: Inputs, draws: range, rows: range) -> Draws:
        """Drawn now."""
        shape = (len(draws), len(rows))
        return {use.name: use.site.draw((*shape, *use.shape)) for use in self.model.uses(x)}


class Keys:
    """Values that belong to (seed, draw, tile of rows); those of weights to (seed, draw).

    Args:
        model: Whose sites.
        seed: Of the call.
        num_samples: Draws of the call.
        ids: Numbers of the rows, ``(batch,)``.
        whole: Whether tiles are drawn whole, so that a row's values depend on no other row; else the last
            one ends with the call.
    """

    repeats = True

    def __init__(self, model: Model, seed: int, num_samples: int, ids: Tensor, whole: bool = False):
        self.model, self.seed, self.num_samples, self.ids = model, seed, num_samples, ids
        self.end = None if whole else len(ids)

    def weights(self, draws: range) -> Draws:
        """Each draw from its own key; a choice of members from the key of the call."""
        found: dict[str, list[Tensor]] = {site.name: [] for site in self.model.global_sites}
        with torch.no_grad():
            for draw in draws:
                generator = keyed(mixed(self.seed, draw, 0), self.ids.device)
                for site in self.model.global_sites:
                    found[site.name].append(self._value(site, draw, generator))
        return {name: torch.stack(values) for name, values in found.items()}

    def _value(self, site: Site, draw: int, generator: torch.Generator) -> Tensor:
        if isinstance(site, MemberSite):
            return site.draw((self.num_samples, 1), keyed(self.seed, torch.device("cpu")))[draw]
        return site.draw((site.size,), generator)

    def noise(self, x: Inputs, draws: range, rows: range) -> Draws:
        """Each tile of each draw from its own key."""
        uses, ids = self.model.uses(x), self.ids[rows.start : rows.stop]
        if not uses:
            return {}
        tiles, of_row = (ids // TILE).unique(return_inverse=True)
        found: dict[str, list[Tensor]] = {use.name: [] for use in uses}
        with torch.no_grad():
            for draw, tile in itertools.product(draws, tiles.tolist()):
                generator = keyed(mixed(self.seed, draw, tile + 1), ids.device)
                count = TILE if self.end is None else min(TILE, self.end - tile * TILE)
                for use in uses:
                    found[use.name].append(use.site.draw((count, *use.shape), generator))
        place = of_row * TILE + ids % TILE  # a tile that ends early is the last
        values = {name: torch.cat(parts).unflatten(0, (len(draws), -1)) for name, parts in found.items()}
        if torch.equal(place, torch.arange(values[uses[0].name].shape[1], device=place.device)):
            return values
        return {name: value.index_select(1, place) for name, value in values.items()}
