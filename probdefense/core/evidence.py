r"""From a trace of a user's guide and one of the model to the terms of Pyro's ELBO.

$$ \mathcal{L} = \sum_i s_i m_i \log p(y_i \mid x_i, z) - \sum_f \big(\log q(z_f) - \log p(z_f)\big) $$

Scales $s$ and masks $m$ are Pyro's. What is observed per example is a log-likelihood; factors and
observations of the whole data set stand among the KL terms, with their sign. Sites without a
reparameterization (discrete ones) add a score term, zero in value: the gradient of a cost $c$ gets
$c \, \nabla \log q(z)$, for the costs that come after the site, row by row of shared plates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from probdefense.types import JOINT, Draws

Site = Mapping[str, Any]
"""A node of a trace, as Pyro recorded it."""

Sites = dict[str, Any]

Structure = Mapping[str, frozenset[str]]
"""By site of a guide, the other sites that its density is made of."""


class Evidence(NamedTuple):
    """The terms of one run, as in `Step`, and the size of the data set that the plate states."""

    log_lik: Tensor
    kl: dict[str, Tensor]
    score: Tensor | None
    num_data: int


@dataclass(frozen=True)
class Cost:
    """One term of the negative ELBO by rows of plates; of an `exact` one no own site needs a score."""

    sites: list[str]
    terms: MultiFrameTensor
    exact: bool = False

    @property
    def name(self) -> str:
        """Its sites in one word."""
        return JOINT.join(self.sites)


class Given(Messenger):
    """Puts sites at given values, which stay latent (conditioning would make them observed)."""

    def __init__(self, values: Draws):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Parents(Messenger):
    """Marks every value with the name of its site, so that a density tells what it is made of."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_subsample(msg) and not msg["is_observed"]:
            msg["value"] = track_provenance(detach_provenance(msg["value"]), frozenset({msg["name"]}))


def is_subsample(site: Site) -> bool:
    """Whether a site is a plate's choice of rows."""
    return type(site["fn"]).__name__ == "_Subsample"


