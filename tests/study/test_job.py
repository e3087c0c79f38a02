"""The command's engine: recipes train what they say, requests are refused before any work."""

import json
import math
import resource
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import TensorDataset

from probdefense import data, deterministic
from probdefense.data import Split
from probdefense.study import job, opponents
from probdefense.study.job import Request
from probdefense.study.recipes import RECIPES, Workshop
from tests.worlds import tiny_net


@contextmanager
def limited(size):
    """No file may grow beyond this size: what a write to a full disk raises, from the system itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture(scope="module")
def little() -> Split:
    """Digits, few enough to train on in no time."""
    train, test = data.digits()
    return Split(*(TensorDataset(*(t[:160] for t in part.tensors)) for part in (train, test)))


def little_request(**changes) -> Request:
    asked = {"defenses": ("none",), "attacks": ("clean", "pgd"), "num_samples": 4, "epochs": 1, "quick": True}
    return Request(**{**asked, **changes})


@pytest.fixture(scope="module")
def result(little):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            job,
            "QUICK",
            {"epochs": 1, "gradients": 16, "images": 24, "checked": 24, "check_gradients": 16, "votes": 50},
        )
        request, _ = job.prepare(little_request(defenses=("none", "rse", "bayesian")))
        return job.run(request, little)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "rmc"])
def test_every_recipe_makes_a_defense_that_its_opponent_attacks(name, little):
    shop = Workshop(little, eps=0.1, epochs=1)
    defense = shop.make(name)
    x, y = (t[:4] for t in little.test.tensors)
    attack = RECIPES[name].opponent(defense, 16)
    x_adv = attack(defense, x, y, eps=0.1, seed=0)
    assert x_adv.shape == x.shape
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    assert shop.make(name) is defense
    assert not defense.training


def test_what_is_trained_does_not_depend_on_the_order(little):
    def weights(*names):
        shop = Workshop(little, eps=0.1, epochs=1, seed=3)
        for name in names:
            made = shop.make(name)
        return torch.cat([p.flatten() for p in made.parameters()])

    state = torch.random.get_rng_state()
    assert torch.equal(weights("rse"), weights("none", "rse"))
    assert not torch.equal(weights("rse"), weights("none"))
    assert torch.equal(state, torch.random.get_rng_state())


FAST = set(opponents.attack_names()) - {"cw", "cw_fixed", "ead", "substitute", "suite", "zoo"}


@pytest.mark.parametrize("name", sorted(FAST))
def test_attacks_by_name_run_on_a_plain_network(name):
    defense, x, y = deterministic(tiny_net()), torch.rand(3, 1, 6, 6), torch.tensor([0, 1, 2])
    attack = opponents.named_attack(name, defense, 64)
    takes = {"eps": 0.1} if name not in ("ddn", "deepfool", "fmn", "hop_skip_jump") else {}
    assert attack(defense, x, y, seed=0, **takes).shape == x.shape


def test_pgd_and_eot_pgd_spend_the_same(result):
    spent = {}
    for name in ("pgd", "eot_pgd"):
        attack = opponents.named_attack(name, result.made["rse"], 160)
        spent[name] = attack.num_samples * attack.attack.keywords["num_steps"]
    assert spent == {"pgd": 160, "eot_pgd": 160}
    assert opponents.named_attack("eot_pgd", result.made["none"], 160).attack.keywords == {"num_steps": 160}


def test_the_report_holds_what_was_asked(result):
    rows = [(row["defense"], row["attack"], row["rule"]) for row in result.report.rows]
    assert rows == [
        (defense, attack, rule)
        for defense in ("none", "rse", "bayesian")
        for attack in ("clean", "pgd")
        for rule in ("mean_prob", "single_draw")
    ]
    bayesian = result.report.row(defense="bayesian", attack="clean", rule="mean_prob")
    assert (bayesian["prior"], bayesian["kl_weight"]) == ("Normal(0, 1)", 1.0)
    assert result.report.settings["eps"] == 0.2
    assert set(result.checks) == {"none", "rse", "bayesian"}
    assert set(result.certificates) == {"rse"}
    assert {row["a"] for row in result.comparison.rows} == {"none", "rse"}


def test_files_are_written_whole_and_others_stay(result, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    written = job.write(result, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*written, "mine.txt"}
    assert {"report.json", "timing.json", "robustness.png", "report.html", "posterior.nc"} <= names
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content) == {"version", "settings", "rows"}
    assert {"defense", "attack", "rule", "accuracy", "low", "high", "num_examples", "num_samples"} <= set(
        content["rows"][0]
    )


def test_a_disk_that_fills_up_changes_nothing(result, tmp_path, monkeypatch):
    job.write(result, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for limit in (1000, 20_000, 60_000):
        with limited(limit), pytest.raises(OSError, match="File too large"):
            job.write(result, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with limited(60_000), pytest.raises(OSError):
        job.write(result, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_cannot_be_moved_into_place_leaves_nothing_behind(result, tmp_path):
    (tmp_path / "arrays.npz").mkdir()
    with pytest.raises(OSError):
        job.write(result, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.npz"]


def test_without_randomness_an_old_posterior_goes(result, little, tmp_path):
    (tmp_path / "posterior.nc").write_text("of another run")
    plain = job.Result(result.report, {"none": result.made["none"]}, result.test, None, {}, {}, {})
    assert "posterior.nc" not in job.write(plain, tmp_path)
    assert not (tmp_path / "posterior.nc").exists()


def test_a_seed_fixes_every_byte(little, tmp_path, monkeypatch):
    monkeypatch.setattr(
        job,
        "QUICK",
        {"epochs": 1, "gradients": 16, "images": 16, "checked": 16, "check_gradients": 16, "votes": 20},
    )
    texts = []
    for folder in ("a", "b"):
        request, _ = job.prepare(little_request(defenses=("rse",), attacks=("eot_pgd",)))
        job.run(request, little).report.save(tmp_path / folder)
        texts.append((tmp_path / folder / "report.json").read_bytes())
    assert texts[0] == texts[1]


def test_a_defense_that_adapts_stands_beside_its_static_base(little, monkeypatch):
    monkeypatch.setattr(
        job,
        "QUICK",
        {"epochs": 1, "gradients": 8, "images": 12, "checked": 12, "check_gradients": 16, "votes": 20},
    )
    monkeypatch.setattr(job, "ADAPTIVE_IMAGES", 6)
    monkeypatch.setattr(opponents, "ROUNDS", 1)
    request, _ = job.prepare(little_request(defenses=("rmc",), attacks=("adaptive",)))
    found = job.run(request, little)
    assert found.report.defenses == ["rmc_static", "rmc"]
    assert {row["num_examples"] for row in found.report.rows} == {6}
    assert found.checks == {} and found.comparison is not None


def test_all_means_every_recipe_and_its_own_attack():
    request, _ = job.prepare(Request(("all",), ("clean", "pgd")))
    assert request.defenses == tuple(RECIPES)
    assert request.attacks == ("clean", "pgd", "adaptive")
    for asked in (("all", "none"), ("rse", "all", "none"), ("all", "all")):
        request, _ = job.prepare(Request(asked, ("clean",)))
        assert sorted(request.defenses) == sorted(RECIPES) and request.attacks == ("clean", "adaptive")
    assert request.defenses == tuple(RECIPES)
    assert job.prepare(Request(("rse", "none", "rse"), ("clean",)))[0].defenses == ("rse", "none")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"defenses": ("nun",)}, "unknown defense 'nun'"),
        ({"defenses": ()}, "at least one defense"),
        ({"attacks": ("pdg",)}, "unknown attack 'pdg'"),
        ({"data": "digitz"}, "unknown data set 'digitz'"),
        *(({"eps": eps}, "expected --eps in") for eps in (-0.1, 0, 0.0, 1.0001, 255, math.nan, math.inf)),
        ({"num_samples": 0}, "expected --num-samples >= 1"),
        ({"epochs": 0}, "expected --epochs >= 1"),
        ({"seed": -1}, "expected --seed >= 0"),
    ],
)
def test_bad_requests_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        job.prepare(little_request(**changes))


def test_the_catalog_has_one_line_for_everything():
    catalog = job.catalog()
    assert set(catalog) == {"defenses", "objectives", "attacks", "data"}
    assert set(catalog["attacks"]) == set(opponents.attack_names())
    assert all(about and "\n" not in about for lines in catalog.values() for about in lines.values())
