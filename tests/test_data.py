"""Data sets: shapes, ranges, stable splits, and errors that say what to put where."""

import pytest
import torch

from probdefense import data


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
        monkeypatch.setattr(getattr(data.import_torchvision().datasets, name), "download", no_network)
    with pytest.raises(FileNotFoundError, match="put the four idx files in MNIST/raw there"):
        data.load("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        data.load("cifar10", tmp_path)


def test_mnist_loads_from_raw_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        images = torch.arange(count * 784).remainder(256).to(torch.uint8).view(count, 28, 28)
        header = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        labels = bytes(range(count))
        header = b"".join(n.to_bytes(4, "big") for n in (2049, count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)
    train, test = data.load("mnist", tmp_path)
    assert train.tensors[0].shape == (5, 1, 28, 28) and test.tensors[1].tolist() == [0, 1, 2]
    assert float(train.tensors[0].max()) == 1.0
