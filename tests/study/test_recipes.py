"""Recipes of one's own: found in files and packages, named like ours, refused in one sentence."""

import json
from importlib.metadata import EntryPoint

import pytest

from probdefense.study import Workshop, plugins, recipe
from probdefense.study.recipes import RECIPES
from tests.study.test_cli import run, small  # noqa: F401

MINE = """
import probdefense as pd
from probdefense.study import recipe

@recipe("{name}", about="noise of my own")
def mine(shop, sigma=0.1):
    return shop.fit(pd.defenses.rse(shop.net(), sigma_init=sigma, sigma_inner=0.05))
"""


WIDE = """
import torch
import probdefense as pd
from probdefense.study import recipe

class Seven:
    stochastic = False
    def __init__(self, members):
        self.members = members
    def __call__(self, x, num_samples=None):
        return torch.cat([member(x) for member in self.members])

@recipe("seven", about="seven networks, all of which answer")
def seven(shop):
    return Seven([shop.fit(shop.plain()) for _ in range(7)])
"""


@pytest.fixture(autouse=True)
def table():
    """The table as it was."""
    before = dict(RECIPES)
    yield
    RECIPES.clear()
    RECIPES.update(before)


def test_the_order_of_the_catalog():
    assert [*RECIPES][:2] == ["none", "fgsm_retraining"] and [*RECIPES][-1] == "rmc"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_recipe_of_a_file_is_a_row(processes, small, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr("probdefense.study.pool.cores", lambda: processes)
    name = f"mine_{processes}"
    (tmp_path / f"{name}.py").write_text(MINE.format(name=name))
    options = [
        "--recipes",
        str(tmp_path / f"{name}.py"),
        "--quick",
        "--attacks",
        "clean",
        "--num-samples",
        "2",
    ]
    assert run(monkeypatch, "compare", "--defenses", f"none,{name}", *options, "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["defense"] for row in rows} == {"none", name}


def test_answers_too_wide_for_the_suite_are_refused_before_training(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Workshop, "fit", lambda *_: pytest.fail("trained"))
    (tmp_path / "wide.py").write_text(WIDE)
    options = ["--recipes", str(tmp_path / "wide.py"), "--quick", "--attacks", "pgd"]
    assert run(monkeypatch, "compare", "--defenses", "seven", *options, "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert "--attacks: expected a budget of at least 1165 evaluations per image" in printed.err
    assert printed.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_list_shows_recipes_of_a_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "listed.py").write_text(MINE.format(name="listed"))
    assert run(monkeypatch, "list", "--recipes", str(tmp_path / "listed.py")) == 0
    assert "listed" in capsys.readouterr().out


def test_arguments_are_those_of_the_function():
    assert RECIPES["none"].arguments == {}
    assert RECIPES["rse"].arguments == {"sigma_init": 0.2, "sigma_inner": 0.1, "scale": "fixed"}
    assert RECIPES["bayesian"].notes(prior_scale=0.5) == {"prior": "Normal(0, 0.5)", "kl_weight": 1.0}


def test_a_name_is_taken_once_and_an_own_function_replaces_itself():
    def own(shop: Workshop):
        return shop.fit(shop.plain())

    for about in ("first", "second"):
        assert recipe("own", about=about)(own) is own
    assert RECIPES["own"].about == "second"
    with pytest.raises(ValueError, match="expected a new name for a recipe, got 'rse'"):
        recipe("rse", about="mine")(own)
    for name in ("all", "a-b", "", 3):
        with pytest.raises(ValueError, match="expected the name of a recipe"):
            recipe(name, about="mine")


def test_recipes_of_an_installed_package(monkeypatch):
    points = [EntryPoint("good", "tests.worlds:tiny_net", "probdefense.recipes")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == plugins.GROUP else [])
    plugins._installed.cache_clear()
    plugins.found(())
    points.append(EntryPoint("bad", "nowhere.at_all", "probdefense.recipes"))
    plugins._installed.cache_clear()
    with pytest.raises(ValueError, match=r"entry point bad = nowhere.at_all do not load \(ModuleNotFound"):
        plugins.found(())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "expected a Python file at"),
        ("x = 1", "without any; put @probdefense.study.recipe"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def", "raised SyntaxError"),
        ("from probdefense.study import recipe\n@recipe('rse', about='')\ndef f(shop): ...", "got 'rse'"),
    ],
)
def test_a_file_of_recipes_that_fails_is_one_sentence(text, match, monkeypatch, capsys, tmp_path):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    for command in (["compare", "--out", str(tmp_path / "out")], ["list"]):
        assert run(monkeypatch, *command, "--recipes", str(path)) == 2
        printed = capsys.readouterr()
        assert match in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "out").exists()
