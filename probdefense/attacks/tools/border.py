"""The border that every attack shares: checks, keyed randomness, chunks, and a point in return.

An attack body sees checked tensors, a `Stream` in place of ``seed`` and a whole chunk of examples; it
returns points. It may not import Pyro, touch ``.grad``, change modes or the global random state, or
decide success. It works in float32 or better and its logits come in double precision, whatever the dtype
of the network: the cast stands here, and so does the one check that answers are finite.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from probdefense.logits.adapters import Counted, as_logits_fn
from probdefense.logits.precision import cast
from probdefense.ops import exact
from probdefense.rng import Stream, forked
from probdefense.types import Inputs, Labels, Logits, LogitsFn
from probdefense.validation import (
    bound,
    check_classes,
    check_count,
    check_eps,
    check_finite_logits,
    check_function,
    check_inputs,
    check_kind,
    check_labels,
    check_like,
    check_logits,
    check_norm,
    check_positive,
    check_share,
    like_probabilities,
    warn_of_probabilities,
    watching,
)

POSITIVE = ("step_size", "learning_rate", "h", "sigma", "init_eps", "init_c", "c")
NOT_NEGATIVE = ("momentum", "alpha", "beta", "confidence", "overshoot")
SHARES = {"gamma": "()", "area": "(]"}
FLAGS = ("random_start", "active_set", "frozen")
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "loss": ("logits", "y"),
    "rule": ("logits",),
    "attack": ("logits_fn", "x", "y"),
    "inner": ("logits_fn", "x", "y"),
    "net": (),
}
"""Settings that are functions, with their arguments."""


def attack(body: Callable[..., Inputs]) -> Callable[..., Inputs]:
    """Turns the body of an attack into the public function.

    The public function accepts what the body declares, and also ``generator=`` as another word for
    ``seed=`` and ``amp=torch.bfloat16`` for forward passes under autocast. With a seed it runs in a forked
    random state; ``max_batch`` splits the examples.
    """
    signature = inspect.signature(body)

    @functools.wraps(body)
    def public(
        logits_fn: LogitsFn,
        x: Inputs,
        y: Labels,
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        max_batch: int | None = None,
        amp: torch.dtype | None = None,
        **options: Any,
    ) -> Inputs:
        declared = inspect.signature(public)
        bound(body.__name__, declared, (logits_fn, x, y), options)
        logits_fn = cast(as_logits_fn(logits_fn), amp)
        x = check_inputs(x)
        check_labels(y, len(x))
        parameters = declared.parameters
        norm = check_norm(options.get("norm", parameters["norm"].default)) if "norm" in parameters else None
        options = {
            name: value
            if value is parameters[name].default is None
            else _checked_option(name, value, x, y, norm)
            for name, value in options.items()
        }
        max_batch = len(x) if max_batch is None else check_count("max_batch", max_batch)
        seed = _one_source(seed, generator)
        with outside_inference(), watching.ledger():
            stream, x_adv = Stream.of(seed, x), torch.empty_like(x)
            given = {name: workable(value) for name, value in {**options, "x": x, "y": y}.items()}
            with forked(None if seed is None else stream.seed(), x.device):
                for rows in _chunks(len(x), max_batch):
                    part = {name: _rows(value, rows, len(x)) for name, value in given.items()}
                    number = torch.arange(len(x), device=x.device)[rows]
                    function = guarded(logits_fn, x, part["y"], part.get("target"), body.__name__, number)
                    x_adv[rows] = body(function, **part, seed=stream.take(rows)).detach().to(x.dtype)
        return _checked(x_adv, body.__name__)

    public.__signature__ = signature  # type: ignore[attr-defined]
    public.is_attack = True  # type: ignore[attr-defined]
    return public


@contextmanager
def outside_inference() -> Iterator[None]:
    """Leaves inference mode, in which there are no gradients; nothing happens elsewhere."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def workable(value: Any) -> Any:
    """A tensor as an attack can use it: detached, no inference tensor, and of at least float32."""
    if not isinstance(value, Tensor):
        return value
    value = value.clone() if value.is_inference() else value.detach()
    if value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value


def guarded(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    target: Labels | None = None,
    where: str = "the attack",
    number: Tensor | None = None,
) -> "_Guarded":
    """The function behind the border, for inputs of the dtype of `x` and the examples of those numbers."""
    highest = y if target is None else torch.max(y, target)
    number = torch.arange(len(y), device=y.device) if number is None else number
    return _Guarded(logits_fn, x.dtype, highest, where, number)


