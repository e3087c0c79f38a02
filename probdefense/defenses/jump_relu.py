r"""JumpReLU: small activations of a trained network are cut off, without training it again.

Erichson et al., 2020, [JumpReLU: A Retrofit Defense Strategy for Adversarial
Attacks](https://arxiv.org/abs/1904.03750). Every ReLU becomes $J_\kappa(z) = z\, 1[z > \kappa]$, and
$\kappa$ is the largest that costs an accepted amount of clean accuracy. Units below $\kappa$ pass no
gradient, so judge it by what ignores that: BPDA with `surrogates`, transfer from $\kappa = 0$, Square.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core.defense import Defense
from probdefense.core.registry import builder
from probdefense.defenses.host import device_and_dtype, host, running_relus
from probdefense.logits.rules import mean_prob
from probdefense.nn.jump_relu import JumpReLU, MarginalJumpReLU, smoothed_jump
from probdefense.nn.relus import FUNCTIONAL, RELUS, Where, after_relus, relu_paths
from probdefense.types import Inputs, Labels, LogitsFn
from probdefense.validation import (
    check_count,
    check_examples,
    check_function,
    check_inputs,
    check_positive,
    check_share,
)

Threshold = float | Distribution
"""A number, or a distribution from which every example draws one threshold per ReLU."""

Kappa = Threshold | Mapping[str, Threshold]
"""One threshold for every ReLU, or one by path; a ReLU without a path in it stays as it is."""

LEVELS = 20
"""How many thresholds `tune_kappa` tries by default: equal steps of the share that is cut."""


@builder
def jump_relu(
    net: nn.Module,
    *,
    kappa: Kappa,
    where: Where | None = None,
    learned: bool = False,
    num_data: int | None = None,
    example: Inputs | None = None,
) -> Defense:
    r"""Puts a threshold behind every ReLU, $J_\kappa(z) = z\, 1[z > \kappa]$, keeping the trained weights.

    With $\kappa = 0$ the network is unchanged, bit for bit. A distribution makes the threshold random:
    the authors' variant is ``Uniform(0.6 * k, k)``. ReLUs called as functions (``F.relu``) are found
    while the network runs and share one threshold, under the path ``"functional"``.

    Args:
        net: A network or a `Defense`, trained in whatever way; it is copied, parameters keep names.
        kappa: The threshold in units of the activations: a number, a distribution, or either by path,
            as `quantiles` gives it.
        where: ``(path, module) -> bool``, which ReLU modules; all, and function calls, by default.
        learned: Whether the distribution of the threshold is trained, through the mean activation
            $\mathbb{E}\, J_\kappa(z) = z F(z)$; nothing is random then. Needs `kappa` with loc and scale.
        num_data: Size of the training set; not needed, as the thresholds have no KL.
        example: A batch of inputs, to see which ReLUs run; needed where that cannot be guessed.

    Returns:
        A `Defense`; random thresholds are sites named after the layers.

    Raises:
        ValueError: a network without ReLU, a negative threshold, or a chosen path that is no ReLU or
            never runs.

    References:
        Erichson et al., 2020, [JumpReLU](https://arxiv.org/abs/1904.03750)

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.ReLU())
        >>> jump_relu(net, kappa=0.5)(torch.tensor([[-1.0, 0.2, 0.8]]))
        tensor([[[0.0000, 0.0000, 0.8000]]])
    """
    if where is not None:
        check_function("where", where, "path", "module")
    net, sites, num_data = host(net, num_data)
    like = device_and_dtype(net, sites)
    if isinstance(kappa, Mapping):
        _check_paths(net, kappa)
    paths = running_relus(net, sites, example, where, kappa if isinstance(kappa, Mapping) else None)

    def layer(path: str) -> nn.Module:
        threshold = kappa[path] if isinstance(kappa, Mapping) else kappa
        if not learned:
            return JumpReLU(threshold).to(like)
        if not isinstance(threshold, Distribution):
            raise ValueError(
                f"expected another kappa, got {threshold}: learned=True needs a distribution to start from, "
                f"since a fixed threshold has no gradient; give one such as Normal({threshold}, 0.1)"
            )
        return MarginalJumpReLU(threshold).to(like)

    after_relus(net, "jump", layer, paths)
    return Defense.from_sites(net, sites, num_data)


def quantiles(net: nn.Module, x: Inputs, share: float) -> dict[str, float]:
    """Thresholds that cut the same share of the positive activations behind every ReLU.

    Args:
        net: A network or a `Defense`; its static base is run.
        x: ``(batch, *event)``, the inputs whose activations count.
        share: In [0, 1); 0 gives thresholds 0.

    Returns:
        Thresholds by path, for ``jump_relu(net, kappa=...)``.

    Raises:
        ValueError: a share outside [0, 1), or a network without ReLU.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.ReLU())
        >>> quantiles(net, torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]]), 0.5)
        {'0': 0.5}
    """
    x, share = check_inputs(x), check_share("a share", share, ends="[)")
    return {path: _quantile(values, share) for path, values in _activations(net, x).items()}


def tune_kappa(
    net: nn.Module,
    validation: tuple[Inputs, Labels] | Iterable[tuple[Inputs, Labels]],
    *,
    max_drop: float,
    candidates: Sequence[Kappa] | None = None,
    where: Where | None = None,
    num_samples: int = 16,
) -> Kappa:
    r"""The largest threshold that costs at most `max_drop` of validation accuracy.

    Accuracy need not fall monotonically, so every candidate is tried, all on the same draws.

    Args:
        net: A network or a `Defense`.
        validation: ``(x, y)`` or batches of them, not used for anything else.
        max_drop: Accepted loss of accuracy, 0.02 for two points.
        candidates: Thresholds from small to large; by default one for all ReLUs that cuts 0, 5, ...,
            95 percent of the positive activations.
        where: As in `jump_relu`.
        num_samples: Draws of a random defense, averaged by mean probability.

    Returns:
        The last candidate within the accepted loss; 0 if there is none.

    Raises:
        ValueError: a negative `max_drop`, or a network without ReLU.

    Examples:
        >>> net, x = torch.nn.Sequential(torch.nn.ReLU()), torch.tensor([[0.2, 0.8], [0.6, 0.4]])
        >>> tune_kappa(net, (x, torch.tensor([1, 0])), max_drop=0.0, candidates=[0.0, 0.5, 0.9])
        0.5
    """
    max_drop = check_positive("max_drop", max_drop, zero=True)
    num_samples = check_count("num_samples", num_samples)
    batches = _pairs(validation)
    if candidates is None:
        pooled = torch.cat(list(_activations(net, batches[0][0][:64]).values()))
        candidates = [_quantile(pooled, level / LEVELS) for level in range(LEVELS)]
    kept: Kappa = 0.0
    retrofit = partial(jump_relu, net, where=where, example=batches[0][0][:1])
    least = _accuracy(retrofit(kappa=0.0), batches, num_samples) - max_drop - 1e-9
    for kappa in candidates:
        if _accuracy(retrofit(kappa=kappa), batches, num_samples) >= least:
            kept = kappa
    return kept


def surrogates(defense: Defense, width: float = 0.25) -> dict[str, Callable[[Tensor], Tensor]]:
    r"""What to differentiate in place of every jump and every rounding, for an attack by BPDA.

    The forward pass keeps the jump; the backward pass is that of $z\, s((z - \kappa) / \tau)$, which
    reaches the units below the threshold, or what a layer declares as its ``surrogate``: the identity, of
    rounding in `random_transforms`. Attack inside ``with bpda(defense, surrogates(defense)):``.

    Args:
        defense: A defense with `JumpReLU` layers, or with transforms that round.
        width: $\tau / \kappa$.

    Returns:
        A smooth function by name of the layer in the defense.

    Raises:
        ValueError: neither in the defense.

    Examples:
        >>> import probdefense as pd
        >>> list(surrogates(jump_relu(pd.models.small_cnn(), kappa=0.5)))
        ['model.net.1.jump', 'model.net.3.jump', 'model.net.7.jump']
    """
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, module in defense.named_modules():
        if isinstance(module, JumpReLU):
            found[name] = smoothed_jump(module.kappa, width)
        elif callable(declared := getattr(module, "surrogate", None)):
            found[name] = declared
    if not found:
        raise ValueError("expected layers of JumpReLU, found no JumpReLU; make them with jump_relu(net, ...)")
    return found


def _pairs(validation: Any) -> list[tuple[Inputs, Labels]]:
    """``(x, y)`` or batches of them, checked."""
    if not isinstance(validation, Iterable) or isinstance(validation, Tensor | Mapping | str):
        raise TypeError(
            f"expected validation as (x, y) or batches of them, got {type(validation).__name__}; give a pair"
        )
    whole = isinstance(validation, tuple)
    return [check_examples(pair, "validation") for pair in ([validation] if whole else validation)]


class _Seen(nn.Module):
    """Collects the positive activations that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.values.append(z[z > 0])
        return z


