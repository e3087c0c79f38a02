"""Pictures inside a page: figures as SVG, and images with what an attack did to them as PNG."""

import base64
import io
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.prediction.predictive import Prediction
from probdefense.types import Inputs, Labels
from probdefense.validation import check_inputs, check_kind, check_labels, check_same

MOST = 8
"""So many images are shown."""


def inline_svg(figure: Any, prefix: str, **options: Any) -> str:
    """A figure as SVG for a page: no size of its own, ids that begin with the prefix; the figure is closed.

    Args:
        figure: Of matplotlib.
        prefix: Unique on the page.
        **options: Of ``savefig``.
    """
    from matplotlib import pyplot, rc_context

    text, options = io.StringIO(), {"bbox_inches": "tight", "pad_inches": 0.04} | options
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "probdefense"}), warnings.catch_warnings():
        # Letters stay letters, which the reader's browser draws with fonts of its own.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None}, **options)
    pyplot.close(figure)
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2)
    return re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)


class Card(NamedTuple):
    """One image before and after an attack: three pictures as data addresses, and what was answered."""

    labels: str
    fate: str
    probability: str
    wrong: bool
    clean: str
    attacked: str
    change: str


class Row(NamedTuple):
    """Images of one defense, failures first, and what their colors mean."""

    caption: str
    about: str
    cards: list[Card]


def attacked_row(
    caption: str, x: Inputs, x_adv: Inputs, y: Labels, before: Prediction, after: Prediction
) -> Row:
    """Images that were right and became wrong first; changes share one scale.

    Raises:
        ValueError: something that is not of these images, or no images of one or three channels.
    """
    check_same(x_adv, check_inputs(x), "x_adv")
    check_labels(y, len(x))
    for name, prediction in (("before", before), ("after", after)):
        check_kind(name, prediction, Prediction, "probdefense.predict(...) makes one")
        if len(prediction.log_probs) != len(x):
            raise ValueError(
                f"expected {name} of the {len(x)} images, got {len(prediction.log_probs)}; predict all"
            )
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"expected images (batch, 1 or 3 channels, height, width), got {tuple(x.shape)}; choose channels"
        )
    was, now = (prediction.label.cpu() for prediction in (before, after))
    y = y.cpu()
    order = sorted(range(len(x)), key=lambda k: (int(now[k] == y[k]), int(was[k] != y[k])))[:MOST]
    change = (x_adv - x).detach().cpu().mean(1)
    scale = max(float(change[order].abs().max()), 1e-12)
    cards = [
        Card(
            f"{int(was[k])} \N{RIGHTWARDS ARROW} {int(now[k])}",
            _fate(bool(was[k] == y[k]), bool(now[k] == y[k]), int(y[k])),
            f"{_top(before, k)} \N{RIGHTWARDS ARROW} {_top(after, k)}",
            bool(now[k] != y[k]),
            _png(x[k]),
            _png(x_adv[k]),
            _png(change[k], scale),
        )
        for k in order
    ]
    held = int((now == y).sum())
    about = (
        f"{held} of {len(x)} are right under attack, failures first. Change, mean over channels: red is "
        f"brighter, blue is darker, full color is {scale:.2g} in pixels, the same for all images of this row."
    )
    return Row(caption, about, cards)


def _fate(was_right: bool, is_right: bool, y: int) -> str:
    if was_right == is_right:
        return "stays right" if is_right else f"wrong before and after, it is {y}"
    return "becomes right" if is_right else "becomes wrong"


def _top(prediction: Prediction, k: int) -> str:
    return f"{100 * float(prediction.log_probs[k].max().exp()):.0f} %"


def _png(image: Tensor, scale: float | None = None) -> str:
    """An image ``(channels, height, width)``, or with a scale a signed change ``(height, width)``."""
    from matplotlib.image import imsave

    file, pixels = io.BytesIO(), np.asarray(image.detach().cpu().to(torch.float64))
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": None}}
    if scale is not None:
        imsave(file, pixels, cmap="RdBu_r", vmin=-scale, vmax=scale, **options)
    else:
        picture = np.moveaxis(pixels, 0, -1).clip(0, 1)
        imsave(file, picture.repeat(3, -1) if picture.shape[-1] == 1 else picture, **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
