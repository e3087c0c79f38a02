"""Images in folders: classes, sizes and pixels as they lie there, and files that are no images."""

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense import data
from probdefense.data import Folder
from tests.worlds import import_torchvision


def images(folder, classes=("cat", "dog"), count=3, mode="RGB", size=(5, 4)):
    """Images whose pixels say which they are."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for each in range(count):
            Image.new(mode, size, number * 50 + each if mode == "L" else (number * 50 + each, 7, 9)).save(
                folder / name / f"{each}.png"
            )
    return folder


@pytest.fixture
def place(tmp_path):
    images(tmp_path / "train"), images(tmp_path / "test", count=2)
    return tmp_path


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_and_labels_are_those_of_the_files(tmp_path, mode):
    folder = Folder(images(tmp_path, mode=mode))
    assert (
        len(folder) == 6
        and folder.classes == ["cat", "dog"]
        and folder.shape == (3 if mode == "RGB" else 1, 4, 5)
    )
    x, y = folder[4]
    assert y == 1 and x.dtype == torch.float32 and torch.equal(x[0], torch.full((4, 5), 51 / 255))
    batch, labels = next(iter(DataLoader(folder, batch_size=6)))
    assert batch.shape == (6, *folder.shape) and labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_it_is_what_torchvision_reads(place):
    theirs = import_torchvision().datasets.ImageFolder(str(place / "train"))
    ours = Folder(place / "train")
    assert ours.classes == theirs.classes and len(ours) == len(theirs)
    for (x, y), (image, label) in zip((ours[i] for i in range(6)), theirs, strict=True):
        assert y == label and image.getpixel((0, 0)) == tuple((x[:, 0, 0] * 255).round().int().tolist())


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_folder_is_trained_on_and_evaluated_as_a_stream(tmp_path, part):
    images(tmp_path / "train"), images(tmp_path / part, count=2)
    train, test = data.load(f"folder:{tmp_path}")
    defense = pd.defenses.rse(pd.models.small_cnn(3, 2, width=2), sigma_init=0.01, sigma_inner=0.01)
    pd.fit(defense, DataLoader(train, 3, shuffle=True), epochs=1, progress=False)
    report = pd.evaluate(defense.eval(), test, {"fgsm": pd.attacks.fgsm}, eps=0.1, num_samples=2)
    assert "fgsm" in report.table()


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_files_that_are_no_images_are_named(place, content):
    file = place / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:40] if content is None else content)
    with pytest.raises(
        ValueError, match=r"expected an image in .*dog.1\.png, got something else or a part of one"
    ):
        [x for x, _ in (Folder(place / "train")[i] for i in range(6))]
    first = place / "train" / "cat" / "0.png"
    first.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cat.0\.png"):
        Folder(place / "train")


def test_sizes_classes_and_folders_that_do_not_fit_are_named(place):
    Image.new("RGB", (9, 9)).save(place / "train" / "dog" / "2.png")
    with pytest.raises(
        ValueError, match=r"expected images of \(3, 4, 5\), as .*cat.0.png, got \(3, 9, 9\) at .*2.png"
    ):
        Folder(place / "train")[5]
    images(place / "test", classes=("cow",))
    with pytest.raises(ValueError, match="expected the classes cat, dog in .*test, got cow too"):
        data.load(f"folder:{place}")
    for absent, said in ((place / "none", "got nothing"), (place / "train" / "cat" / "0.png", "got a file")):
        with pytest.raises(ValueError, match=f"expected a folder of images at .*{said}"):
            Folder(absent)
    (place / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected images in .*a, got none"):
        Folder(place / "empty")
    with pytest.raises(ValueError, match="expected images in .*a, one folder per class, got none"):
        Folder(place / "empty" / "a")
    with pytest.raises(ValueError, match="expected a folder of images at .*train"):
        data.load(f"folder:{place / 'empty'}")


def test_a_class_that_the_test_set_lacks_keeps_its_number(place):
    for file in (place / "test" / "cat").iterdir():
        file.unlink()
    (place / "test" / "cat").rmdir()
    assert [y for _, y in (data.load(f"folder:{place}").test[i] for i in range(2))] == [1, 1]
