"""Pages whose commands are run as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from tests.study.test_cli import run, small  # noqa: F401

DOCS = Path(__file__).parents[2] / "docs" / "howto"
FILES = re.compile(r"^```\w+ title=\"(\S+)\"\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["study", "add-a-defense"])
def test_the_commands_of_a_page_do_what_it_says(page, small, monkeypatch, tmp_path):  # noqa: F811
    text = (DOCS / f"{page}.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.findall(text):
        Path(name).write_text(content)
    commands = [shlex.split(line) for block in COMMANDS.findall(text) for line in block.splitlines()]
    ours = [words for words in commands if words[0] == "probdefense"]
    assert ours and all(words[0] in ("probdefense", "torchrun") for words in commands)
    for words in ours:
        assert run(monkeypatch, *words[1:]) == 0, words
    if page == "study":
        assert Path("out/report.json").read_bytes() == Path("again/report.json").read_bytes()


def test_a_defense_and_an_attack_take_25_lines():
    ((_, content),) = FILES.findall((DOCS / "add-a-defense.md").read_text())
    assert len([line for line in content.splitlines() if line]) <= 25
