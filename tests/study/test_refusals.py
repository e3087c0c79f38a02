"""What the commands refuse: one sentence that names the option, exit code 2, and nothing half-written."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import probdefense as pd
from probdefense import files
from probdefense.evaluation import journal
from tests.study.test_cli import run

FILE = """
import sys
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
import probdefense as pd

class Own(nn.Linear):
    pass

net = nn.Sequential(nn.Flatten(), Own(64, 10))
noisy = pd.defenses.rse(net, sigma_init=0.25, before_linear=True)
number = 3

def answers(x, num_samples):
    return torch.zeros(num_samples or 1, len(x), 10)

def raising():
    raise RuntimeError("no network today")

def needy(size):
    return nn.Linear(size, 10)

def three():
    return 3

def odd(x, num_samples):
    return torch.zeros(len(x), 10)

def nothing(x, num_samples):
    return torch.full((num_samples or 1, len(x), 10), torch.nan)

class Wide:
    stochastic = False

    def __call__(self, x, num_samples=None):
        return torch.zeros(8, len(x), 10)

wide = Wide()

class Alike:
    stochastic = False

    def __call__(self, x, num_samples=None):
        return torch.zeros(1, len(x), 10)

alike = Alike()

def late(x, num_samples):
    return answers(x, num_samples) / (len(x) < 3)  # two images are fine, a chunk is not

class Torn(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i > 3:
            raise OSError(5, "Input/output error", "image")
        return torch.rand(1, 8, 8), 0

def pair(x, y):
    return (TensorDataset(x, y),) * 2

x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
large = pair(torch.rand(12, 1, 9, 9), y)
many = pair(x, torch.arange(12))
bytes_ = pair((255 * x).byte(), y)
bright = pair(3 * x, y)
floats = pair(x, y.float())
torn = Torn(), Torn()

def uneven():
    return pair(x, y[:5])
"""


FEW = """
import torch
from torch.nn import Linear
from probdefense.attacks import pgd

class Net(Linear):
    def __init__(self):
        super().__init__(64, 10)

def make():
    return Net()

made = Net()

def needy(x, size, depth):
    return Linear(size, depth)

def judge(x, num_samples):
    return torch.zeros(num_samples, len(x), 10)

words = "words"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with files that are good, and files that are not; the command runs there."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "raising.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "nothing.py").write_text("")
    (tmp_path / "few.py").write_text(FEW)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.py").mkdir()
    save_file({"weight": torch.zeros(3)}, tmp_path / "alone.safetensors")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    defense = pd.defenses.rse(net, sigma_init=0.25, before_linear=True)
    pd.save(defense, tmp_path / "good.safetensors")
    pd.save(pd.deterministic(net), tmp_path / "plain.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "changed.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "noise.safetensors").write_bytes(os.urandom(500))
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).state_dict(), tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "net.pt").read_bytes()[:200])

    class Own(nn.Linear):
        pass

    pd.save(pd.deterministic(nn.Sequential(nn.Flatten(), Own(64, 10))), tmp_path / "own.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROBDEFENSE_DATA", raising=False)
    return tmp_path


