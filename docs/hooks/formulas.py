"""Turns LaTeX into MathML while the site is built: no script and no download in the reader's browser.

MkDocs takes it as a hook, Zensical as an extension of Markdown; both see the HTML of a page.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with the HTML of every page."""
    return FORMULA.sub(_mathml, content)


class _Formulas(Postprocessor):
    def run(self, text: str) -> str:
        return on_page_content(text)


class _Extension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.postprocessors.register(_Formulas(md), "formulas", -1)  # last, when raw HTML stands in its place


def makeExtension(**_: Any) -> Extension:
    """Markdown calls this where ``formulas`` is among its extensions."""
    return _Extension()


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    formula = convert(html.unescape(match[3]), display=display)
    return f'<div class="formula">{formula}</div>' if display == "block" else formula
