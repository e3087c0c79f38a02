r"""Our model and guide: ordinary Pyro programs that draw all sites first and then call the network.

$$ p(y, \theta, \varepsilon \mid x) = p(\theta)
   \prod_i p(\varepsilon_i) \, \mathrm{Cat}(y_i \mid f_{\theta,\varepsilon_i}(x_i)) $$

Both sample in one order and through one function, so a seed means the same draw on either side. The
guide never runs the network: the event shapes of local sites come from one pass without arithmetic.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

from probdefense.core.compiled import Compiled
from probdefense.core.sites import NoiseSite, Site, removed, unique_names
from probdefense.core.sites.site import EMPTY
from probdefense.nn.passes import execution_order, explained, held_still, swapped
from probdefense.nn.placeholder import placeholders
from probdefense.rng import GLOBAL, keyed
from probdefense.types import Draws, Inputs, Labels
from probdefense.validation import check_output


class Turn:
    """A re-entrant lock of a module: while one thread runs it, its tensors and modes are swapped in place.

    A copy of the module gets a lock of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()


class Use(NamedTuple):
    """One use of a local site in a forward pass: its Pyro name, event shape and target buffer."""

    name: str
    site: Site
    shape: torch.Size
    buffer: str


class Sizes(NamedTuple):
    """Bytes of one image: what its graph keeps for the backward pass, and the widest layer of it."""

    graph: int
    widest: int


