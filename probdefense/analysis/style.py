"""How our plots look: quiet frames, colors that the color-blind can tell apart, labels at the data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""After Okabe and Ito, 2008, Color Universal Design, without black and yellow."""

MUTED = "#7a828b"
GRID = "#80808040"
"""Both can be seen on light and on dark; other text has the color of the running matplotlib style."""


def cycle(count: int) -> list[str]:
    """That many colors."""
    return [COLORS[k % len(COLORS)] for k in range(count)]


def new_axes(ax: Any, size: tuple[float, float]) -> Any:
    """The given axes, or those of a new figure of a size in inches."""
    if ax is None:
        from matplotlib import pyplot

        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    return ax


def quiet(ax: Any, grid: str = "y") -> Any:
    """No box, muted ticks, and a light grid along one axis."""
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(side == ("bottom" if grid == "y" else ""))
    ax.spines["bottom"].set_color(MUTED)
    ax.tick_params(length=0, pad=6)
    ax.grid(axis=grid, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def heading(ax: Any, title: str, subtitle: str = "") -> None:
    """What the picture says in bold, and what it is made of beneath."""
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=24 if subtitle else 8)
    note(ax, subtitle, (0, 1), (0, 8), xycoords="axes fraction", color=MUTED, fontsize=8.5)


def note(ax: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    """Text at an offset in points from a place in the data (or in other coordinates)."""
    options = {"fontsize": 9, "annotation_clip": False, "parse_math": False} | options
    ax.annotate(text, at, xytext=offset, textcoords="offset points", **options)


def short(name: str, most: int = 32) -> str:
    """A name for a picture, its end left out where it would leave no room for the data."""
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def percent(ax: Any, axis: str, low: float = 0.0, high: float = 1.0) -> None:
    """An axis of shares, in percent."""
    from matplotlib.ticker import PercentFormatter

    chosen = ax.xaxis if axis == "x" else ax.yaxis
    chosen.set_major_formatter(PercentFormatter(1.0, decimals=0))
    (ax.set_xlim if axis == "x" else ax.set_ylim)(low, high)


def label_ends(
    ax: Any, names: Sequence[str], x: float, heights: Sequence[float], colors: Sequence[str]
) -> None:
    """Names beside the ends of lines at `x`, moved apart vertically where they would overlap."""
    low, high = ax.get_ylim()
    gap = 0.065 * (high - low)
    order = np.argsort(heights)
    placed = np.array(heights, dtype=float)[order]
    for _ in range(100):  # push neighbors apart until all have room
        for k in range(1, len(placed)):
            overlap = gap - (placed[k] - placed[k - 1])
            if overlap > 0:
                placed[k - 1 : k + 1] += np.array([-overlap / 2, overlap / 2])
        placed = placed.clip(low, high)
    for height, k in zip(placed, order, strict=True):
        note(ax, names[k], (x, height), (6, 0), color=colors[k], va="center")
