"""Reports that stay whole: what is saved belongs together, what is added does not overlap."""

import json
import os
import shutil
import tempfile

import numpy as np
import pytest

import probdefense as pd
from probdefense.files import reserve, whole
from tests.contract import defended
from tests.worlds import tiny_batch


def report(name="defense", seed=0, count=6):
    return pd.evaluate(
        defended("rse"), tiny_batch(count), {"fgsm": pd.attacks.fgsm}, num_samples=4, name=name, seed=seed
    )


def test_overlapping_rows_are_refused():
    one = report()
    for other in (one, report()):
        with pytest.raises(ValueError, match=r"both have defense, clean, 0\.0, mean_prob; give every"):
            one + other
    with pytest.raises(TypeError, match="expected a Report to add, got int"):
        one + 1
    both = one + report("other")
    assert len(both.rows) == 2 * len(one.rows) and len(both.arrays) == 2 * len(one.arrays)


@pytest.mark.parametrize("old", ["report.json", "arrays.npz"])
def test_a_mixture_of_two_runs_is_refused(tmp_path, old):
    first, second = report(count=6), report(count=7)
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    shutil.copy(tmp_path / "first" / old, tmp_path / "second" / old)
    with pytest.raises(ValueError, match="expected the files of one report"):
        pd.Report.load(tmp_path / "second")


def test_a_save_that_is_cut_short_is_found_and_leaves_no_scraps(tmp_path, monkeypatch):
    longer, dumps = report(count=7), json.dumps
    report(count=6).save(tmp_path)
    monkeypatch.setattr(
        np, "savez_compressed", lambda *args, **arrays: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        longer.save(tmp_path)
    monkeypatch.undo()
    assert len(pd.Report.load(tmp_path).arrays["labels/defense"]) == 6  # the old set is still whole

    def dies_at_the_timing(value, **options):
        if "version" not in value:
            raise KeyboardInterrupt
        return dumps(value, **options)

    monkeypatch.setattr(json, "dumps", dies_at_the_timing)
    with pytest.raises(KeyboardInterrupt):
        longer.save(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="evaluate and save again"):
        pd.Report.load(tmp_path)


def test_the_same_numbers_are_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        report().save(tmp_path / folder)
    for name in ("report.json", "arrays.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saved_arrays_name_their_axes(tmp_path):
    attacks = {"fgsm": pd.attacks.fgsm, "ddn": pd.attacks.ddn}
    made = pd.evaluate(defended("rse"), tiny_batch(5), attacks, eps=0.1, num_samples=3)
    made.save(tmp_path)
    sizes = {"example": 5, "class": 3}
    with np.load(tmp_path / "arrays.npz") as kept:
        dims = json.loads(str(kept["dims.json"]))["dims"]
        assert dims.keys() == set(kept.files) - {"report.json", "dims.json"} == made.arrays.keys()
        for key, axes in dims.items():
            verdicts = 1 if key.endswith("mean_prob") else 3
            assert kept[key].shape == tuple((sizes | {"verdict": verdicts})[axis] for axis in axes), key
    assert pd.Report.load(tmp_path).arrays.keys() == made.arrays.keys()


def test_a_file_is_whole_or_absent(tmp_path):
    with whole(tmp_path / "a.txt") as place:
        place.write_text("a")
    with pytest.raises(RuntimeError), whole(tmp_path / "b.txt") as place:
        place.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_replaced(kind, tmp_path):
    place = tmp_path / "place"
    os.mkfifo(place) if kind == "pipe" else place.mkdir()
    with pytest.raises(OSError, match="something else than a file"), whole(place) as partial:
        partial.write_text("a")
    assert not place.is_file() and [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_folder_without_room_is_not_left_behind(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            raise OSError("no space left")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "new" / "deep", tmp_path / "kept"):
        with pytest.raises(OSError, match="no space left"):
            reserve(folder, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_other_rules_under_one_name_do_not_overwrite_arrays():
    first = report()
    other = pd.evaluate(defended("rse"), tiny_batch(6), num_samples=4, rules=[pd.rules.vote])
    with pytest.raises(ValueError, match="got arrays .* in both; give every evaluation a name="):
        first + other


def test_arrays_of_a_run_with_equal_rows_are_refused(tmp_path):
    one, other = report(), report()
    other.arrays[next(key for key in other.arrays if key.startswith("expected_entropy"))] += 1.0
    assert one.rows == other.rows
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "arrays.npz", tmp_path / "altered.npz")
    with np.load(tmp_path / "altered.npz") as kept:
        arrays = {name: kept[name] for name in kept.files}
    arrays["report.json"] = np.load(tmp_path / "one" / "arrays.npz")["report.json"]
    np.savez_compressed(tmp_path / "one" / "arrays.npz", **arrays)
    with pytest.raises(ValueError, match="expected the files of one report"):
        pd.Report.load(tmp_path / "one")


@pytest.mark.parametrize("wrong", [[1], [None], "report"])
def test_only_reports_merge(wrong):
    with pytest.raises(TypeError, match=r"expected (several )?reports"):
        pd.Report.merge(report() if wrong == "report" else wrong)
