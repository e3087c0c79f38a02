"""How a defense made of sites draws: values first, then the network as a pure function of them.

The value of a global site carries a leading draw axis ``(draws, D)``; that of a local site
``(draws, rows, *event)``, where rows is the batch or 1 (shared by the batch).
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import vmap
from torch.nn.functional import cross_entropy

from probdefense.core.costs import FEWEST, draws_at_once
from probdefense.core.families import divergence, drawn_with_kl
from probdefense.core.local import local_noise
from probdefense.core.programs import Guide, Model, Sizes, block
from probdefense.core.sites import MemberSite, Site
from probdefense.core.streams import CACHE_BYTES, Cached, Fresh, Keys, Posteriors, Stream
from probdefense.nn.passes import held_still, modules_of
from probdefense.ops import log_mean_exp
from probdefense.rng import forked
from probdefense.types import Draws, Inputs, Labels, Step
from probdefense.validation import check_classes

ROWS = 128
"""Images per forward pass: larger passes fall out of the cache and cost 2-3 times more per image."""

GRAPH_BYTES = 2**28
"""What the graphs of a call may take before its passes are run again in the backward pass."""

UNBATCHED = (nn.RNNBase, nn.MultiheadAttention)
"""Layers without a rule for vmap: their weights are taken one draw at a time."""


class Vectorized:
    """The drawing strategy for our own model and guide."""

    def __init__(self, model: Model, guide: Guide):
        self.model, self.guide = model, guide

    @property
    def stochastic(self) -> bool:
        """Whether anything is random."""
        return bool(self.model.sites)

    def logits(
        self,
        x: Inputs,
        num_samples: int,
        max_batch: int | None,
        backend: str,
        seed: int | None = None,
        antithetic: bool = False,
    ) -> Tensor:
        """Logits of fresh draws, ``(samples, batch, classes)``; with `seed` of draws that belong to it."""
        if not self.stochastic and len(x) <= (max_batch or ROWS):
            return self.at(x, {})
        if seed is None and not antithetic:
            return self.answers(x, Fresh(self.model, num_samples), num_samples, max_batch, backend)
        ids, trained = torch.arange(len(x)), seed is None
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        keys = Keys(
            self.model, seed, num_samples, ids, device=x.device, antithetic=antithetic, trained=trained
        )
        return self.answers(x, keys, num_samples, max_batch, backend)

    def answers(
        self,
        x: Inputs,
        stream: Stream,
        num_samples: int,
        max_batch: int | None = None,
        backend: str = "auto",
        state: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The passes of one call, of at most `max_batch` images.

        Where the graph of all of them would not fit, each is run again in the backward pass instead of being
        remembered, if its values can be had again.
        """
        size = self._draws_at_once(x, num_samples, max_batch, backend)
        frugal = stream.repeats and self._too_large(x, num_samples, max_batch)

        def passes(draws: range) -> Tensor:
            """Those of some draws, whose weights are let go before the next are drawn."""
            shared = None if frugal else stream.weights(draws)
            blocks = []
            for rows in _ranges(len(x), max_batch or ROWS) if len(x) else [range(0)]:
                one = partial(self._pass, stream, draws, rows, shared, state)
                piece = x[rows.start : rows.stop]
                blocks.append(_RunAgain.apply(one, piece) if frugal else one(piece))
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

        return torch.cat([passes(draws) for draws in _ranges(num_samples, size)])

    def _pass(
        self,
        stream: Stream,
        draws: range,
        rows: range,
        shared: Draws | None,
        state: dict[str, Tensor] | None,
        x: Inputs,
    ) -> Tensor:
        """One forward pass, ``(draws, rows, classes)``."""
        weights = stream.weights(draws) if shared is None else shared
        return self._run(x, weights, stream.noise(x, draws, rows), state)

    def _too_large(self, x: Inputs, num_samples: int, max_batch: int | None) -> bool:
        """Whether the graph of a call should not be held at once."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return False
        if max_batch is not None:
            return len(x) * num_samples > max_batch
        weights = 4 * sum(site.size for site in self.model.global_sites)
        held = num_samples * (len(x) * self._sizes(x).graph + weights)
        return held > GRAPH_BYTES and num_samples * len(x) > 1

    def _sizes(self, x: Inputs) -> Sizes:
        """What one image of this shape takes."""
        key = tuple(x.shape[1:])
        if key not in self.model.sizes:
            with torch.inference_mode(False), torch.enable_grad():
                self.model.sizes[key] = self._measured(torch.zeros_like(x[:1], requires_grad=True))
        return self.model.sizes[key]

    def _measured(self, image: Inputs) -> Sizes:
        """What the graph of one image holds, beside weights."""
        kept: dict[int, int] = {}
        stream = Keys(self.model, 0, 1, torch.zeros(1, dtype=torch.int64, device=image.device))
        weights = stream.weights(range(1))
        known = [*weights.values(), *self.model.parameters(), *self.model.buffers()]
        owned = {tensor.untyped_storage().data_ptr() for tensor in known}

        def note(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in owned:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with (
            suppress(Exception),  # whatever a network says to one image: the pass itself says it of all
            forked(0, image.device),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            self._pass(stream, range(1), range(1), weights, None, image)
        return Sizes(max(1, sum(kept.values())), max(image.nbytes, *kept.values(), 1))

    def freeze(self, num_samples: int, seed: int, ids: Tensor | None = None) -> "Frozen":
        """`num_samples` functions: a key for each draw, and copies of what it is drawn from."""
        device = _device(self.model, self.guide)
        keys = Keys(self.model, seed, num_samples, ids, True, device=device, frozen=True)
        net, copies = self.model.net, dict[int, Tensor]()
        named = itertools.chain(
            net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False)
        )
        state = {name: copies.setdefault(id(t), t.detach().clone()) for name, t in named}
        return Frozen(self, num_samples, Cached(keys), ids, state)

    def step(self, x: Inputs, y: Labels, draws: Draws | None) -> Step:
        """One training forward: fresh draws (or the given ones), log-likelihood and KL by site.

        A choice of member that the draws leave open is enumerated, so that every member is trained:
        the log-likelihood is the mean over members, the logits are their log mean probability.
        """
        sites, kl, branching = Posteriors(), dict[str, Tensor](), {site.name for site in self._branching}
        drawn = self._draw(x, sites, kl) if draws is None else draws
        values = {n: v for n, v in drawn.items() if n not in branching} if draws is None else draws
        local = self.model.global_sites if draws is None else []
        logits = [self._trained(x, case, local) for case in self._cases(values)]
        check_classes(y, logits[0].shape[-1])
        log_lik = _mean([-cross_entropy(each, y, reduction="none") for each in logits])
        mixed = logits[0] if len(logits) == 1 else log_mean_exp(torch.stack(logits).log_softmax(-1))
        return Step(mixed, log_lik, self._kl(x, values, sites, kl), values)

    def _trained(self, x: Inputs, values: Draws, local: list[Site]) -> Tensor:
        """Logits in the modes of training; layers of `local` sites may draw their outputs."""
        with self.model.turn, local_noise(self.model.net, local):
            return self.model.logits(x, values, still=False)

    def draw(self, x: Inputs) -> Draws:
        """One joint draw of all sites for a batch, differentiable in the guide's parameters."""
        return self._draw(x, Posteriors())

    def _draw(self, x: Inputs, sites: Posteriors, kl: dict[str, Tensor] | None = None) -> Draws:
        """The draw; nats that came with it are left in `kl`, where they are wanted."""
        values: Draws = {}
        for site in self.model.global_sites:
            both = None if kl is None else drawn_with_kl(site.posterior, site.prior, self.model.generator)
            if both is not None and kl is not None:
                values[site.name], kl[site.name] = both
            elif isinstance(site, MemberSite):
                values[site.name] = site.draw((1, 1))[0]
            else:
                values[site.name] = sites.of(site).draw((site.size,), self.model.generator)
        uses = self.model.uses(x)
        return values | {use.name: sites.of(use.site).draw((len(x), *use.shape)) for use in uses}

    def at(self, x: Inputs, draws: Draws) -> Tensor:
        """Logits at one given draw, ``(1, batch, classes)``."""
        return self.model.logits(x, draws).unsqueeze(0)

    def mean(self, x: Inputs) -> Tensor:
        """Logits at the posterior means with every local site neutral, ``(1, batch, classes)``."""
        values = {site.name: site.center() for site in self.model.global_sites}
        neutral = {
            use.name: self.model.holes[use.buffer.rpartition(".")[0]].value for use in self.model.uses(x)
        }
        return self.model.logits(x, values | neutral).unsqueeze(0)

    @property
    def _branching(self) -> list[MemberSite]:
        sites = [site for site in self.model.global_sites if isinstance(site, MemberSite)]
        return [site for site in sites if site.enumerated]

    def _cases(self, values: Draws) -> list[Draws]:
        """The values completed by every choice of members that they leave open."""
        left = [site for site in self._branching if site.name not in values]
        choices = itertools.product(*([torch.tensor([k]) for k in range(site.count)] for site in left))
        return [values | {site.name: k for site, k in zip(left, ks, strict=True)} for ks in choices]

    def _kl(self, x: Inputs, values: Draws, sites: Posteriors, kl: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nats for the whole data set, by site, beside those known; none where the posterior is the prior."""
        for site in self.model.global_sites:
            if site.name not in kl and site.posterior is not None and site.prior is not None:
                q, p = sites.of(site).distribution("posterior"), site.distribution("prior", values)
                kl[site.name] = divergence(q, p, values[site.name], site.name)
        scale = max(self.model.num_data or 0, len(x)) / len(x)
        for use in self.model.uses(x):
            if use.site.posterior is not None and use.site.prior is not None:
                q, p = (block(use, side, (len(x),)).base_dist for side in ("posterior", "prior"))
                kl[use.name] = scale * divergence(q, p, values[use.name], use.name)
        return kl

    def _draws_at_once(self, x: Inputs, num_samples: int, max_batch: int | None, backend: str) -> int:
        """How many draws share a forward pass."""
        weights = 4 * sum(site.size for site in self.model.global_sites)
        if num_samples == 1 or len(x) == 0 or self._branching or backend == "loop":
            return 1
        alone = self.model.compiled is not None or _has(self.model.net, UNBATCHED)
        if weights and (backend == "fold" or alone or FEWEST * weights > CACHE_BYTES):
            return 1
        if backend == "auto":
            limit = draws_at_once(len(x), self._sizes(x).widest, weights > 0)
            limit = limit if max_batch is None else min(limit, max_batch // len(x))
        else:
            limit = (max_batch or ROWS) // len(x)
        return max(1, min(limit, CACHE_BYTES // weights) if weights else limit)

    def _run(self, x: Inputs, weights: Draws, noise: Draws, state: dict[str, Tensor] | None = None) -> Tensor:
        """Logits for stacked values, ``(draws, batch, classes)``: folded, or vmapped over weights."""
        stacked = next(iter({**weights, **noise}.values()), None)
        count = 1 if stacked is None else len(stacked)
        if weights and count > 1:
            values = {**weights, **noise}

            def one(values: Draws) -> Tensor:
                return self.model.logits(x, values, state=state)

            try:
                with self.model.turn, held_still(self.model.net):
                    return vmap(one)(values)
            except RuntimeError as error:  # an operation of the network that vmap cannot take
                if "vmap" not in str(error) and "atching rule" not in str(error):
                    raise
            return torch.stack([one({n: value[k] for n, value in values.items()}) for k in range(count)])
        rows = {
            name: value.expand(count, len(x), *value.shape[2:]).flatten(0, 1) if count > 1 else value[0]
            for name, value in noise.items()
        }
        folded = x if count == 1 else x.expand(count, *x.shape).flatten(0, 1)
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            folded = folded.contiguous(memory_format=torch.channels_last)
            rows = {n: _last(v) if v.dim() == 4 else v for n, v in rows.items()}
        values = rows | {name: value[0] for name, value in weights.items()}
        return self.model.logits(folded, values, state=state).unflatten(0, (count, len(x)))


@dataclass
class Frozen:
    """`num_samples` fixed functions of the input: any batch size, any subset, the same answers.

    Values come from keys whenever they are asked for, so that many draws take no more memory than one.
    Noise belongs to (draw, event shape) and is shared by the batch; with `ids` it belongs to each example's.
    """

    engine: Vectorized
    num_samples: int
    stream: Cached
    ids: Tensor | None
    state: dict[str, Tensor]
    max_batch: int | None = None

    stochastic = False

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Tensor:
        """Logits of every member, ``(num_samples, batch, classes)``; the count is fixed."""
        if self.ids is not None and len(x) != len(self.ids):
            raise ValueError(f"expected the {len(self.ids)} examples of the given ids, got {len(x)}")
        return self.engine.answers(x, self.stream, self.num_samples, self.max_batch, state=self.state)

    def freeze(self, num_samples: int | None = None) -> "Frozen":
        """Itself: it is frozen already."""
        return self

    def values(self, name: str) -> Tensor:
        """The values of a global site in all draws, ``(num_samples, D)``."""
        return torch.cat([self.stream.weights(range(k, k + 1))[name] for k in range(self.num_samples)])


class _RunAgain(torch.autograd.Function):
    """A pass that remembers its input alone and is run again in the backward pass.

    As torch's checkpoint, which loads torch's compiler, with gradients in the input only.
    """

    @staticmethod
    def forward(ctx: Any, one: Callable[[Inputs], Tensor], x: Inputs) -> Tensor:
        kind = x.device.type
        ctx.one, ctx.cast = one, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x)
        return one(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.cast):
            point = x.detach().requires_grad_()
            climbed = (ctx.one(point) * slopes).sum()
        return None, torch.autograd.grad(climbed, point)[0]


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def _last(value: Tensor) -> Tensor:
    """The values in the layout that has channels last."""
    return value.contiguous(memory_format=torch.channels_last)


def _has(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, kinds) for module in modules_of(net))


def _ranges(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(total, start + size))


def _device(*modules: nn.Module) -> torch.device:
    tensors = (t for module in modules for t in itertools.chain(module.parameters(), module.buffers()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