def alike(logits_fn: LogitsFn, other: LogitsFn) -> LogitsFn:
    """Another function behind the border that the function under attack stands behind."""
    return logits_fn.like(other) if isinstance(logits_fn, _Guarded) else other


class _Guarded:
    """The function under attack: asked in its dtype, its answers checked and in double precision."""

    def __init__(self, logits_fn: LogitsFn, dtype: torch.dtype, highest: Tensor, where: str, number: Tensor):
        self.logits_fn, self.dtype, self.highest = logits_fn, dtype, highest
        self.where, self.number, self.seen = where, number, False

    @property
    def stochastic(self) -> bool:
        return self.logits_fn.stochastic

    def __call__(self, x: Inputs, num_samples: int | None = None, **options: Any) -> Logits:
        logits = self.logits_fn(
            self._as_asked(x), num_samples, **options
        )  # about a copy: networks may work in place
        check_logits(logits, len(x))
        if not self.seen:
            self.seen = True
            check_classes(self.highest, logits.shape[-1])
            if like_probabilities(logits.detach()):
                warn_of_probabilities("weakens every attack", stacklevel=3)
        check_finite_logits(logits, self.where, self.number)
        return exact(logits)

    def like(self, logits_fn: LogitsFn) -> "_Guarded":
        """Another function behind the same border."""
        return _Guarded(logits_fn, self.dtype, self.highest, self.where, self.number)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.logits_fn, name)
        if name == "respond":
            return lambda x, **kwargs: value(self._as_asked(x), **kwargs)
        if name not in Counted.DERIVED:
            return value
        if not inspect.isroutine(value):
            return self.like(value) if callable(value) else value
        return lambda *args, **kwargs: self.like(value(*map(self._as_asked, args), **kwargs))

    def _as_asked(self, value: Any) -> Any:
        """Inputs among the arguments, as the function takes them."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype, copy=True) if floating else value


def _one_source(seed: Any, generator: Any) -> Any:
    """Whichever of the two words for the source of random numbers was used."""
    if generator is None:
        return seed
    check_kind("generator", generator, torch.Generator, "give an integer as seed=")
    if seed is not None:
        raise ValueError("expected seed or generator, got both; they are two words for one thing")
    return generator


def _checked_option(name: str, value: Any, x: Inputs, y: Labels, norm: Any) -> Any:
    """A setting, checked by its name, which means the same in every attack."""
    if name == "eps":
        return check_eps(value, len(y), norm)
    if name == "norm":
        return check_norm(value)
    if name == "target":
        return _checked_target(value, y)
    if name == "start":
        return check_like(value, x, name)
    if name in FUNCTIONS:
        check_function(name, value, *FUNCTIONS[name])
    return check_option(name, value)


def check_option(name: str, value: Any) -> Any:
    """A setting that is a number or a flag, checked by its name; anything else as it is.

    Raises:
        TypeError: another type.
        ValueError: out of range.
    """
    if name in FLAGS:
        check_kind(name, value, bool, "give True or False")
    elif name.startswith("num_") or name in ("repeats", "max_queries", "budget"):
        return check_count(name, value)
    elif name in POSITIVE or name in NOT_NEGATIVE:
        return check_positive(name, value, zero=name in NOT_NEGATIVE)
    elif name in SHARES:
        return check_share(name, value, ends=SHARES[name])
    return value


def _checked_target(target: Any, y: Labels) -> Labels:
    check_labels(target, len(y), "target")
    if bool((target == y).any()):
        raise ValueError(
            "expected target labels other than y, got some that are equal; (y + 1) % num_classes is a choice"
        )
    return target


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _rows(value: Any, rows: slice, total: int) -> Any:
    """The chunk's part of a setting that is given per example; anything else whole."""
    if isinstance(value, Tensor) and value.dim() >= 1 and len(value) == total:
        return value[rows]
    return value


def _checked(x_adv: Inputs, name: str) -> Inputs:
    if math.isfinite(x_adv.sum()):  # one sum sees all that is not finite
        return x_adv
    bad = (~torch.isfinite(x_adv)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"expected finite pixels, {name} produced NaN or infinity for examples {bad[:10]}; look for huge "
            "gradients in the network, or lower the step size"
        )
    return x_adv
