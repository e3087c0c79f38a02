"""The command before it works: help and version in no time, errors that name their option."""

import io
import subprocess
import sys

import pytest

import probdefense
from probdefense.study import console
from tests.study.test_cli import run

WATCH = (
    "import sys\n"
    "try:\n    from probdefense.study.cli import main; main()\n"
    "finally:\n    print([name for name in ('torch', 'pyro', 'numpy') if name in sys.modules], file=sys.stderr)"
)


@pytest.mark.parametrize(
    "options", [["--help"], ["compare", "--help"], ["--version"], [], ["list", "--help"]]
)
def test_help_and_version_load_no_torch(options):
    answer = subprocess.run([sys.executable, "-c", WATCH, *options], capture_output=True, text=True)
    assert answer.stderr.splitlines()[-1] == "[]"
    assert answer.returncode == (0 if options else 2)
    assert "probdefense" in answer.stdout or "Usage" in answer.stdout


def test_paragraphs_of_the_help_fill_the_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    run(monkeypatch, "compare", "--help")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "posterior.nc; study.toml, which runs it again; and a folder defenses, with a" in lines


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "probdefense", "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == f"probdefense {probdefense.__version__}\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--defenses", "nun"], "--defenses"),
        (["--defenses", ""], "--defenses"),
        (["--attacks", "pdg"], "--attacks"),
        (["--data", "digitz"], "--data"),
        (["--data", "cifar10"], "--data"),
        (["--eps", "2"], "--eps"),
        (["--num-samples", "0"], "--num-samples"),
        (["--recipes", "absent.py"], "--recipes"),
    ],
)
def test_errors_name_their_option(options, named, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("PROBDEFENSE_DATA", raising=False)
    assert run(monkeypatch, "compare", *options, "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1


class Terminal(io.StringIO):
    """A screen."""

    def isatty(self):
        return True


def test_one_bar_with_the_time_left_on_a_terminal_else_lines(monkeypatch, capsys):
    def job():
        with console.progress(4, True) as (say, step):
            say("[1/1] none: a plain network")
            for _ in range(4):
                step()

    job()
    assert capsys.readouterr().err == "[1/1] none: a plain network\n"
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    job()
    assert "[1/1] none" in sys.stderr.getvalue() and "0:00:00" in sys.stderr.getvalue()
    assert "a plain network" not in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress(4, False) as (say, _):
        say("[1/1] none: a plain network")
    assert sys.stderr.getvalue() == ""
