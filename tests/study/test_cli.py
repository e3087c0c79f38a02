"""The command as its user meets it: what it prints, what it refuses and how it ends."""

import json
import subprocess
import sys

import pytest

from probdefense.study import cli, job

SMALL = {"epochs": 1, "gradients": 16, "images": 12, "checked": 12, "check_gradients": 16, "votes": 20}


def run(monkeypatch, *arguments: str) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["probdefense", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(job, "QUICK", SMALL)


def test_compare_prints_the_table_and_writes(small, monkeypatch, capsys, tmp_path):
    options = ["--quick", "--defenses", "none,rse", "--attacks", "pgd", "--num-samples", "4"]
    assert run(monkeypatch, "compare", *options, "--out", str(tmp_path)) == 0
    printed = capsys.readouterr()
    for text in (
        "accuracy in %",
        "rse",
        "mean_prob",
        "certified",
        "checks, none",
        "pairs under",
        "report.html",
    ):
        assert text in printed.out
    assert "[2/2] rse" in printed.err
    assert (tmp_path / "report.json").exists()


def test_compare_prints_json(small, monkeypatch, capsys, tmp_path):
    options = ["--quick", "--defenses", "none", "--attacks", "fgsm", "--json", "--out", str(tmp_path)]
    assert run(monkeypatch, "compare", *options) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "report.json").read_text()
    assert [row["attack"] for row in json.loads(printed)["rows"]][::2] == ["clean", "fgsm"]


def test_no_posterior_is_said(small, monkeypatch, capsys, tmp_path):
    options = ["--quick", "--defenses", "none", "--attacks", "clean", "--out", str(tmp_path)]
    assert run(monkeypatch, "compare", *options) == 0
    assert "no posterior.nc" in capsys.readouterr().out


def test_list_names_everything(monkeypatch, capsys):
    assert run(monkeypatch, "list") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("adv_bnn", "adversarial", "eot_pgd", "fashion-mnist"))
    assert run(monkeypatch, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == job.catalog()


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "version") == 0
    assert "pyro-ppl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["compare", "--defenses", "nun"], "unknown defense 'nun'"),
        (["compare", "--attacks", "pdg"], "unknown attack 'pdg'"),
        (["compare", "--data", "digitz"], "unknown data set"),
        (["compare", "--eps", "-1"], "eps"),
        (["compare", "--eps", "nan"], "eps"),
        (["compare", "--num-samples", "0"], "num_samples"),
        (["compare", "--num-samples", "many"], "integer"),
        (["compare", "--nonsense"], "nonsense"),
        (["compare", "--data", "cifar10", "--data-root", "/nonexistent"], "cifar"),
        (["comprae"], "comprae"),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_2(arguments, match, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = [*arguments, "--out", str(out)] if arguments[0] == "compare" else arguments
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert match in printed.err and printed.err.count("\n") == 1 and printed.err.startswith("probdefense:")
    assert printed.out == ""
    assert not out.exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_out_that_cannot_be_written(place, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("here")
    assert run(monkeypatch, "compare", "--out", str(tmp_path / place)) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "here"


def test_running_on_digits_loads_neither_torchvision_nor_numpyro():
    code = (
        "import sys, pathlib\n"
        "from probdefense.study import job\n"
        f"job.QUICK.update({SMALL!r})\n"
        "request, data = job.prepare(job.Request(('none',), ('pgd',), quick=True))\n"
        "job.run(request, data)\n"
        "print([name for name in ('torchvision', 'numpyro', 'jax') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
