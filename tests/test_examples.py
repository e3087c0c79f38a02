"""Every example script answers its question when it is called with ``--quick``."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = [script for script in SCRIPTS if script.stem != "mini_probdefense"]


def loaded(script):
    """The script as a module: importing it must do nothing."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.examples
@pytest.mark.parametrize("script", PROGRAMS, ids=lambda script: script.stem)
def test_main_prints_a_table(script, capsys):
    main = loaded(script).main
    assert inspect.signature(main).parameters["quick"].default is False
    main(quick=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and "nan" not in " ".join(lines)


@pytest.mark.examples
@pytest.mark.parametrize("name", ["mini_probdefense"])
def test_a_script_runs_by_itself(name):
    command = [sys.executable, "-W", "error::UserWarning", f"examples/{name}.py", "--quick"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) >= 3


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda script: script.stem)
def test_it_asks_one_question_in_few_lines(script):
    text = script.read_text()
    assert text.count("\n") <= 120
    assert "?" in text.split("\n")[0]
    assert '__name__ == "__main__"' in text and "--quick" in text.partition("__main__")[2]


@pytest.mark.parametrize("page", ["README.md", "docs/examples.md"])
def test_they_are_all_listed(page):
    text = (ROOT / page).read_text()
    assert [script.name for script in SCRIPTS if script.name not in text] == []