def _activations(net: nn.Module, x: Inputs) -> dict[str, Tensor]:
    """The positive activations behind every ReLU of the static base, by path."""
    net, sites, _ = host(net, None)
    seen: dict[str, _Seen] = {}
    after_relus(net, "seen", lambda path: seen.setdefault(path, _Seen()), relu_paths(net))
    with torch.no_grad():
        Defense.from_sites(net, sites).mean()(x)
    return {path: torch.cat(layer.values) for path, layer in seen.items() if layer.values}


def _quantile(values: Tensor, share: float) -> float:
    count = math.ceil(share * len(values))
    return float(values.kthvalue(count).values) if count else 0.0


def _accuracy(defense: Defense, batches: Iterable[tuple[Inputs, Labels]], num_samples: int) -> float:
    frozen: LogitsFn = defense.freeze(num_samples, torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = [mean_prob(frozen(x)).argmax(-1) == y for x, y in batches]
    return float(torch.cat(right).double().mean())


def _check_paths(net: nn.Module, kappa: Mapping[str, Threshold]) -> None:
    known = [path for path, module in net.named_modules() if isinstance(module, RELUS)]
    unknown = set(kappa) - {*known, FUNCTIONAL}
    if unknown:
        raise ValueError(
            f"expected paths of ReLUs, got some with no ReLU at {', '.join(sorted(unknown))}; found: "
            f"{', '.join(known) or 'none'}"
        )
