"""The tutorial on ArviZ runs under the version that is here; its plots are those that both versions have."""

import re
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "tutorials" / "arviz.md").read_text()


@pytest.mark.examples
def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(DOCS / "hooks"), *sys.path])
    names: dict = {}
    for block in re.findall(r'^```python exec="on"[^\n]*\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE):
        exec(block, names)
    printed = capsys.readouterr().out
    assert printed.count("<svg") == 4 and "elpd_loo" in printed and "weight_rms[1.weight]" in printed


def test_it_shows_what_a_user_of_arviz_asks_for():
    for name in ("plot_trace", "plot_ppc", "plot_forest", "plot_khat", "loo", "compare", "psens"):
        assert name in PAGE


@pytest.mark.parametrize("path", sorted((DOCS / "howto").glob("path-*.md")), ids=lambda path: path.stem)
def test_a_users_path_is_one_screen(path):
    (block,) = re.findall(
        r'^```python exec="on"[^\n]*\n(.*?)^```$', path.read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(block.splitlines()) <= 25
