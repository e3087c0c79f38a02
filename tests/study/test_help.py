"""The command before it works: help and version in no time, errors that name their option."""

import subprocess
import sys

import pytest

import probdefense
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
