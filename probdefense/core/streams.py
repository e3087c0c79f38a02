"""Where the values of the sites come from: torch's global state, keys, or what was drawn before.

A stream gives the values of any draws and rows of one call. From keys they are the same whatever the
passes in which the call is computed, so a pass can be run again instead of being remembered.
"""

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

from probdefense.core.programs import Model, Use
from probdefense.core.sites import MemberSite, Site
from probdefense.rng import derive, keyed, mixed
from probdefense.types import Draws, Inputs

TILE = 32
"""Rows of a call whose noise has one key."""

CACHE_BYTES = 2**26
"""Values of this size are kept instead of being drawn again."""


class Stream(Protocol):
    """The values of a call: of global sites ``(draws, D)``, of local ones ``(draws, rows, *event)``."""

    @property
    def repeats(self) -> bool:
        """Whether the same values can be had again."""
        ...

    @property
    def shared(self) -> bool:
        """Whether the noise of a draw is the same for all rows."""
        ...

    def weights(self, draws: range) -> Draws:
        """The values of the global sites."""
        ...

    def noise(self, x: Inputs, draws: range, rows: range) -> Draws:
        """The values of the local sites for the rows `x` of the call, or one row that they share."""
        ...


class Fresh:
    """Values from torch's global state, in the order in which they are asked for."""

    repeats = shared = False

    def __init__(self, model: Model, num_samples: int):
        self.model, self.sites = model, Posteriors()
        chosen = [site for site in model.global_sites if isinstance(site, MemberSite)]
        self.members = {site.name: site.draw((num_samples, site.size)) for site in chosen}

    def weights(self, draws: range) -> Draws:
        """Drawn now; a choice of members was made for the whole call."""
        return {
            site.name: self.members[site.name][draws.start : draws.stop]
            if site.name in self.members
            else self.sites.of(site).draw((len(draws), site.size))
            for site in self.model.global_sites
        }

    def noise(self, x: Inputs, draws: range, rows: range) -> Draws:
        """Drawn now."""
        shape = (len(draws), len(rows))
        return {use.name: self.sites.of(use.site).draw((*shape, *use.shape)) for use in self.model.uses(x)}


class Posteriors:
    """The posteriors of a call, each computed when it is first asked for, or copied now to stay as they are.

    Args:
        model: Whose posteriors are copied; None for none.
    """

    def __init__(self, model: Model | None = None):
        self.known: dict[str, Site] = {}
        for site in () if model is None else model.sites.values():
            self.known[site.name] = site.known(copy=True)

    def of(self, site: Site) -> Site:
        """The site with its posterior."""
        if site.name not in self.known:
            self.known[site.name] = site.known()
        return self.known[site.name]


