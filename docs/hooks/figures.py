"""Figures of executed pages: inline SVG that takes the page's colors, so that it can be read in the dark."""

import itertools
import sys
from typing import Any

from probdefense.analysis.drawings import inline_svg

sys.modules["figures"] = sys.modules[__name__]  # the pages say ``from figures import svg``
NUMBERS = itertools.count()


def svg(drawn: Any) -> str:
    """A figure, or the figure of axes, as a block of HTML; its ids differ from all others'."""
    figure = getattr(drawn.flat[0] if hasattr(drawn, "flat") else drawn, "figure", drawn)
    width = 1.45 * 72 * figure.get_figwidth()
    drawing = inline_svg(figure, f"plot{next(NUMBERS)}", bbox_inches="tight")
    return f'<div class="plot" style="max-width: {width:.0f}px">{drawing}</div>'
