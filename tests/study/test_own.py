"""The commands for what a user brings along: every kind of target, killed and resumed, and made anew."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.study import pool, request
from probdefense.study.findings import joined, redrawn
from probdefense.study.targets import looked_up, target
from tests.study.test_cli import SMALL, run

FILE = """
import time
import torch
from torch import nn
import probdefense as pd

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(x.flatten(1))

net = Net()

def make():
    return Net()

def smoothed():
    return pd.defenses.rse(Net(), sigma_init=0.25, before_linear=True)

def answers(x, num_samples):
    return x.flatten(1)[None, :, :10].expand(num_samples or 1, -1, -1)

def add(f, x, y, *, eps, norm):
    return (x + eps).clamp(0, 1)

def slow(f, x, y, *, eps, norm):
    time.sleep(0.3)
    return (x + eps).clamp(0, 1)

train = torch.utils.data.TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
data = train, train
"""

FAST = ("--images", "24", "--num-samples", "4", "--attacks", "fgsm")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def saved(tmp_path):
    """A file of a defense of a network that it knows."""
    torch.manual_seed(1)
    defense = pd.defenses.rse(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), sigma_init=0.25, before_linear=True
    )
    pd.save(defense, tmp_path / "rse.safetensors")
    return tmp_path / "rse.safetensors"


def rows(folder):
    return json.loads((folder / "report.json").read_text())["rows"]


@pytest.mark.parametrize("name", ["net", "make", "Net", "smoothed", "answers"])
def test_evaluate_takes_whatever_answers(name, file, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(monkeypatch, "evaluate", f"{file}:{name}", *FAST, "--out", str(out)) == 0
    assert {(row["defense"], row["num_examples"]) for row in rows(out)} == {(name, 24)}
    written = {"arrays.npz", "journal", "report.html", "report.json", "robustness.png", "timing.json"}
    assert {path.name for path in out.iterdir()} == written
    printed = capsys.readouterr()
    assert name in printed.out and printed.err == ""
    settings = pd.Report.load(out).settings
    assert (settings["data"], settings["chunk_size"], settings["num_samples"]) == ("digits", 256, 4)


def test_evaluate_is_the_library_on_the_first_images(saved, monkeypatch, tmp_path):
    out = tmp_path / "out"
    options = ("--norm", "2", "--eps", "0.5,1", "--chunk-size", "10", "--seed", "3", "--name", "mine")
    assert run(monkeypatch, "evaluate", str(saved), *FAST, *options, "--out", str(out)) == 0
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    report = pd.evaluate(
        pd.load(saved, net=net).eval(),
        pd.data.digits().test[:24],
        {"fgsm": pd.with_draws(pd.attacks.fgsm, 16)},
        norm=2,
        eps=[0.5, 1.0],
        num_samples=4,
        chunk_size=10,
        seed=3,
        name="mine",
    )
    assert rows(out) == report.rows


def test_attacks_and_data_may_come_from_files(file, monkeypatch, tmp_path):
    options = ("--attacks", f"{file}:add,fgsm", "--data", f"{file}:data", "--eps", "0.1")
    options += ("--num-samples", "2", "--out", str(tmp_path / "out"))
    assert run(monkeypatch, "evaluate", f"{file}:net", *options) == 0
    found = rows(tmp_path / "out")
    assert [row["attack"] for row in found[::2]] == ["clean", "add", "fgsm", "worst"]
    assert {row["num_examples"] for row in found} == {40}


def test_weights_fill_what_the_file_makes(file, saved, tmp_path):
    net = looked_up(f"{file}:make")
    assert torch.equal(net.last.weight, looked_up(f"{file}:make").last.weight), "drawn from one seed"
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.bias.copy_(torch.arange(10.0))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pt")
    pd.save(pd.defenses.rse(net, sigma_init=0.5, before_linear=True), tmp_path / "mine.safetensors")
    x = torch.rand(2, 1, 8, 8)
    for name in ("make", "net"):
        plain = target(f"{file}:{name}", tmp_path / "net.pt").logits_fn
        assert torch.equal(plain(x)[0], torch.arange(10.0).expand(2, 10))
        noisy = target(f"{file}:{name}", tmp_path / "mine.safetensors").logits_fn
        assert float(noisy.input_noise[1]) == 0.5
        assert torch.equal(noisy.mean()(x)[0], torch.arange(10.0).expand(2, 10))
    assert looked_up(f"{file}:net").last.weight.abs().max() > 0, "what the file made stays"
    pd.save(pd.defenses.rse(net, sigma_init=0.25, before_linear=True), tmp_path / "same.safetensors")
    filled = target(f"{file}:smoothed", tmp_path / "same.safetensors").logits_fn
    assert torch.equal(filled.mean()(x)[0], torch.arange(10.0).expand(2, 10))


def test_certify_writes_radii_and_renews_the_page(saved, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    votes = ("--images", "24", "--n0", "10", "--num-draws", "50", "--alpha", "0.01", "--out", str(out))
    assert run(monkeypatch, "certify", str(saved), *votes) == 0
    assert not (out / "report.html").exists(), "there is no report yet"
    first = (out / "certificate.json").read_bytes()
    found = json.loads(first)
    assert (found["defense"], found["sigma"], found["alpha"], len(found["radius"])) == ("rse", 0.25, 0.01, 24)
    right = [
        label == y and radius >= 0.125
        for label, y, radius in zip(*map(found.get, ("label", "labels", "radius")), strict=True)
    ]
    assert [row["accuracy"] for row in found["rows"] if row["eps"] == 0.125] == [np.mean(right)]
    assert run(monkeypatch, "evaluate", str(saved), *FAST, "--out", str(out)) == 0
    page = (out / "report.html").read_bytes()
    assert b"Certified accuracy" in page
    assert run(monkeypatch, "certify", str(saved), *votes) == 0
    assert (out / "certificate.json").read_bytes() == first, "no vote is drawn twice"
    assert (out / "report.html").read_bytes() == page
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("wrote"))
    printed = " ".join(printed.split())
    assert "each certificate false with probability at most 0.01" in printed
    note = (
        "50 draws that all agree certify radius 0.338 at most, so no image could pass 0.375, which needs 67"
    )
    assert note in printed and note in page.decode(), (
        "by hand: 0.25 ndtri(0.01^(1/50)), log 0.01 / log Phi(1.5)"
    )


def test_report_makes_the_page_anew(saved, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(monkeypatch, "evaluate", str(saved), *FAST, "--out", str(out)) == 0
    pages = [out / "report.html", out / "robustness.png"]
    before, table = [page.read_bytes() for page in pages], capsys.readouterr().out.partition("wrote")[0]
    for page in pages:
        page.unlink()
    assert run(monkeypatch, "report", str(out)) == 0
    assert capsys.readouterr().out.partition("wrote")[0] == table, "one table in both"
    assert max(map(len, table.splitlines())) <= 80 and "l-inf radius 0.2, 24 images" in table
    assert "fgsm 16 gradients (16 draws per call)" in table
    assert [page.read_bytes() for page in pages] == before


def test_report_compares_defenses_and_joins_seeds(file, saved, monkeypatch, tmp_path, capsys):
    folders = {}
    for seed in ("0", "1"):
        for name, where in (("plain", f"{file}:net"), ("noisy", str(saved))):
            folders[name, seed] = str(tmp_path / f"{name}{seed}")
            options = (*FAST, "--seed", seed, "--name", name, "--out", folders[name, seed])
            assert run(monkeypatch, "evaluate", where, *options) == 0
    capsys.readouterr()
    assert run(monkeypatch, "report", *folders.values(), "--out", str(tmp_path / "all")) == 0
    printed = capsys.readouterr().out
    assert "2 training seeds: about these methods" in printed and "plain" in printed
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"report.html", "robustness.png"}
    drawn = redrawn([tmp_path / name for name in ("plain0", "noisy0", "plain1", "noisy1")])
    assert drawn.comparison.num_seeds == 2
    place = {"defense": "noisy", "attack": "fgsm", "rule": "single_draw"}
    each = [pd.Report.load(folders["noisy", seed]).row(**place)["accuracy"] for seed in ("0", "1")]
    assert drawn.report.row(**place)["accuracy"] == pytest.approx(np.mean(each))
    assert drawn.report.settings["seed"] == [0, 1]
    pair = redrawn([tmp_path / "plain0", tmp_path / "noisy0"])
    assert pair.comparison.num_seeds == 1 and pair.report.defenses == ["plain", "noisy"]
    assert (
        run(monkeypatch, "report", folders["plain", "0"], folders["noisy", "0"], folders["noisy", "1"]) == 2
    )
    assert "plain in 1, noisy in 2" in capsys.readouterr().err
    assert run(monkeypatch, "report", folders["plain", "0"], folders["plain", "0"]) == 2
    assert "got the same report twice" in capsys.readouterr().err


@pytest.mark.slow
def test_report_makes_the_page_of_compare_anew(monkeypatch, tmp_path, capsys):
    """With its checks, certificates and pairs; the pictures of attacked images are in no file."""
    monkeypatch.setattr(request, "QUICK", SMALL)
    monkeypatch.setattr(pool, "cores", lambda: 1)
    out = tmp_path / "out"
    options = (
        "--quick",
        "--defenses",
        "none,rse",
        "--attacks",
        "fgsm",
        "--num-samples",
        "4",
        "--seeds",
        "0,1",
    )
    assert run(monkeypatch, "compare", *options, "--out", str(out)) == 0
    tables = ("Certified accuracy", "checks that did not fire", "Pairs", "2 training seeds")
    assert all(text in (out / "report.html").read_text() for text in tables)
    kept = json.loads((out / "report.json").read_text())["rows"]
    (out / "report.html").unlink()
    assert run(monkeypatch, "report", str(out)) == 0
    assert all(text in (out / "report.html").read_text() for text in tables)
    assert redrawn([out]).report.rows == kept


def test_seeds_that_disagree_widen_the_interval():
    data = torch.rand(40, 4), torch.zeros(40).long()

    def report(right):
        net = nn.Linear(4, 2)
        with torch.no_grad():
            net.weight.zero_()
            net.bias.copy_(torch.tensor([float(right), 0.5]))
        return pd.evaluate(pd.deterministic(net), data)

    same, apart = joined([report(True), report(True)]), joined([report(True), report(False)])
    assert (same.rows[0]["accuracy"], apart.rows[0]["accuracy"]) == (1.0, 0.5)
    assert same.rows[0]["low"] == pytest.approx(1 / (1 + 1.959964**2 / 40)), "Wilson's, of one table"
    assert apart.rows[0]["high"] - apart.rows[0]["low"] > 0.9


def command(*options):
    return [sys.executable, "-c", "from probdefense.study.cli import main; main()", *options]


@pytest.mark.slow
def test_killed_twice_and_run_again_it_writes_the_same_bytes(file, tmp_path):
    options = ["evaluate", f"{file}:smoothed", "--attacks", f"{file}:slow", "--images", "24", "--chunk-size"]
    options += ["2", "--num-samples", "2", "--eps", "0.1", "--out"]
    subprocess.run(command(*options, str(tmp_path / "whole")), check=True, capture_output=True)
    kept = 0
    for _ in range(2):
        with subprocess.Popen(command(*options, str(tmp_path / "killed")), stdout=-3, stderr=-3) as process:
            while len(list(tmp_path.glob("killed/journal/*.npz"))) < kept + 5:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        kept = len(list(tmp_path.glob("killed/journal/*.npz")))
        assert not (tmp_path / "killed/report.json").exists()
    assert kept < 24, "it was killed in the middle"
    subprocess.run(command(*options, str(tmp_path / "killed")), check=True, capture_output=True)
    for name in ("report.json", "arrays.npz", "report.html", "robustness.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(saved, tmp_path):
    options = ["--images", "24", "--chunk-size", "5", "--out"]
    attacked = ["evaluate", str(saved), *options[:-1], "--attacks", "fgsm", "--num-samples", "4", "--out"]
    voted = ["certify", str(saved), *options[:-1], "--num-draws", "50", "--out"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "probdefense"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for asked in (attacked, voted):
        subprocess.run(command(*asked, str(tmp_path / "one")), check=True, capture_output=True)
        both = [sys.executable, *start, *asked, str(tmp_path / "two")]
        answer = subprocess.run(both, capture_output=True, text=True, env=environment, timeout=300)
        assert answer.returncode == 0, answer.stderr
        assert (
            answer.stdout.count("wrote") == len(list((tmp_path / "one").glob("*.*"))) - (asked is voted) * 3
        )
    for name in ("report.json", "arrays.npz", "report.html", "certificate.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
