"""Pictures of a defense at work, one per function: each takes data and axes, and returns the axes.

Without ``ax=`` a new figure is made with pyplot. Scales are in pixels at the input, entropies in nats.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probdefense.analysis.style import (
    COLORS,
    GRID,
    MUTED,
    cycle,
    heading,
    label_ends,
    new_axes,
    note,
    percent,
    quiet,
)
from probdefense.evaluation.intervals import wilson
from probdefense.prediction.predictive import Prediction
from probdefense.types import Inputs, Labels
from probdefense.validation import (
    check_count,
    check_inputs,
    check_kind,
    check_log_probs,
    check_positive,
    check_same,
    check_vector,
)


def noise_scales(tree: Any, ax: Any = None) -> Any:
    """The scale of every noise layer: one dot per fit, and a line over the elements of a layer.

    Args:
        tree: From `to_arviz` of one or several defenses.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: there is no noise layer.

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn())
        >>> tree = pd.to_arviz(defense, (torch.rand(2, 1, 8, 8), torch.tensor([0, 1])), num_samples=2)
        >>> [label.get_text() for label in noise_scales(tree).get_yticklabels()]
        ['input_noise', '2.noise']
    """
    constants = tree["constant_data"] if "constant_data" in groups_of(tree) else {}
    if "noise_scale" not in constants:
        raise ValueError(
            "expected a container with noise layers, got one that has no noise layers; make it with "
            "to_arviz(defense, data) of a noisy defense"
        )
    values = constants["noise_scale"]
    layers = [str(name) for name in values["noise_layer"].values]
    ax = new_axes(ax, (4.8, 0.9 + 0.3 * len(layers)))
    for row, layer in enumerate(layers):
        right = 0.0
        if f"noise_scale.{layer}" in constants:
            elements = np.asarray(constants[f"noise_scale.{layer}"])
            right = elements.max()
            ax.plot([elements.min(), right], [-row] * 2, color=COLORS[0], linewidth=2, alpha=0.4)
        chains = np.atleast_2d(np.asarray(values))[:, row]
        ax.plot(chains, [-row] * len(chains), "o", color=COLORS[0], markersize=6, alpha=0.8)
        note(ax, f"{chains.mean():.3g}", (max(right, chains.max()), -row), (8, 0), va="center")
    quiet(ax, "x").set_yticks([-row for row in range(len(layers))], layers)
    ax.set_xlim(0, 1.12 * ax.get_xlim()[1])
    ax.set_ylim(0.6 - len(layers), 0.6)
    ax.locator_params(axis="x", nbins=6)
    ax.set_xlabel("scale (pixels at the input, units of the activations inside)")
    heading(ax, "Noise scale by layer", "dots: fits, and their mean; line: elements of a layer")
    return ax


def entropy_clean_attacked(clean: Any, attacked: Any, ax: Any = None) -> Any:
    """How uncertain the predictive is on clean and on attacked inputs, as cumulative shares.

    Args:
        clean: A `Prediction`, or entropies in nats ``(batch,)``.
        attacked: The same on attacked inputs.
        ax: Axes to draw on.

    Returns:
        The axes.

    Examples:
        >>> entropy_clean_attacked(torch.rand(20), 1 + torch.rand(20)).get_xlabel()
        'predictive entropy (nats)'
    """
    both = {"clean": _entropies(clean, "clean"), "attacked": _entropies(attacked, "attacked")}
    ax = new_axes(ax, (4.8, 3.6))
    for (name, values), color in zip(both.items(), COLORS, strict=False):
        shares = np.arange(1, len(values) + 1) / len(values)
        ax.step(values, shares, where="post", color=color, linewidth=2)
        text, middle = f"{name}\nmedian {np.median(values):.2f}", len(values) // 2
        left = {"ha": "right", "va": "bottom"} if name == "clean" else {"ha": "left", "va": "top"}
        note(
            ax,
            text,
            (values[middle], shares[middle]),
            (-8, 6) if name == "clean" else (8, -6),
            color=color,
            **left,
        )
    quiet(ax).set_xlabel("predictive entropy (nats)")
    percent(ax, "y", 0.0, 1.02)
    ax.set_xlim(left=0)
    heading(ax, "Uncertainty, clean and attacked", "share of examples with at most this entropy")
    return ax


def reliability(
    predictions: Prediction | Mapping[str, Prediction], y: Labels, *, num_bins: int = 10, ax: Any = None
) -> Any:
    r"""Accuracy against confidence in bins of equal width, with Wilson intervals and the ECE.

    $$ \mathrm{ECE} = \sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b| $$

    Args:
        predictions: One, or several by name (clean, attacked).
        y: True classes, ``(batch,)``, of all of them.
        num_bins: Bins of the confidence.
        ax: Axes to draw on.

    Returns:
        The axes.

    References:
        Guo et al., 2017, [On Calibration of Modern Neural Networks](https://arxiv.org/abs/1706.04599)

    Examples:
        >>> import probdefense as pd
        >>> prediction = pd.predict(pd.deterministic(torch.nn.Linear(4, 3)), torch.rand(20, 4))
        >>> reliability(prediction, torch.randint(3, (20,))).get_xlabel()
        'confidence'
    """
    named = predictions if isinstance(predictions, Mapping) else {"": predictions}
    num_bins = check_count("num_bins", num_bins)
    if not named:
        raise ValueError("expected at least one prediction, got none; give predict(...) or several by name")
    for prediction in named.values():
        check_kind("predictions", prediction, Prediction, "probdefense.predict(...) makes one")
        check_log_probs(prediction.log_probs, y)
    ax = new_axes(ax, (5.2, 4.6))
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for number, ((name, prediction), color) in enumerate(zip(named.items(), cycle(len(named)), strict=True)):
        confidence, label = (np.asarray(v) for v in prediction.probs.cpu().max(-1))
        right = label == np.asarray(y.cpu())
        bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
        gap = 0.0
        for each in np.unique(bins):
            inside = bins == each
            mean, share = confidence[inside].mean(), right[inside].mean()
            gap += inside.mean() * abs(mean - share)
            ax.plot(
                [mean] * 2, wilson(right[inside].sum(), inside.sum()), color=color, linewidth=2, alpha=0.4
            )
            ax.plot(mean, share, "o", color=color, markersize=3 + 9 * inside.mean() ** 0.5)
        text = f"{name}\nECE {100 * gap:.1f} %".strip()
        note(ax, text, (1, 1), (8, -10 - 34 * number), xycoords="axes fraction", color=color, va="top")
    quiet(ax).set(xlabel="confidence", ylabel="accuracy", aspect="equal")
    percent(ax, "x")
    percent(ax, "y")
    heading(ax, "Reliability", "area of a dot: share of the examples")
    return ax


def image_grid(
    x: Inputs,
    x_adv: Inputs,
    *,
    titles: Sequence[str] | None = None,
    amplify: float | None = None,
    axes: Any = None,
) -> Any:
    r"""Images, attacked images, and the perturbation drawn as $1 - k |\delta|$: white is unchanged.

    Args:
        x: Clean images ``(batch, channels, height, width)`` in [0, 1]; the first eight are drawn.
        x_adv: Attacked images, like `x`.
        titles: One line per column, for example the label before and after.
        amplify: $k$; the factor that makes the largest change black by default.
        axes: ``(3, columns)`` axes to draw on.

    Returns:
        The axes, ``(3, columns)``.

    References:
        Liu et al., 2018, [Towards Robust Neural Networks via Random
        Self-ensemble](https://arxiv.org/abs/1712.00673), Fig. 7.

    Examples:
        >>> x = torch.rand(4, 1, 8, 8)
        >>> image_grid(x, (x + 0.1).clamp(0, 1)).shape
        (3, 4)
    """
    check_same(x_adv, check_inputs(x), "x_adv")
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"expected images (batch, 1 or 3 channels, height, width), got {tuple(x.shape)}; choose "
            "channels, or "
            "reshape vectors with x.view(-1, 1, height, width)"
        )
    if amplify is not None:
        check_positive("amplify", amplify)
    columns = min(len(x), 8)
    clean, attacked = (np.asarray(v[:columns].detach().cpu(), dtype=float) for v in (x, x_adv))
    change = np.abs(attacked - clean)
    factor = 1 / max(float(change.max()), 1e-12) if amplify is None else amplify
    if axes is None:
        from matplotlib import pyplot

        _, axes = pyplot.subplots(
            3, columns, figsize=(0.5 + 0.62 * columns, 2.2), layout="constrained", squeeze=False
        )
    rows = ("clean", clean), ("attacked", attacked), (f"change x {factor:.3g}", 1 - factor * change)
    for line, (name, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for ax, image in zip(line, images, strict=True):
            picture = np.moveaxis(image, 0, -1).clip(0, 1)
            ax.imshow(picture.squeeze(-1) if len(image) == 1 else picture, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_color(GRID)
    for ax, title in zip(axes[0], titles or (), strict=False):
        ax.set_title(title, fontsize=8)
    return axes


def loss_traces(losses: Mapping[str, np.ndarray], ax: Any = None) -> Any:
    """Loss over the steps of an attack or a training: the mean over draws, and a 90 % band between them.

    Args:
        losses: By name, arrays ``(steps, draws)`` or ``(steps,)``.
        ax: Axes to draw on.

    Returns:
        The axes.

    Examples:
        >>> loss_traces({"pgd": np.random.default_rng(0).normal(size=(40, 16))}).get_xlabel()
        'step'
    """
    tables = _tables(losses)
    ax, ends = new_axes(ax, (4.8, 3.6)), []
    colors = cycle(len(losses))
    for table, color in zip(tables, colors, strict=True):
        steps = np.arange(1, len(table) + 1)
        low, high = np.quantile(table, [0.05, 0.95], axis=1)
        ax.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(steps, table.mean(1), color=color, linewidth=2)
        ends.append(table[-1].mean())
    quiet(ax).set(xlabel="step", ylabel="loss")
    last = max(len(values) for values in losses.values())
    ax.set_xlim(1, last)
    label_ends(ax, list(losses), last, ends, colors)
    heading(ax, "Loss", "mean and 90 % band between draws")
    return ax


def _entropies(source: Any, name: str) -> np.ndarray:
    """Sorted entropies of a prediction, or those given."""
    found = getattr(source, "predictive_entropy", source)
    if not isinstance(found, Tensor | np.ndarray):
        raise TypeError(
            f"expected {name} as a Prediction or entropies (batch,), got {type(source).__name__}; "
            "probdefense.predict(...) makes one"
        )
    return np.sort(check_vector(torch.as_tensor(found).detach().cpu(), name).numpy())


def _tables(losses: Any) -> list[np.ndarray]:
    """Losses as arrays ``(steps, draws)``."""
    check_kind("losses", losses, Mapping, "give arrays by name")
    tables = []
    for name, values in losses.items():
        found = values.detach().cpu() if isinstance(values, Tensor) else values
        if (
            not isinstance(found, Tensor | np.ndarray | list | tuple)
            or np.asarray(found).dtype.kind not in "fiu"
        ):
            raise TypeError(
                f"expected {name!r} as numbers (steps, draws), got {type(values).__name__}; give an array"
            )
        table = np.asarray(found, dtype=float)
        tables.append(table.reshape(len(table), -1) if table.size else table)
    if not tables or any(table.size == 0 for table in tables):
        raise ValueError("expected at least one loss of at least one step, got none; leave empty ones out")
    return tables


def groups_of(tree: Any) -> set[str]:
    """Names of the groups of a container of either version of ArviZ.

    Raises:
        TypeError: something else.
    """
    if not hasattr(tree, "children") and not callable(getattr(tree, "groups", None)):
        raise TypeError(
            f"expected a container of to_arviz, got {type(tree).__name__}; to_arviz(...) makes one"
        )
    return set(tree.children) if hasattr(tree, "children") else set(tree.groups())