TARGETS = {
    "absent": ("absent.safetensors", "which is neither"),
    "nearly there": ("god.safetensors", "which is neither; did you mean good.safetensors?"),
    "without its ending": ("good", "did you mean good.safetensors?"),
    "a folder": (".", "which is neither"),
    "a folder by name": ("folder", "which is neither: folder is a folder"),
    "no name at all": (
        "few.py",
        "got few.py without a name; it has Net, make, made and judge: give few.py:Net",
    ),
    "a file of nothing": ("nothing.py", "nothing in it is a network, a Defense"),
    "a file of a folder": ("folder.py:net", "expected a Python file at folder.py"),
    "cut": ("cut.safetensors", "a part of one"),
    "changed": ("changed.safetensors", "its checksum differs"),
    "noise": ("noise.safetensors", "got something else"),
    "empty": ("empty.safetensors", "got something else: it is empty"),
    "of torch.save": ("net.pt", "got one of torch.save"),
    "weights alone": ("net.pt", "give the function that makes it, FILE.py:NAME --weights net.pt"),
    "weights of others": ("alone.safetensors", "FILE.py:NAME --weights alone.safetensors"),
    "code of one's own": ("own.safetensors", "FILE.py:NAME --weights own.safetensors"),
    "no file": ("absent.py:net", "expected a Python file at absent.py"),
    "nearly a file": ("mime.py:net", "give it as FILE.py:NAME; did you mean mine.py?"),
    "raising": ("raising.py:net", "raised ZeroDivisionError: division by zero"),
    "leaving": ("leaving.py:net", "raised SystemExit: bye"),
    "syntax": ("syntax.py:net", "raised SyntaxError"),
    "syntax without a name": ("syntax.py", "raised SyntaxError: invalid syntax (syntax.py, line 1)"),
    "no name": ("mine.py:nets", "expected 'nets' in mine.py"),
    "nearly a name": ("few.py:mak", "got a file of Net, make, made, needy, judge, words; did you mean make?"),
    "no name of the file": ("nothing.py:net", "got a file of nothing; name one"),
    "a module": ("few.py:torch", "got module"),
    "an attack": ("few.py:pgd", "got a function of (logits_fn, x, y, eps); it has Net, make, made and judge"),
    "words": ("few.py:words", "got str 'words'; it has Net"),
    "an empty name": ("mine.py:", "expected '' in mine.py"),
    "a raising function": ("mine.py:raising", "raising() of mine.py raised RuntimeError: no network today"),
    "a number": ("mine.py:number", "got int"),
    "a function of a number": ("mine.py:three", "got int"),
}


def refused(capsys, monkeypatch, place, *arguments):
    """The one sentence of a command that does nothing."""
    before = sorted(place.rglob("*"))
    code = run(monkeypatch, *arguments)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, ""), printed.err
    assert printed.err.startswith("probdefense:") and printed.err.count("\n") == 1
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts) == before
    return printed.err


@pytest.mark.parametrize("command", ["evaluate", "certify"])
@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_are_none_are_refused(name, command, place, monkeypatch, capsys):
    where, said = TARGETS[name]
    sentence = refused(capsys, monkeypatch, place, command, where)
    assert said in sentence and "TARGET" in sentence


OPTIONS = [
    ("mine.py:net", ["--weights", "absent.pt"], "--weights", "No such file"),
    ("mine.py:net", ["--weights", "nett.pt"], "--weights", "No such file; did you mean net.pt?"),
    ("mine.py:net", ["--weights", "folder"], "--weights", "got the folder folder; give a file in it"),
    ("mine.py:net", ["--weights", "empty.safetensors"], "--weights", "it is empty"),
    ("good.safetensors", ["--data", "mine.py"], "--data", "stl10, your FILE.py:NAME"),
    ("mine.py:net", ["--weights", "cut.pt"], "--weights", "a part of a file"),
    ("mine.py:net", ["--weights", "other.pt"], "--weights", "1.weight (3, 64) for (10, 64)"),
    ("mine.py:net", ["--weights", "cut.safetensors"], "--weights", "a part of a file"),
    ("mine.py:net", ["--weights", "changed.safetensors"], "--weights", "its checksum differs"),
    ("mine.py:noisy", ["--weights", "net.pt"], "--weights", "got one of torch.save"),
    ("mine.py:noisy", ["--weights", "plain.safetensors"], "--weights", "another at"),
    ("mine.py:answers", ["--weights", "net.pt"], "--weights", "which --weights can fill, got function"),
    ("good.safetensors", ["--weights", "net.pt"], "--weights", "which holds its own"),
    ("good.safetensors", ["--data", "digitz"], "--data", "unknown data set"),
    ("good.safetensors", ["--data", "cifar10"], "--data", "--data-root"),
    ("good.safetensors", ["--data", "folder:absent"], "--data", "absent"),
    ("good.safetensors", ["--data", "raising.py:data"], "--data", "ZeroDivisionError"),
    ("good.safetensors", ["--data", "mine.py:number"], "--data", "as a pair (train, test)"),
    ("good.safetensors", ["--data", "mine.py:uneven"], "--data", "uneven() of mine.py raised"),
    ("good.safetensors", ["--data", "mine.py:large", "--eps", "0.1"], "--data", "shape (1, 9, 9)"),
    ("good.safetensors", ["--data", "mine.py:many", "--eps", "0.1"], "--data", "labels below 10"),
    ("good.safetensors", ["--data", "mine.py:bytes_", "--eps", "0.1"], "--data", "divide integer images"),
    ("good.safetensors", ["--data", "mine.py:bright", "--eps", "0.1"], "--data", "[0, 1]"),
    ("good.safetensors", ["--data", "mine.py:floats", "--eps", "0.1"], "--data", "int64"),
    ("good.safetensors", ["--data", "mine.py:torn", "--eps", "0.1"], "--data", "Input/output error"),
    ("mine.py:odd", [], "--data", "logits"),
    ("mine.py:nothing", [], "--data", "NaN"),
    ("good.safetensors", ["--images", "0"], "--images", ">= 1"),
    ("good.safetensors", ["--images", "few"], "--images", "integer"),
    ("good.safetensors", ["--chunk-size", "-1"], "--chunk-size", ">= 1"),
    ("good.safetensors", ["--seed", "-1"], "--seed", ">= 0"),
    ("good.safetensors", ["--device", "tpu"], "--device", "expected auto, cpu, cuda or cuda:N"),
    ("good.safetensors", ["--device", "cuda:99"], "--device", "cpu is always there"),
    ("good.safetensors", ["--nonsense"], "--nonsense", ""),
]