class Keys:
    """Values that belong to (seed, draw, tile of rows); those of weights to (seed, draw).

    Args:
        model: Whose sites.
        seed: Of the call.
        num_samples: Draws of the call.
        ids: Numbers of the rows, ``(batch,)``; None for noise that all rows share.
        whole: Whether tiles are drawn whole, so that a row's values depend on no other row; else the last
            one ends with the call.
        device: Where values are drawn; that of `ids` by default.
        antithetic: Whether draws 2k and 2k + 1 share a key and differ in sign about the location, all sites
            jointly.
        frozen: Whether the posteriors are copied.
        trained: Whether values have gradients in the parameters.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        num_samples: int,
        ids: Tensor | None,
        whole: bool = False,
        *,
        device: torch.device | None = None,
        antithetic: bool = False,
        frozen: bool = False,
        trained: bool = False,
    ):
        self.model, self.seed, self.num_samples = model, seed, num_samples
        self.device = ids.device if device is None and ids is not None else torch.device(device or "cpu")
        self.ids = None if ids is None else ids.cpu()  # which tiles they are in is asked for every pass
        self.end = None if whole or ids is None else len(ids)
        self.repeats = not trained  # a pass that is run again gives no gradient of parameters
        self.antithetic, self.trained, self.shared = antithetic, trained, ids is None
        with self._tracked():
            self.sites = Posteriors(model if frozen else None)

    def weights(self, draws: range) -> Draws:
        """Each draw from its own key; a choice of members from the key of the call."""
        found: dict[str, list[Tensor]] = {site.name: [] for site in self.model.global_sites}
        with self._tracked():
            normal = self._normal()
            eps = {n: q.loc.new_empty((len(draws), len(q.loc))) for n, q in normal.items()}
            for row, draw in enumerate(draws):
                generator = self._generator(draw, 0)
                for site in self.model.global_sites:
                    if site.name in eps:  # in place, because many draws of small networks are all overhead
                        drawn = eps[site.name][row].normal_(generator=generator)
                        drawn = drawn.neg_() if self.antithetic and draw % 2 else drawn
                    else:
                        found[site.name].append(self._value(site, draw, generator))
            for name, q in normal.items():
                eps[name] = torch.addcmul(q.loc, q.scale, eps[name], out=eps[name])
        return {name: eps[name] if name in eps else _joined(values) for name, values in found.items()}

    def _normal(self) -> dict[str, Any]:
        """The posteriors of long vectors of independent normal numbers, where no gradient is asked for."""
        if torch.is_grad_enabled():
            return {}
        sites = [self.sites.of(site) for site in self.model.global_sites if type(site).draw is Site.draw]
        found = {site.name: site.distribution("posterior") for site in sites if site.posterior is not None}
        return {name: q for name, q in found.items() if type(q) is dist.Normal and q.loc.dim() == 1}

    def _value(self, site: Site, draw: int, generator: torch.Generator) -> Tensor:
        if isinstance(site, MemberSite):
            every = 2 if self.antithetic else 1
            rounds = keyed(derive(self.seed, "weights"), torch.device("cpu"))
            return site.draw((-(-self.num_samples // every), 1), rounds)[draw // every]
        return self._signed(self.sites.of(site), (site.size,), draw, generator)

    def noise(self, x: Inputs, draws: range, rows: range) -> Draws:
        """Each tile of each draw from its own key, or one row for all."""
        uses = self.model.uses(x)
        if not uses:
            return {}
        if self.ids is None:
            return self._tiles(uses, draws, [(0, 1)])
        ids = self.ids[rows.start : rows.stop]
        tiles, of_row = (ids // TILE).unique(return_inverse=True)
        numbers = tiles.tolist()
        counts = [TILE if self.end is None else min(TILE, self.end - tile * TILE) for tile in numbers]
        values = self._tiles(uses, draws, list(zip(numbers, counts, strict=True)) or [(0, 0)])
        place = of_row * TILE + ids % TILE  # a tile that ends early is the last
        if torch.equal(place, torch.arange(values[uses[0].name].shape[1], device=place.device)):
            return values
        return {name: value.index_select(1, place.to(self.device)) for name, value in values.items()}

    def _tiles(self, uses: list[Use], draws: range, tiles: list[tuple[int, int]]) -> Draws:
        """The noise of some tiles, each with its number of rows, ``(draws, rows, *event)``."""
        found: dict[str, list[Tensor]] = {use.name: [] for use in uses}
        with self._tracked():
            for draw, (tile, count) in itertools.product(draws, tiles):
                generator = self._generator(draw, tile + 1)
                for use in uses:
                    shape = (count, *use.shape)
                    found[use.name].append(self._signed(self.sites.of(use.site), shape, draw, generator))
        if len(draws) == len(tiles) == 1:
            return {name: parts[0].unsqueeze(0) for name, parts in found.items()}
        size = len(draws), sum(count for _, count in tiles)
        return {name: torch.cat(parts).unflatten(0, size) for name, parts in found.items()}

    def _signed(self, site: Site, shape: tuple[int, ...], draw: int, generator: torch.Generator) -> Tensor:
        value = site.draw(shape, generator)
        return site.mirrored(value) if self.antithetic and draw % 2 else value

    def _generator(self, draw: int, part: int) -> torch.Generator:
        return keyed(mixed(self.seed, draw // 2 if self.antithetic else draw, part), self.device)

    def _tracked(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.trained and torch.is_grad_enabled())


def _joined(values: list[Tensor]) -> Tensor:
    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)


class Cached:
    """A stream whose values are kept where all of them are small.

    Args:
        stream: Of a number of draws.
    """

    repeats = True
    runtime_attributes = ("kept",)  # which no fingerprint holds

    def __init__(self, stream: Keys):
        self.stream, self.shared = stream, stream.shared
        self.kept: dict[tuple[int, ...] | str, Draws] = {}

    def weights(self, draws: range) -> Draws:
        """Those of all draws are kept if they are small."""
        size = sum(site.size for site in self.stream.model.global_sites)
        return self._through("weights", size, draws, self.stream.weights, CACHE_BYTES)

    def noise(self, x: Inputs, draws: range, rows: range) -> Draws:
        """That of all draws is kept if it is small, by event shape and rows."""
        size = sum(use.shape.numel() for use in self.stream.model.uses(x))
        place = () if self.shared else (rows.start, rows.stop)
        size *= 1 if self.shared else len(rows)
        key, limit = (*place, *x.shape[1:]), CACHE_BYTES if self.shared else CACHE_BYTES // 4
        return self._through(key, size, draws, lambda every: self.stream.noise(x, every, rows), limit)

    def _through(
        self,
        key: tuple[int, ...] | str,
        size: int,
        draws: range,
        make: Callable[[range], Draws],
        limit: int,
    ) -> Draws:
        if 4 * size * self.stream.num_samples > limit:
            return make(draws)
        if key not in self.kept:
            self.kept[key] = make(range(self.stream.num_samples))
        return {name: value[draws.start : draws.stop] for name, value in self.kept[key].items()}
