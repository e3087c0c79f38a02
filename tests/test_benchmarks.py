"""The page of benchmarks is what the command makes of its results."""

import json

import pytest
import torch

from benchmarks import __main__, measure, page


def test_every_row_of_the_targets_is_registered_with_its_target():
    wanted = set(page.TODAY)
    assert wanted <= measure.REGISTRY.keys()
    assert all(measure.REGISTRY[name].target is not None for name in wanted)


def test_the_page_is_made_of_the_results_and_of_nothing_else():
    sections = [page._section(path) for path in sorted(page.RESULTS.glob("*.json"))]
    assert page.PAGE.read_text() == page.HEAD + "\n".join(sections)
    rows = json.loads((page.RESULTS / "cpu.json").read_text())["rows"]
    assert set(page.TODAY) <= rows.keys()


def test_every_heading_of_the_page_stands_alone():
    """Right below a table Markdown would take it for a row."""
    lines = page.PAGE.read_text().splitlines()
    assert all(not lines[k - 1] for k, line in enumerate(lines) if k and line.startswith("#"))


@pytest.mark.parametrize(
    ("value", "target", "least", "said"),
    [(1.04, 1.05, False, "met"), (1.2, 1.05, False, "missed by 0.15"), (4.0, 5.0, True, "missed by 1.00")],
)
def test_a_row_says_by_how_much_it_misses(value, target, least, said):
    row = {"title": "a", "value": value, "target": target, "least": least}
    assert page._line("x", row).endswith(f"| {said} |")


def test_ratios_are_taken_within_rounds():
    times = {"ours": {"cpu": [2.0, 4.0, 9.0]}, "floor": {"cpu": [1.0, 2.0, 3.0]}}
    assert measure.ratio(times, "ours", "floor", "cpu") == [2.0, 2.0, 2.5]
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in ("floor", "ours")}
    found = measure.timed(variants, 2, torch.device("cpu"))
    assert calls == ["floor", "ours"] * 3 and len(found["ours"]["cpu"]) == 2


def test_the_command_lists_its_rows(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--list"])
    with pytest.raises(SystemExit, match="0"):
        __main__.main()
    assert "svi-cnn" in capsys.readouterr().err