@pytest.mark.parametrize("command", ["evaluate", "certify"])
@pytest.mark.parametrize(("target", "options", "named", "said"), OPTIONS)
def test_options_that_do_not_fit_are_refused(
    command, target, options, named, said, place, monkeypatch, capsys
):
    if command == "certify" and "--eps" in options:
        options = options[:-2]
    sentence = refused(capsys, monkeypatch, place, command, target, *options)
    assert named in sentence and said in sentence


@pytest.mark.parametrize(
    ("command", "options", "named", "said"),
    [
        *(("evaluate", ["--eps", eps], "--eps", "pixels") for eps in ("0", "-1", "nan", "2", "inf")),
        ("evaluate", ["--eps", "8/255"], "--eps", "0.0314"),
        ("evaluate", ["--norm", "3"], "--norm", "unknown norm '3'"),
        ("evaluate", ["--norm", "2"], "--eps", "usual one, for the norm inf"),
        ("evaluate", ["--attacks", "pdg"], "--attacks", "unknown attack 'pdg'"),
        ("evaluate", ["--attacks", "raising.py:a"], "--attacks", "ZeroDivisionError"),
        ("evaluate", ["--attacks", "mine.py:number"], "--attacks", "'number'"),
        ("evaluate", ["--num-samples", "0"], "--num-samples", ">= 1"),
        ("evaluate", ["--name", "a/b"], "--name", "without '/'"),
        ("evaluate", ["--name", "worst"], "--name", "other than 'clean' and 'worst'"),
        ("certify", ["--alpha", "0"], "--alpha", "> 0"),
        ("certify", ["--alpha", "1.5"], "--alpha", "< 1"),
        ("certify", ["--num-draws", "0"], "--num-draws", ">= 1"),
        ("certify", ["--n0", "0"], "--n0", ">= 1"),
    ],
)
def test_numbers_out_of_range_are_refused(command, options, named, said, place, monkeypatch, capsys):
    sentence = refused(capsys, monkeypatch, place, command, "good.safetensors", *options)
    assert named in sentence and said in sentence


def test_a_target_without_a_fingerprint_is_refused(place, monkeypatch, capsys):
    sentence = refused(capsys, monkeypatch, place, "evaluate", "mine.py:alike", "--attacks", "fgsm")
    assert "TARGET: 'alike' cannot be told from others" in sentence


def test_answers_too_wide_for_the_suite_are_refused(place, monkeypatch, capsys):
    sentence = refused(capsys, monkeypatch, place, "evaluate", "mine.py:wide")
    assert "--attacks" in sentence and "at least 1331 evaluations per image for the suite on wide" in sentence


@pytest.mark.parametrize("target", ["plain.safetensors", "mine.py:net", "mine.py:answers"])
def test_what_has_no_certificate_says_so(target, place, monkeypatch, capsys):
    assert "sigma_init=0.25" in refused(capsys, monkeypatch, place, "certify", target)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["absent"], "found no absent/report.json"),
        (["damaged"], "got damaged ones"),
        (["torn"], "got arrays of another"),
        (["odd"], "expected a certificate in odd/certificate.json"),
        ([], "DIR"),
    ],
)
def test_folders_without_a_report_are_refused(folders, said, place, monkeypatch, capsys):
    x, y = torch.rand(4, 2), torch.zeros(4).long()
    report = pd.evaluate(pd.deterministic(nn.Linear(2, 3)), (x, y))
    for name in ("damaged", "torn", "odd"):
        report.save(place / name)
    (place / "damaged" / "report.json").write_text("{")
    (place / "torn" / "report.json").write_text(
        (place / "odd" / "report.json").read_text().replace("0.95", "0.9")
    )
    (place / "odd" / "certificate.json").write_text("[]")
    sentence = refused(capsys, monkeypatch, place, "report", *folders)
    assert "DIR" in sentence and said in sentence