def random_sites(trace: Trace, observed: bool = False) -> Sites:
    """The latent (or the observed) sites of a trace; what is deterministic is neither."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not is_subsample(site)
        and not site["infer"].get("_deterministic")
        and site["is_observed"] == observed
    }


def batch_dim(site: Site, shape: torch.Size, batch: int) -> int | None:
    """The axis of a density, from the right, that runs over the examples; None if none does."""
    sizes = {frame.dim: _size(frame) for frame in _frames(site)}
    if not sizes and tuple(shape) == (batch,):
        return -1  # a batch without a plate is all the data there is
    fitting = [dim for dim in sizes if len(shape) >= -dim and shape[dim] == batch]
    return max(fitting, key=lambda dim: (sizes[dim], dim), default=None)


def made_of(guide: Trace) -> Structure:
    """The sites whose values the density of each site of a guide is made of, directly.

    Args:
        guide: Traced under `Parents`.
    """
    sites = random_sites(guide) | random_sites(guide, observed=True)
    return {name: get_provenance(site["fn"].log_prob(site["value"])) - {name} for name, site in sites.items()}


def evidence(model: Trace, guide: Trace, parents: Structure, batch: int) -> Evidence:
    """The terms of the ELBO of one draw.

    Args:
        model: Of ``model(x, y)`` at the values of the guide.
        guide: Of ``guide(x, y)``.
        parents: What the guide's sites are made of.
        batch: Number of examples.

    Raises:
        ValueError: nothing is observed per example, more examples than the plate has, a site to be
            enumerated, or one of the guide that the model lacks.
    """
    latent, observed = random_sites(model), random_sites(model, observed=True)
    _refuse_enumerated(latent, guide)
    _refuse_strangers(latent, guide)
    log_probs = {name: _log_prob(site) for name, site in observed.items()}
    dims = {name: batch_dim(site, log_probs[name].shape, batch) for name, site in observed.items()}
    rows = {name: dim for name, dim in dims.items() if dim is not None}
    _refuse_unobserved(log_probs, rows, batch)
    num_data = max(_full_size(observed[name], dim, batch) for name, dim in rows.items())
    _refuse_small(num_data, list(rows), batch)
    log_lik = torch.stack([_over_rows(log_probs[name], dim) for name, dim in rows.items()]).sum(0)
    log_lik = log_lik * (batch / num_data)
    costs = _divergences(latent, guide, parents)
    for name in observed:
        if name not in rows:
            costs.append(Cost([name], MultiFrameTensor(_by_plate(observed[name], -log_probs[name]))))
    scores = _scores(latent, guide)
    kl = {cost.name: _expected(cost, scores, list(model.nodes), guide) for cost in costs}
    if not scores:
        return Evidence(log_lik, kl, None, num_data)
    plates = [frame for name, dim in rows.items() for frame in _frames(observed[name]) if frame.dim == dim]
    score = torch.as_tensor(MultiFrameTensor(*scores.values()).sum_to(plates))
    score = score.reshape(-1).expand(batch)
    return Evidence(log_lik + log_lik.detach() * score, kl, score, num_data)


def _refuse_strangers(latent: Sites, guide: Trace) -> None:
    """A site of the guide alone is most often a misspelled one, whose namesake would keep its prior."""
    for name, site in random_sites(guide).items():
        if name not in latent and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"expected the sites of the guide in the model, got {name!r}, which it lacks; the model has "
                f"{', '.join(map(repr, latent)) or 'none'}: spell it alike, or, if it is meant, sample it "
                "with infer={'is_auxiliary': True}"
            )


def _divergences(latent: Sites, guide: Trace, parents: Structure) -> list[Cost]:
    """log q - log p by groups of guide sites that share a density, closed where both have a form."""
    sites = random_sites(guide) | random_sites(guide, observed=True)
    costs: list[Cost] = []
    for group in _groups(parents, latent):
        pairs = [(sites[name], latent.get(name)) for name in group]
        if all(q["mask"] is False and (p is None or p["mask"] is False) for q, p in pairs):
            continue
        terms = _closed(group, sites, latent, parents)
        exact = terms is not None
        if terms is None:
            priors = [_by_plate(p, -_log_prob(p)) for _, p in pairs if p is not None]
            terms = MultiFrameTensor(*(_by_plate(q, _log_q(q)) for q, _ in pairs), *priors)
        costs.append(Cost([name for name in group if name in latent] or group, terms, exact))
    return costs


def _groups(parents: Structure, latent: Sites) -> list[list[str]]:
    """The guide's sites, auxiliary ones together with the latents that are made of them."""
    group = {name: [name] for name in parents}
    for name, made_of in parents.items():
        for parent in made_of:
            if (name in latent and parent in latent) or group[name] is group[parent]:
                continue
            joint = [site for site in parents if site in (*group[parent], *group[name])]
            group |= dict.fromkeys(joint, joint)
    return [members for name, members in group.items() if members[0] == name]


def _closed(group: list[str], sites: Sites, latent: Sites, parents: Structure) -> MultiFrameTensor | None:
    """The KL divergence in closed form; None where there is none, or where it would not be the mean."""
    q, p = sites[group[0]], latent.get(group[0])
    if len(group) > 1 or p is None or _is_point(q["fn"]):  # a point of an autoguide may hold a Jacobian
        return None
    if not (_same(q["scale"], p["scale"]) and _same(q["mask"], p["mask"])):
        return None
    names = list(latent)
    before = names[: names.index(group[0])]  # what the prior may depend on, which must not depend on q
    if any(group[0] in _ancestors(name, parents) for name in before):
        return None
    try:
        kl = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return MultiFrameTensor(_by_plate(q, scale_and_mask(kl, q["scale"], q["mask"])))


def _scores(latent: Sites, guide: Trace) -> dict[str, tuple[Any, Tensor]]:
    """By site that is drawn without a gradient, from parameters that have one: score, less its value."""
    drawn = {name: site for name, site in latent.items() if name not in guide.nodes}
    scores = {}
    for name, site in {**random_sites(guide), **drawn}.items():
        if getattr(site["fn"], "has_rsample", False):
            continue
        score = site["fn"].log_prob(site["value"])
        if score.requires_grad:
            scores[name] = _by_plate(site, score - score.detach())
    return scores


