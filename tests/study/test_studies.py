"""Study files: what they may say, what they refuse, and that they run again to the same bytes."""

import json
import math
import tomllib

import pytest

from probdefense.study import job, studies
from probdefense.study.job import Request
from tests.study.test_cli import run, small  # noqa: F401

STUDY = """
quick = true
num_samples = 4
images = 12
gradients = 16
seeds = [3]

[training]
images = 160
epochs = 1
batch_size = 32

[[defense]]
recipe = "none"

[[defense]]
recipe = "rse"
sigma_init = 0.1

[[defense]]
recipe = "rse"
name = "loud"
sigma_init = 0.3
learning_rate = 0.01

[[attack]]
attack = "pgd"
name = "short"
num_steps = 3
"""


def compared(monkeypatch, *options):
    return run(monkeypatch, "compare", *map(str, options))


@pytest.mark.slow
def test_a_study_runs_and_runs_again_to_the_same_bytes(small, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "mine.toml").write_text(STUDY)
    assert compared(monkeypatch, "--study", tmp_path / "mine.toml", "--out", tmp_path / "a") == 0
    again = tmp_path / "a" / "study.toml"
    assert compared(monkeypatch, "--study", again, "--out", tmp_path / "b") == 0
    for name in ("report.json", "study.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert [*dict.fromkeys(row["defense"] for row in report["rows"])] == ["none", "rse", "loud"]
    assert [*dict.fromkeys(row["attack"] for row in report["rows"])] == ["clean", "short", "suite", "worst"]
    short = next(row for row in report["rows"] if row["attack"] == "short")
    assert short["gradients"] == 3 * 12
    settings = report["settings"]
    assert settings["seed"] == 3 and settings["training"]["batch_size"] == 32
    assert settings["defense_arguments"]["loud"] == {"of": "rse", "sigma_init": 0.3}
    assert settings["training"]["learning_rate"] == {"none": 8e-3, "rse": 32e-3, "loud": 0.01}
    effective = tomllib.loads(again.read_text())
    assert effective["training"]["inner_steps"] == 4 and effective["data"] == "digits"
    assert effective["defense"][1] == {
        "recipe": "rse",
        "name": "rse",
        "sigma_init": 0.1,
        "sigma_inner": 0.1,
        "scale": "fixed",
    }


def test_the_study_of_the_defaults_is_the_default(monkeypatch):
    request, _ = job.prepare(Request(("none", "madry"), ("eot_pgd",)))
    again, _ = job.prepare(Request(**{**vars(Request((), ())), **read_text(studies.written(request))}))
    assert studies.written(again) == studies.written(request)
    for name in ("defenses", "attacks", "size", "plan", "radius", "variants", "shots", "all_seeds", "norm"):
        assert getattr(again, name) == getattr(request, name), name


def read_text(text, folder=None):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "study.toml"
        path.write_text(text)
        return studies.read(path)


def test_options_count_more_than_the_file(small, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "mine.toml").write_text(STUDY)
    options = ["--defenses", "none", "--attacks", "clean", "--seed", "5", "--num-samples", "2"]
    assert compared(monkeypatch, "--study", tmp_path / "mine.toml", *options, "--out", tmp_path) == 0
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert settings["defenses"] == ["none"] and settings["seed"] == 5 and settings["num_samples"] == 2
    assert settings["training"]["batch_size"] == 32


def test_norms_and_texts():
    assert read_text('norm = "2"\neps = 1')["norm"] == 2
    assert read_text("norm = 1\neps = 1")["norm"] == 1
    assert read_text('norm = "inf"')["norm"] == math.inf
    assert studies._toml('a "b"\\ü') == '"a \\"b\\"\\\\ü"'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("dta = 'digits'", r"unknown key 'dta' in .*did you mean 'data'\?"),
        ("[trainng]\nepochs = 1", "did you mean 'training'"),
        ("[training]\nepoch = 1", "did you mean 'epochs'"),
        ("[training]\nepochs = 'ten'", "expected epochs in .* as a whole number"),
        ("[training]\nepochs = 0", "expected epochs in .* >= 1"),
        ("[training]\nlearning_rate = -1.0", "learning_rate in"),
        ("[training]\nweight_average = 1.0", "weight_average in"),
        ("training = 3", r"expected \[training\] as a table"),
        ("[[defense]]\nrecipe = 'rse'\nsigma_int = 0.1", "did you mean 'sigma_init'"),
        (
            "[[defense]]\nrecipe = 'rse'\nsigma_init = 'loud'",
            "expected sigma_init in the defense rse as a number",
        ),
        ("[[defense]]\nrecipe = 'rsee'", "unknown defense 'rsee'"),
        ("[[defense]]\nname = 'x'", r"expected recipe in every \[\[defense\]\]"),
        ("[[defense]]\nrecipe = 'rse'\nname = 'a/b'", "expected the name of a defense"),
        ("[[defense]]\nrecipe = 'rse'\n[[defense]]\nrecipe = 'rse'", "got 'rse' twice"),
        ("defense = 'rse'", r"expected \[\[defense\]\]"),
        ("[[defense]]\nrecipe = 'rse'\nsigma_init = -1.0", "sigma_init"),
        ("[[attack]]\nattack = 'pgd'\nnum_step = 3", "did you mean 'num_steps'"),
        ("[[attack]]\nattack = 'pdg'", "unknown attack 'pdg'"),
        ("[[attack]]\nattack = 'pgd'\nnum_steps = 0", "expected num_steps >= 1, got 0"),
        ("[[attack]]\nattack = 'mim'\nmomentum = -1.0", "momentum"),
        ("[[attack]]\nattack = 'suite'\nbudget = 166", "at least 167 evaluations .* on none, got 166"),
        (
            "[[defense]]\nrecipe = 'rse'\n[[attack]]\nattack = 'suite'\nname = 'short'\nbudget = 914",
            "at least 915 evaluations per image for the suite on rse, got 914",
        ),
        ("check_gradients = 9", "expected check_gradients >= 10, got 9"),
        ("images = 0", "expected images >= 1"),
        ("images = 1.5", "expected images in .* as a whole number"),
        ("norm = '3'", "unknown norm '3'"),
        ("norm = '2'", "expected --eps, the radius"),
        ("seeds = []", "expected at least one seed"),
        ("seeds = 3", "expected seeds as whole numbers in brackets"),
        ("seeds = [0, 0]", "expected --seeds that differ"),
        ("recipes = 'mine.py'", "expected recipes as texts in brackets"),
        ("eps = inf", "expected eps in .* as a finite number"),
        ("net = 'smal_cnn'", "unknown network 'smal_cnn'"),
        ("net = 'resnet20'", "resnet20 does not take images of shape"),
        ("device = 'gpu'", "expected auto, cpu, cuda"),
        ("x =", "expected a study in TOML"),
        (None, "No such file"),
    ],
)
def test_a_bad_study_is_one_sentence_and_exit_2(text, match, monkeypatch, capsys, tmp_path):
    path, out = tmp_path / "bad.toml", tmp_path / "out"
    if text is not None:
        path.write_text(text)
    assert compared(monkeypatch, "--study", path, "--out", out) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.out == "" and not out.exists()
    assert __import__("re").search(match, printed.err), printed.err
