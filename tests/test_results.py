"""Results: every script runs at its smallest scale, and every page says what its JSON file holds."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "reproduce"
sys.path.insert(0, str(FOLDER))
pages = importlib.import_module("pages")
lab = importlib.import_module("lab")
COMMITTED = sorted(file for file in pages.RESULTS.glob("*.json") if file.stem != "digits")


@pytest.mark.parametrize("item", pages.ITEMS)
def test_a_script_has_every_scale(item):
    script = importlib.import_module(item)
    assert set(script.SCALES) == {"smoke", "cpu", "gpu"}
    for sizes in script.SCALES.values():
        assert all(
            {"data", "images", "epochs", "seeds"} <= {*sizes, *world} for world in sizes.get("worlds", [{}])
        )
    assert (FOLDER / f"{item}.py").read_text().count("\n") < 260


@pytest.mark.examples
@pytest.mark.parametrize("item", pages.ITEMS)
def test_the_smallest_scale_makes_a_page(item, tmp_path, recwarn):
    script = importlib.import_module(item)
    made = lab.result(item, script.__doc__, "smoke", script.rows, script.SCALES, tmp_path)
    again = json.loads(json.dumps(made))
    check_result(again)
    assert f"| {again['rows'][0]['name']} |" in pages.page(again)


def check_result(result):
    """Everything that a figure needs to be believed."""
    assert {"settings", "seeds", "versions", "hardware", "cpu_seconds", "command"} <= set(result)
    for row in result["rows"]:
        value = next(row[key] for key in ("accuracy", "difference", "value") if key in row)
        assert row["low"] <= value <= row["high"], row


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_a_page_is_made_of_its_json(file):
    result = json.loads(file.read_text())
    check_result(result)
    assert result["scale"] != "smoke" and result["item"] == file.stem
    assert file.with_suffix(".md").read_text() == pages.page(result)
    script = importlib.import_module(file.stem)
    assert json.loads(json.dumps(dict(script.SCALES[result["scale"]]))) == result["settings"]


def test_the_overview_lists_every_item():
    text = (pages.RESULTS / "tables.md").read_text()
    assert [item for item in pages.ITEMS if item not in text] == []


def test_the_table_of_every_recipe_is_that_of_the_command():
    report = json.loads((pages.RESULTS / "digits.json").read_text())
    assert (pages.RESULTS / "digits.md").read_text() == pages.every_recipe(report)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in report["rows"])
    assert {"seed", "epochs", "gradients"} <= set(report["settings"])