def _expected(cost: Cost, scores: Mapping[str, Any], model: list[str], guide: Trace) -> Tensor:
    """A cost summed, with the gradient of its expectation over the sites before it."""
    value = torch.stack([term.sum() for term in cost.terms.values()]).sum()
    for name, (frames, score) in scores.items():
        orders = [order for order in (model, list(guide.nodes)) if name in order]
        own = name in cost.sites
        if (own and cost.exact) or not (own or any(_follows(order, name, cost.sites) for order in orders)):
            continue
        fixed = MultiFrameTensor(*((plates, term.detach()) for plates, term in cost.terms.items()))
        value = value + (fixed.sum_to(frames) * score).sum()
    return value


def _follows(order: list[str], first: str, sites: list[str]) -> bool:
    return any(site in order[order.index(first) :] for site in sites)


def _log_prob(site: Site) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def _log_q(site: Site) -> Tensor:
    """log q in value; in gradient its entropy part, which is none for a site with a score."""
    value, _, gradient = site["fn"].score_parts(site["value"])
    if gradient is not value:
        value = gradient + (value - gradient).detach()
    return scale_and_mask(value, site["scale"], site["mask"])


def _frames(site: Site) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _by_plate(site: Site, value: Tensor) -> tuple[list[Any], Tensor]:
    """The plates of a site and its numbers by their rows, other axes summed."""
    frames = [frame for frame in _frames(site) if value.dim() >= -frame.dim]
    kept = {frame.dim for frame in frames}
    other = [dim for dim in range(-value.dim(), 0) if dim not in kept]
    return frames, value.sum(other, keepdim=True) if other else value


def _over_rows(log_prob: Tensor, dim: int) -> Tensor:
    other = [axis for axis in range(-log_prob.dim(), 0) if axis != dim]
    return log_prob.sum(other) if other else log_prob


def _full_size(site: Site, dim: int, batch: int) -> int:
    """The size of the data set by a site's plate, -1 in Pyro where it says none."""
    sizes = [_size(frame) for frame in _frames(site) if frame.dim == dim]
    return max([batch if size < 0 else size for size in sizes], default=batch)


def data_size(model: Trace, batch: int) -> int | None:
    """The size of the data set by the plates of what is observed per example; None if nothing is."""
    sites = random_sites(model, observed=True).values()
    dims = [(site, batch_dim(site, site["fn"].batch_shape, batch)) for site in sites]
    return max((_full_size(site, dim, batch) for site, dim in dims if dim is not None), default=None)


def _size(frame: Any) -> int:
    return int(frame.size if frame.full_size is None else frame.full_size)


def _ancestors(name: str, parents: Structure) -> set[str]:
    found: set[str] = set()
    left = list(parents.get(name, ()))
    while left:
        parent = left.pop()
        if parent not in found:
            found.add(parent)
            left += parents.get(parent, ())
    return found


def _is_point(fn: Any) -> bool:
    while not isinstance(fn, dist.Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is not None and other is not None and bool((torch.as_tensor(one == other)).all())
    return one == other


def _refuse_enumerated(latent: Sites, guide: Trace) -> None:
    for name, site in latent.items():
        if name not in guide.nodes and site["infer"].get("enumerate"):
            raise ValueError(
                f"site {name!r} of the model is marked for enumeration, but here every site is drawn; give "
                "the guide this site, or drop the mark to draw it from its prior"
            )


def _refuse_unobserved(log_probs: Draws, rows: Mapping[str, int], batch: int) -> None:
    if rows:
        return
    seen = ", ".join(f"{name!r} of shape {tuple(value.shape)}" for name, value in log_probs.items())
    raise ValueError(
        "the model observed nothing; " * (not seen) + "expected model(x, y) to sample one site with obs=y "
        f"inside a pyro.plate(size=num_data, subsample=x), one log-likelihood per example ({batch},)"
        + f"; got {seen}"
        * bool(seen)
    )


def _refuse_small(num_data: int, names: list[str], batch: int) -> None:
    if batch > num_data:
        raise ValueError(
            f"expected a batch of at most num_data={num_data} examples, as the plate around "
            f"{names[0]!r} says, got {batch}; write pyro.plate(..., size=len(train_set), subsample=x)"
        )