class Model(nn.Module):
    """The generative side: the network, the priors, and the plate over the data set."""

    def __init__(self, net: nn.Module, sites: list[Site], num_data: int | None):
        super().__init__()
        self.net, self.num_data, self.turn = net, num_data, Turn()
        self.sites = dict(unique_names(sites))
        self.holes = placeholders(net)
        self.priors = nn.ModuleDict({_key(s): s.prior for s in sites if s.prior is not None})
        self.generator: torch.Generator | None = None  # of random weights, see `weights_from`
        self._uses: dict[tuple[int, ...], list[Use]] = {}
        self.compiled: Compiled | None = None
        self.sizes: dict[tuple[int, ...], Sizes] = {}  # of one image, by shape

    @contextmanager
    def weights_from(self, seed: int, device: torch.device) -> Iterator[None]:
        """Inside the block a draw takes random weights from `seed`, and all else as ever."""
        self.generator = keyed(seed, device)
        try:
            yield
        finally:
            self.generator = None

    @property
    def global_sites(self) -> list[Site]:
        """Sites drawn once per draw of the network."""
        return [site for site in self.sites.values() if not site.local]

    def uses(self, x: Inputs) -> list[Use]:
        """Local sites in the order in which the network meets them, for inputs like `x`."""
        key = tuple(x.shape[1:])
        if key not in self._uses:
            with GLOBAL, self.turn:  # in this order everywhere; the network runs seeded
                self._uses[key] = self._find_uses(x) if self.holes else []
        return self._uses[key]

    def _find_uses(self, x: Inputs) -> list[Use]:
        by_path = {site.path: site for site in self.sites.values() if isinstance(site, NoiseSite)}
        uses = []
        met = execution_order(self.net, x, removed(self.sites.values()))
        if idle := by_path.keys() - {path for path, _, _ in met}:
            raise ValueError(
                f"the noise of site {', '.join(sorted(by_path[path].name for path in idle))} never acts: its "
                f"layer does not run on inputs {tuple(x.shape)} in evaluation mode; leave it out of the "
                "defense (where=), or build it with example=x"
            )
        for path, use, shape in met:
            site = by_path[path]
            name = site.name if use == 0 else f"{site.name}.{use}"
            buffer = self.holes[path].buffer_name(use)
            uses.append(Use(name, site, shape, f"{path}.{buffer}"))
        return uses

    def fill(self, x: Inputs, values: Draws, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of the network, by name, that the values of the sites stand for, over `state`."""
        tensors = dict(state or {})
        for site in sorted(self.global_sites, key=lambda site: site.perturbs):
            tensors.update(site.fill(values[site.name], self.net, tensors))
        tensors.update({use.buffer: values[use.name] for use in self.uses(x)})
        return tensors

    def logits(
        self, x: Inputs, values: Draws, *, still: bool = True, state: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The network as a pure function of (values, x): ``(batch, classes)``.

        With `still`, all but the sites behaves as in ``eval()``; `state` replaces parameters.
        """
        tensors = self.fill(x, values, state)
        with self.turn, held_still(self.net) if still else nullcontext(), explained(x):
            for hole in self.holes.values():
                hole.uses = 0
            copied = x.clone()  # networks may work in place, and x is the caller's
            if self.compiled is not None:
                logits = self.compiled(self.net, tensors, copied)
            else:
                with swapped(self.net, tensors):
                    logits = self.net(copied)
        check_output(logits, len(x))
        return logits

    def forward(self, x: Inputs, y: Labels | None = None) -> Tensor:
        """Samples every site from its prior and observes `y`; returns logits ``(batch, classes)``."""
        announce(self, "model")
        plate = data_plate(self, x, y)
        values = sample_sites(self, x, "prior", plate)
        logits = self.logits(x, values, still=y is None)
        with plate:
            pyro.sample("y", dist.Categorical(logits=logits, validate_args=False), obs=y)
        return logits


class Guide(nn.Module):
    """The variational side: the posteriors. It reads event shapes from the model and nothing else."""

    def __init__(self, model: Model):
        super().__init__()
        self.posteriors = nn.ModuleDict(
            {_key(s): s.posterior for s in model.sites.values() if s.posterior is not None}
        )
        self._model = (model,)  # in a tuple: the network belongs to the model, not to the guide

    def forward(self, x: Inputs, y: Labels | None = None) -> Draws:
        """Samples every site from its posterior."""
        announce(self, "guide")
        model = self._model[0]
        return sample_sites(model, x, "posterior", data_plate(model, x, y))


def sample_sites(model: Model, x: Inputs, of: str, plate: pyro.plate) -> Draws:
    """Samples all sites, global ones first, from the side named by `of`: the one code path."""
    values: Draws = {}
    for site in model.global_sites:
        distribution = vector(site, of, values)
        with _masked(site):
            value = pyro.sample(site.name, distribution)
        values[site.name] = value.reshape(distribution.event_shape)  # Predictive adds axes of size 1
    with plate:
        for use in model.uses(x):
            with _masked(use.site):
                values[use.name] = pyro.sample(use.name, block(use, of, (len(x),)))
    return values


def vector(site: Site, of: str, given: Mapping[str, Tensor] = EMPTY) -> Any:
    """The joint distribution of a global site, one event; its prior may depend on `given` values."""
    found = site.distribution(of, given)
    return found if found.event_shape else dist.Independent(found.expand((site.size,)), 1)


def block(use: Use, of: str, rows: tuple[int, ...]) -> dist.Independent:
    """The joint distribution of one use of a local site, one event per row."""
    return dist.Independent(use.site.distribution(of).expand((*rows, *use.shape)), len(use.shape))


def data_plate(model: Model, x: Inputs, y: Labels | None = None) -> pyro.plate:
    """The plate over the data set, of which the batch is a sub-sample.

    Raises:
        ValueError: a labeled batch larger than the data set.
    """
    batch, size = len(x), model.num_data or len(x)
    if y is not None and batch > size:
        raise ValueError(
            f"expected a batch of at most num_data={size} labeled examples, got {batch}; "
            "build the defense with num_data=len(train_set)"
        )
    rows: Any = range(batch)
    return pyro.plate("data", size=max(size, batch), subsample=rows, dim=-1)


def announce(module: nn.Module, prefix: str) -> None:
    """Shows a module's parameters to Pyro as param sites, without the global parameter store.

    Plain modules are invisible to ``pyro.infer.SVI``, which collects the parameters to train from
    param messages. The message carries a view whose ``unconstrained()`` is the parameter itself.
    """
    if not am_i_wrapped():
        return
    for name, parameter in module.named_parameters():
        value = parameter.view_as(parameter)
        value.unconstrained = lambda parameter=parameter: parameter  # type: ignore[attr-defined]
        effectful(lambda value=value: value, type="param")(name=f"{prefix}.{name}")


def _key(site: Site) -> str:
    """A site name as a key of a ModuleDict, which may not contain dots."""
    return site.name.replace(".", "/")


def _masked(site: Site) -> AbstractContextManager[Any]:
    return poutine.mask(mask=False) if site.prior is None else nullcontext()
