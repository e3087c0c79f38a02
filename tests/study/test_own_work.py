"""Data, networks and attacks of the user's in ``compare``."""

import json

import pytest
import torch

from probdefense.study import nets
from probdefense.study.nets import Facts, check_net, facts_of, net_of
from tests.study.test_cli import run, small  # noqa: F401

MINE = """
import torch
from torch import nn
from torch.utils.data import Dataset

class Stripes(Dataset):
    '''Two classes: bright rows above or below; nothing is in memory.'''
    classes = ["above", "below"]
    def __init__(self, size):
        self.size = size
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError
        x = torch.full((1, 6, 6), 0.1 + 0.001 * (index % 7))
        x[:, 3 * (index % 2) : 3 * (index % 2) + 3] += 0.8
        return x, index % 2

stripes = Stripes(96), Stripes(32)

few = Stripes(96), Stripes(0)
bright = torch.utils.data.TensorDataset(3 * torch.ones(8, 1, 6, 6), torch.arange(8) % 2), stripes[1]
other = stripes[0], torch.utils.data.TensorDataset(torch.ones(8, 1, 5, 5), torch.arange(8) % 2)
alike = 2 * (torch.utils.data.TensorDataset(torch.ones(8, 1, 6, 6), torch.zeros(8).long()),)
third = stripes[0], torch.utils.data.TensorDataset(torch.ones(8, 1, 6, 6), torch.arange(8))

def net(num_classes):
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes))

def nudge(logits_fn, x, y, *, eps, norm=None, seed=None, share=1.0):
    return (x - share * eps).clamp(0, 1)
"""


def rows(folder):
    return json.loads((folder / "report.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_data_network_and_attack_of_a_file(processes, small, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr("probdefense.study.pool.cores", lambda: processes)
    mine = tmp_path / f"mine{processes}.py"
    mine.write_text(MINE)
    (tmp_path / "study.toml").write_text(
        f"data = '{mine}:stripes'\nnet = '{mine}:net'\neps = 0.1\nquick = true\nnum_samples = 2\n"
        "[training]\nepochs = 8\nlearning_rate = 0.05\n"
        "[[defense]]\nrecipe = 'none'\n[[defense]]\nrecipe = 'rse'\nname = 'quiet'\nsigma_init = 0.01\n"
        f"[[attack]]\nattack = '{mine}:nudge'\nname = 'half'\nshare = 0.5\n"
    )
    options = ["--study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]
    assert run(monkeypatch, "compare", *options) == 0
    found = {(row["defense"], row["attack"]): row["accuracy"] for row in rows(tmp_path / "out")}
    assert found["none", "clean"] == found["none", "half"] == 1.0 and found["quiet", "clean"] == 1.0


def test_a_folder_of_images(small, monkeypatch, tmp_path):  # noqa: F811
    from PIL import Image

    for part in ("train", "test"):
        for label, gray in (("dark", 20), ("light", 230)):
            place = tmp_path / part / label
            place.mkdir(parents=True)
            for index in range(8):
                Image.new("L", (8, 8), gray + index).save(place / f"{index}.png")
    options = [
        "--data",
        f"folder:{tmp_path}",
        "--eps",
        "0.1",
        "--attacks",
        "clean",
        "--defenses",
        "none",
        "--quick",
    ]
    assert run(monkeypatch, "compare", *options, "--out", str(tmp_path / "out")) == 0
    assert rows(tmp_path / "out")[0]["num_examples"] == 12


def test_an_attack_after_the_option(small, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "attack.py").write_text(MINE)
    options = ["--quick", "--defenses", "none", "--attacks", f"{tmp_path / 'attack.py'}:nudge"]
    assert run(monkeypatch, "compare", *options, "--out", str(tmp_path / "out")) == 0
    assert {row["attack"] for row in rows(tmp_path / "out")} == {"clean", "nudge", "suite", "worst"}


def test_what_a_network_must_know_of_the_data():
    class Lazy(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.zeros(3, 5, 4), 2 * index

    assert facts_of(Lazy()) == Facts((3, 5, 4), 5)
    pair = torch.utils.data.TensorDataset(torch.zeros(2, 1, 4, 4), torch.tensor([0, 6]))
    assert facts_of(pair) == Facts((1, 4, 4), 7)


def test_networks_by_name():
    assert net_of("strided_cnn", Facts((1, 28, 28), 7))(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    check_net("resnet20", Facts((3, 32, 32), 4))
    assert {"small_cnn", "madry_cnn", "resnet18"} <= {*nets.BY_NAME}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--net", "{file}:absent"], "expected 'absent' in"),
        (["--net", "{file}:nudge"], "raised TypeError"),
        (["--net", "{file}:net"], "does not take images of shape"),
        (["--net", "absent.py:net"], "expected a Python file at absent.py"),
        (["--data", "{file}:net", "--eps", "0.1"], "net() of"),
        (["--data", "{file}:stripes"], "expected --eps, the radius"),
        (["--data", "folder:absent", "--eps", "0.1"], "expected a folder of images"),
        (["--data", "{file}:few", "--eps", "0.1"], "expected test images, got none"),
        (["--data", "{file}:bright", "--eps", "0.1"], "--data"),
        (["--data", "{file}:other", "--eps", "0.1"], "expected test images of shape (1, 6, 6)"),
        (["--data", "{file}:third", "--eps", "0.1"], "labels below 2, as in the"),
        (
            ["--data", "{file}:alike", "--eps", "0.1"],
            "--data: expected training images of at least two classes",
        ),
        (["--attacks", "{file}:absent"], "expected 'absent' in"),
        (["--attacks", "{file}:stripes"], "--attacks"),
        (["--seeds", "0,x"], "expected whole numbers with commas"),
        (["--seeds", ""], "--seeds"),
        (["--seeds", "0,-1"], "--seeds"),
        (["--seeds", "0,1", "--seed", "2"], "expected --seed or --seeds"),
        (["--device", "cuda:99"], "--device"),
    ],
)
def test_bad_work_is_one_sentence_and_exit_2(options, match, monkeypatch, capsys, tmp_path):
    file, out = tmp_path / "bad.py", tmp_path / "out"
    file.write_text(MINE)
    assert run(monkeypatch, "compare", *(each.format(file=file) for each in options), "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert match in printed.err and printed.err.count("\n") == 1 and printed.out == "" and not out.exists()
