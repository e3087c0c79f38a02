r"""An empirical posterior: weights that are one of several given states.

SWAG draws, SGLD and SGHMC chains, snapshots of a training and draws of HMC all come as states of one
network. Here they are one random site, the choice of a state:

$$ q(\theta) = \sum_k w_k\, \delta_{\theta_k}, \qquad w_k = 1/K \text{ by default} $$

Izmailov et al., 2021, [What Are Bayesian Neural Network Posteriors Really
Like?](https://arxiv.org/abs/2104.14421); Huang et al., 2017, [Snapshot
Ensembles](https://arxiv.org/abs/1704.00109); Welling and Teh, 2011, [Bayesian Learning via Stochastic
Gradient Langevin Dynamics](https://icml.cc/2011/papers/398_icmlpaper.pdf). What these leave open: running
statistics of BatchNorm. Here they belong to the state, as parameters do, so each sample has its own.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.registry import builder, recordable
from probdefense.core.sites import SampleSite, unused
from probdefense.core.sites.samples import LARGE, Table
from probdefense.core.sites.weights import take_out
from probdefense.defenses.host import device_and_dtype, host

State = Mapping[str, Any]


def from_samples(
    net: nn.Module,
    samples: State | Iterable[State] | Iterable[Iterable[State]],
    *,
    weights: Sequence[float] | Tensor | None = None,
    num_data: int | None = None,
) -> Defense:
    r"""Makes the weights of a network one of given states, $\theta \sim \sum_k w_k \delta_{\theta_k}$.

    Draws go round the states in random order, so ``num_samples=K`` asks each exactly once, and the mean is
    that over the given networks; fewer draws are a random subset. Other weights than $1/K$ are drawn
    systematically. The states are fixed: training changes what was not in them. There is no KL term. More
    than 1 GiB of them stay on disk, in a file that ends with the process.

    Args:
        net: A network like those that the states are of, or a `Defense` made of one; it is copied.
        samples: State dicts: a list or an iterator of them, a list of chains (lists of one length), or one
            dict of stacked tensors ``(draws, ...)`` or ``(chains, draws, ...)``. Names that are left out stay
            as they are in `net`; whole numbers (counters of BatchNorm) are ignored.
        weights: Of the states, in their order, which need not sum to 1; equal by default.
        num_data: Size of the training set; not needed, as there is no KL.

    Returns:
        A `Defense` with one site, ``"weights"``; ArviZ sees its draws as ``(chain, draw)``.

    Raises:
        TypeError: samples that are no states.
        ValueError: no sample, one that is not finite, samples that differ in their names, a name or shape
            that the network does not have, chains of different lengths, or weights that are no probabilities
            of them.

    References:
        Izmailov et al., 2021, [What Are Bayesian Neural Network Posteriors Really
        Like?](https://arxiv.org/abs/2104.14421)

    Examples:
        >>> nets = [torch.nn.Linear(4, 3) for _ in range(5)]
        >>> defense = from_samples(nets[0], [net.state_dict() for net in nets])
        >>> x = torch.rand(2, 4)
        >>> bool(torch.allclose(defense(x, 5).mean(0), torch.stack([net(x) for net in nets]).mean(0)))
        True
    """
    inner = getattr(net, "net", net) if isinstance(net, Defense) else net
    return _built(net, _collected(inner, samples, weights), num_data=num_data)


@recordable
@dataclass(frozen=True)
class Samples:
    """Given states as a table; a file holds what it looks like, as its rows come with the state."""

    names: list[list[str]]
    shapes: list[list[int]]
    count: int
    chains: int
    rows: Tensor | None = None
    weights: Tensor | None = None

    def record(self) -> dict[str, Any]:
        """What a file needs."""
        return {"names": self.names, "shapes": self.shapes, "count": self.count, "chains": self.chains}

    def table(self, like: Tensor) -> Table:
        """The rows and their weights as a module."""
        size = sum(int(np.prod(shape)) for shape in self.shapes)
        rows = torch.zeros(self.count + 1, size) if self.rows is None else self.rows
        weights = torch.full((self.count,), 1 / self.count) if self.weights is None else self.weights
        return Table(rows.to(like), weights.to(like), self.chains)


def _from_samples(net: nn.Module, samples: Samples, *, num_data: int | None = None) -> Defense:
    """The registered builder, whose samples a file can describe."""
    net, sites, num_data = host(net, num_data)
    table = samples.table(device_and_dtype(net, sites))
    for name in joined.from_iterable(samples.names):
        if name in dict(net.named_parameters(remove_duplicate=False)):
            take_out(net, name)
    site = SampleSite(
        unused("weights", {site.name for site in sites}),
        None,
        table,
        names=tuple(map(tuple, samples.names)),
        shapes=tuple(map(torch.Size, samples.shapes)),
        count=samples.count,
        table=table,
    )
    return Defense.from_sites(net, [*sites, site], num_data)


_from_samples.__name__ = "from_samples"
_built = builder(_from_samples)


def _collected(net: nn.Module, samples: Any, weights: Any) -> Samples:
    """The states as rows of one table."""
    known = _known(net)
    states, lengths = _states(samples, known), list[int]()
    counted = _counted(states, lengths)
    first = next(counted, None)
    if first is None:
        raise ValueError("expected at least one sample, got none; give state dicts of the network")
    names = _names(first, known)
    flat = (_row(state, names, known) for state in joined([first], counted))
    shapes = [list(known[group[0]].shape) for group in names]
    rows, weights = _table(flat, weights)
    if len(set(lengths)) > 1:
        raise ValueError(f"expected chains of one length, got {lengths}; leave out what one has more")
    return Samples(names, shapes, len(rows) - 1, len(lengths), rows, weights)


def _known(net: nn.Module) -> dict[str, Tensor]:
    """What a state may hold: parameters and buffers of real numbers, by name."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(net).__name__}; give the network of the samples")
    named = net.state_dict(keep_vars=True).items()
    return {name: value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}