def test_numbers_that_are_none_end_the_work_in_one_sentence(place, monkeypatch, capsys):
    options = ("--images", "6", "--attacks", "clean", "--num-samples", "2", "--out", "out")
    assert run(monkeypatch, "evaluate", "mine.py:late", *options) == 2
    printed = capsys.readouterr()
    assert "NaN" in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not list(place.glob("out/*.*"))


FAST = ("good.safetensors", "--images", "6", "--chunk-size", "2", "--out", "out")
EVALUATE = ("evaluate", *FAST, "--attacks", "fgsm", "--num-samples", "2")
CERTIFY = ("certify", *FAST, "--num-draws", "20", "--n0", "5")


@pytest.mark.parametrize("asked", [EVALUATE, CERTIFY])
def test_a_journal_of_something_else_is_refused(asked, place, monkeypatch, capsys):
    assert run(monkeypatch, *asked) == 0
    capsys.readouterr()
    sentence = refused(capsys, monkeypatch, place, *asked, "--seed", "5")
    assert "--out" in sentence and "is of another evaluation: seed differ" in sentence


@pytest.mark.parametrize("asked", [EVALUATE, CERTIFY])
@pytest.mark.parametrize("where", ["good.safetensors", "good.safetensors/below"])
def test_an_out_that_is_a_file_is_refused(asked, where, place, monkeypatch, capsys):
    options = [*asked[: asked.index("--out") + 1], where, *asked[asked.index("--out") + 2 :]]
    assert "--out" in refused(capsys, monkeypatch, place, *options)


def full(monkeypatch, module, name, free):
    """A disk with room for so many files more."""
    real, left = getattr(module, name), [free]

    def short(path, *rest):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *rest)

    monkeypatch.setattr(module, name, short)


@pytest.mark.parametrize(("asked", "result"), [(EVALUATE, "report.json"), (CERTIFY, "certificate.json")])
def test_a_full_disk_keeps_what_is_finished(asked, result, place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        full(patch, journal, "whole", 3)
        assert run(patch, *asked) == 2
    sentence = capsys.readouterr().err
    assert "cannot write to out (No space left on device)" in sentence and "--out" in sentence
    assert sentence.count("\n") == 1
    kept = {path: path.stat().st_mtime_ns for path in place.glob("out/journal*/*.npz")}
    assert len(kept) == 2 and not (place / "out" / result).exists()
    assert run(monkeypatch, *asked) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing was done twice"
    (journal_,) = place.glob("out/journal*")
    parts = len(list(journal_.glob("*.npz")))
    said = f"finished before, in {journal_.relative_to(place)}: "
    assert capsys.readouterr().err == f"{said}2 of {parts} parts\n"
    assert run(monkeypatch, *asked) == 0
    assert capsys.readouterr().err == f"{said}all {parts} parts; nothing ran again\n"
    assert json.loads((place / "out" / result).read_text())


def test_a_disk_without_room_is_refused_before_the_work(place, monkeypatch, capsys):
    full(monkeypatch, files, "reserve", 0)
    assert "--out" in refused(capsys, monkeypatch, place, *EVALUATE)


def test_a_disk_that_is_full_at_the_end_keeps_the_old_report(place, monkeypatch, capsys):
    assert run(monkeypatch, *EVALUATE) == 0
    before = {path: path.read_bytes() for path in place.glob("out/*.*")}
    capsys.readouterr()
    from probdefense.evaluation import report

    with monkeypatch.context() as patch:
        full(patch, report, "whole", 1)
        assert run(patch, *EVALUATE) == 2
    printed = capsys.readouterr()
    assert "mean_prob" in printed.out, "the numbers are not lost"
    assert "No space left on device" in printed.err
    assert {path: path.read_bytes() for path in place.glob("out/*.*")} == before
