"""The site and the docstrings: every public name has a page and a complete docstring, every link leads somewhere."""

import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

import probdefense

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAV = re.findall(r"(?:- |: )([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.M)

PACKAGES = ("", "attacks", "checks", "data", "defenses", "models", "objectives", "nn", "analysis", "numpyro")
MODULES = ("losses", "rules", "detection", "calibration")
INTERNAL = {
    "leads",
    "loss",
    "of_draws",
    "score_margin",
    "spread",
    "scale_free",
    "draws_per_verdict",
    "verdicts",
    "margins",
    "as_rule",
}
"""Functions of these modules that the library keeps to itself."""


def public_names():
    """Every public function and class, by the name under which users find it."""
    found = {}
    for package in PACKAGES:
        name = f"probdefense.{package}".rstrip(".")
        module = importlib.import_module(name)
        found |= {f"{name}.{each}": getattr(module, each) for each in module.__all__}
    for each in MODULES:
        module = getattr(probdefense, each)
        found |= {
            f"probdefense.{each}.{name}": value
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and name[0] != "_" and name not in INTERNAL
        }
    return {name: v for name, v in found.items() if inspect.isfunction(v) or inspect.isclass(v)}


PUBLIC = public_names()
DOCUMENTED = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in PAGES), re.M)


def resolve(path):
    """What the site finds under a dotted path: a module before a function of the same name."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AssertionError(path)


def test_every_public_name_has_a_page():
    described = [resolve(path) for path in DOCUMENTED]
    missing = [name for name, value in PUBLIC.items() if not any(value is each for each in described)]
    assert missing == []
    assert len(PUBLIC) > 90
    assert inspect.ismodule(resolve("probdefense.attacks.fgsm"))  # so its page must say fgsm.fgsm


def test_no_name_has_two_pages():
    assert len(DOCUMENTED) == len(set(DOCUMENTED))


def test_the_nav_and_the_pages_agree():
    assert len(NAV) == len(set(NAV)) > 40
    assert sorted(NAV) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def slug(title):
    """The anchor that the table of contents makes of a heading."""
    plain = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", title)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def prose(page):
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_internal_links_resolve(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if target[0].startswith(("http", "mailto")):
            continue
        other = (page.parent / target[0]) if target[0] else page
        assert other.is_file(), f"{page}: {target[0]}"
        if target[1]:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
            assert target[1][1:] in {slug(heading) for heading in headings}, f"{page}: {target}"
    for name in re.findall(r"\]\[(probdefense[\w.]*)\]", text):
        assert any(name == known or name.startswith(f"{known}.") for known in DOCUMENTED), f"{page}: {name}"
        resolve(name)


def test_the_address_is_that_of_the_package():
    """It stands in `[project.urls]`; elsewhere it is written out, and agrees."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    known = (urls["Source"], urls["Documentation"])
    texts = [ROOT / name for name in ("README.md", "mkdocs.yml", "CITATION.cff", "pyproject.toml")]
    address = re.compile(r"https://(?:github\.com/[\w.-]+/probdefense|[\w.-]+\.github\.io/)\b[^\s\"')>]*")
    found = [each for text in (*texts, *PAGES) for each in address.findall(text.read_text())]
    assert len(found) > 30 and [each for each in found if not each.startswith(known)] == []


def test_links_of_the_readme_are_absolute():
    """It is shown by the package index too, where no other file is."""
    text = prose(ROOT / "README.md")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 30 and [each for each in targets if not each.startswith(("https://", "#"))] == []


def test_formulas_are_an_extension_of_markdown_too(monkeypatch):
    """Zensical, which runs no hooks, takes them so."""
    pytest.importorskip("latex2mathml")
    markdown = pytest.importorskip("markdown")
    monkeypatch.setattr(sys, "path", [str(DOCS / "hooks"), *sys.path])
    options = {"pymdownx.arithmatex": {"generic": True}}
    made = markdown.markdown("$x^2$ and `$`", extensions=[*options, "formulas"], extension_configs=options)
    assert made.count("<math") == 1 and "<msup>" in made and "arithmatex" not in made
    assert "formulas" in (ROOT / "zensical.yml").read_text()


BLOCKS = re.compile(r"^```python exec=\"on\".*?^```$", re.DOTALL | re.MULTILINE)


def test_pages_are_wide_enough_for_their_code():
    for page in PAGES:
        for block in BLOCKS.findall(page.read_text()):
            assert max(map(len, block.splitlines())) <= 116, f"{page}: {block[:80]}"


# Docstrings

METHODS = [
    name
    for name in PUBLIC
    if name.startswith(("probdefense.attacks.", "probdefense.losses.", "probdefense.rules."))
] + [
    f"probdefense.{name}"
    for name in (
        *("certify", "certify_posterior", "rmc", "compare", "evaluate", "predict"),
        *(
            f"defenses.{each}"
            for each in ["rse", "bayesian", "pni", "mc_dropout", "ensemble", "jump_relu", "brelu"]
        ),
        *(
            f"objectives.{e}"
            for e in [
                "elbo",
                "multi_sample",
                "adversarial",
                "mixed",
                "trades",
                "distilled",
                "gaussian_augmented",
                "smooth_adversarial",
                "consistency",
                "stability",
            ]
        ),
    )
]
"""Names that come from a paper."""

OUR_OWN = {"probdefense.losses.predictive_log_odds"}
"""Methods without a paper."""

SLOW = ("analysis.", "numpyro.", "probdefense.models.resnet20")
"""Names whose example would draw, sample or train; the tutorials run them."""


def parameters(value):
    """What a caller may give: of a function, or of a class that is made by hand."""
    if inspect.isclass(value) and (hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")):
        return []
    names = inspect.signature(value).parameters.values()
    return [p.name for p in names if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def gaps(name, value):
    """What the docstring of a public name lacks."""
    doc = inspect.getdoc(value) or ""
    lines = doc.splitlines() or [""]
    if not lines[0].endswith((".", "$")) or (len(lines) > 1 and lines[1]):
        yield "one line"
    listed = parameters(value)
    if listed and "made by `" not in lines[0]:
        described = set(re.findall(r"^    (\w+): ", doc.partition("Args:")[2], re.M))
        if set(listed) - described:
            yield f"Args: {', '.join(sorted(set(listed) - described))}"
    if inspect.isfunction(value):
        answer = str(inspect.signature(value).return_annotation)
        if len(doc.splitlines()) > 8 and not re.search("None$|Iterator", answer) and "Returns:" not in doc:
            yield "Returns"
        if re.search(r"^    raise ", inspect.getsource(inspect.unwrap(value)), re.M) and "Raises:" not in doc:
            yield "Raises"
    if name in METHODS and name not in OUR_OWN and "References:" not in doc:
        yield "References"
    made_by_us = inspect.isclass(value) and not parameters(value)
    if ">>>" not in doc and not made_by_us and not any(word in name for word in SLOW):
        yield "Examples"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_are_complete(name):
    assert list(gaps(name, PUBLIC[name])) == []


def test_an_incomplete_docstring_is_found():
    def bare(x, y):
        """It has no period"""

    assert list(gaps("probdefense.attacks.bare", bare)) == ["one line", "Args: x, y", "Examples"]