def _states(samples: Any, known: Mapping[str, Tensor]) -> Iterator[Iterable[State]]:
    """The chains of a list, an iterator, or a dict of stacked tensors."""
    if isinstance(samples, Mapping):
        yield from _unstacked(samples, known)
        return
    if not isinstance(samples, Iterable) or isinstance(samples, nn.Module | str | Tensor):
        raise TypeError(
            f"expected samples as state dicts, got {type(samples).__name__}; give [net.state_dict(), ...] or "
            "one dict of stacked tensors"
        )
    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return
    if isinstance(first, Mapping):
        yield joined([first], samples)
    else:
        yield from joined([first], samples)


def _unstacked(samples: State, known: Mapping[str, Tensor]) -> Iterator[Iterable[State]]:
    stacked = {name: _tensor(value) for name, value in samples.items()}
    stacked = {name: value for name, value in stacked.items() if value.is_floating_point()}
    _refuse_names(stacked, known)
    leading = {value.shape[: value.dim() - known[name].dim()] for name, value in stacked.items()}
    if len(leading) != 1 or len(axes := leading.pop()) not in (1, 2):
        raise ValueError(
            "expected stacked tensors that share leading axes (draws,) or (chains, draws), got shapes "
            f"{[tuple(value.shape) for value in stacked.values()][:4]}; stack whole states"
        )
    for chain in range(axes[0] if len(axes) == 2 else 1):
        part = {name: value[chain] if len(axes) == 2 else value for name, value in stacked.items()}
        yield ({name: value[draw] for name, value in part.items()} for draw in range(axes[-1]))


def _counted(chains: Iterable[Iterable[State]], lengths: list[int]) -> Iterator[State]:
    """All states one after the other; notes how many each chain has."""
    for chain in chains:
        lengths.append(0)
        for state in chain if isinstance(chain, Iterable) else [chain]:
            if not isinstance(state, Mapping):
                raise TypeError(
                    f"expected state dicts as samples, got {type(state).__name__}; give net.state_dict()"
                )
            lengths[-1] += 1
            yield state


def _names(state: State, known: Mapping[str, Tensor]) -> list[list[str]]:
    """The names that a state fills, tied ones together."""
    given = {name: value for name, value in state.items() if _tensor(value).is_floating_point()}
    _refuse_names(given, known)
    tied: dict[int, list[str]] = {}
    for name, value in known.items():
        tied.setdefault(id(value), []).append(name)
    return [group for group in tied.values() if any(name in given for name in group)]


def _refuse_names(given: Mapping[str, Any], known: Mapping[str, Tensor]) -> None:
    strange = [name for name in given if name not in known]
    if strange or not given:
        raise ValueError(
            f"expected names of the network in the samples, got {', '.join(strange[:4]) or 'none'}; known: "
            f"{', '.join(list(known)[:6]) or '(none)'}"
        )


def _row(state: State, names: list[list[str]], known: Mapping[str, Tensor]) -> Tensor:
    """One state as a flat vector."""
    parts = []
    for group in names:
        value = next((state[name] for name in group if name in state), None)
        shape = None if value is None else tuple(_tensor(value).shape)
        if value is None or shape != tuple(known[group[0]].shape):
            raise ValueError(
                f"expected {group[0]} of shape {tuple(known[group[0]].shape)} in every sample, got "
                f"{'none' if value is None else shape}; give states of one network"
            )
        parts.append(_tensor(value).detach().cpu().to(known[group[0]].dtype).flatten())
    more = [name for name, value in state.items() if _tensor(value).is_floating_point()]
    if extra := set(more).difference(*names):
        raise ValueError(
            f"expected samples with the same names, got {sorted(extra)[:4]} in one; leave them out"
        )
    row = torch.cat(parts)
    if not bool(torch.isfinite(row).all()):
        raise ValueError("expected finite samples, got NaN or infinity in one; leave out what diverged")
    return row


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:  # numpy and torch name their own types
        raise TypeError(
            f"expected tensors or arrays of numbers, got {type(value).__name__} {str(value)[:20]!r}; give "
            "them as a state dict has them"
        ) from error


def _table(rows: Iterator[Tensor], weights: Any) -> tuple[Tensor, Tensor | None]:
    """The rows and their mean, through a file that is mapped if it is large, and the weights."""
    given = None if weights is None else _tensor(weights).double().flatten()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path, count, mean = Path(folder) / "rows", 0, torch.zeros(())
        with path.open("wb") as file:
            for row in rows:
                share = 1.0 if given is None else float(given[count]) if count < len(given) else 0.0
                mean, count = mean + share * row.double(), count + 1
                file.write(row.contiguous().view(torch.uint8).numpy().tobytes())
            shares = _shares(given, count)
            total = float(count if given is None else given.sum())
            file.write((mean / total).to(row.dtype).view(torch.uint8).numpy().tobytes())
        size = (count + 1) * row.numel()
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=row.dtype).view(count + 1, -1)
        return mapped if mapped.nbytes > LARGE else mapped.clone(), shares


def _shares(weights: Tensor | None, count: int) -> Tensor | None:
    if weights is None:
        return None
    if len(weights) != count or not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < float("inf"):
        raise ValueError(
            f"expected weights as {count} numbers of at least 0, one per sample, got {weights.tolist()[:6]}; "
            "leave them out for equal ones"
        )
    return weights / weights.sum()
