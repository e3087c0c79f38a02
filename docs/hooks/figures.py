"""Figures of executed pages: inline SVG that takes the page's colors, so that it can be read in the dark."""

import io
import itertools
import re
import sys
from typing import Any

sys.modules["figures"] = sys.modules[__name__]  # the pages say ``from figures import svg``
NUMBERS = itertools.count()


def svg(drawn: Any) -> str:
    """A figure, or the figure of axes, as a block of HTML; its ids differ from all others'."""
    from matplotlib import pyplot, rc_context

    figure = getattr(drawn.flat[0] if hasattr(drawn, "flat") else drawn, "figure", drawn)
    text, width = io.StringIO(), 1.45 * 72 * figure.get_figwidth()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "probdefense"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    drawing = re.sub(r'\s(width|height)="[\d.]+pt"', "", drawing[drawing.index("<svg") :], count=2)
    drawing = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>plot{next(NUMBERS)}-", drawing)
    return f'<div class="plot" style="max-width: {width:.0f}px">{drawing}</div>'
