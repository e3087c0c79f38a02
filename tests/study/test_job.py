"""The command's engine: recipes train what they say, requests are refused before any work."""

import inspect
import json
import math
import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from probdefense import data, deterministic
from probdefense.data import Split
from probdefense.study import cli, job, opponents, workshop
from probdefense.study import request as study_request
from probdefense.study.job import Request
from probdefense.study.recipes import RECIPES, Workshop
from probdefense.training import ema
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


def small(gradients, images, votes=20):
    """A budget for tests."""
    size = {"epochs": 1, "gradients": gradients, "images": images, "adaptive_images": 6, "votes": votes}
    return {**size, "checked": images, "check_gradients": 16}


def little_request(**changes) -> Request:
    asked = {"defenses": ("none",), "attacks": ("clean", "pgd"), "num_samples": 4, "epochs": 1, "quick": True}
    return Request(**{**asked, **changes})


@pytest.fixture(scope="module")
def result(little):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_request, "QUICK", small(gradients=16, images=24, votes=50))
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
        for attack in ("clean", "pgd", "suite", "worst")
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
    monkeypatch.setattr(study_request, "QUICK", small(gradients=16, images=16, votes=20))
    texts = []
    for folder in ("a", "b"):
        request, _ = job.prepare(little_request(defenses=("rse",), attacks=("eot_pgd",)))
        job.run(request, little).report.save(tmp_path / folder)
        texts.append((tmp_path / folder / "report.json").read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_defense_that_adapts_stands_beside_its_static_base(little, monkeypatch):
    monkeypatch.setattr(study_request, "QUICK", small(gradients=8, images=12, votes=20))
    monkeypatch.setattr(opponents, "ROUNDS", 1)
    request, _ = job.prepare(little_request(defenses=("rmc",), attacks=("adaptive",)))
    found = job.run(request, little)
    assert found.report.defenses == ["rmc_static", "rmc"]
    assert {row["num_examples"] for row in found.report.rows} == {6}
    assert found.checks == {} and found.comparison is not None


def test_the_suite_judges_whatever_else_is_asked():
    defaults = inspect.signature(cli.compare).parameters["attacks"].default
    assert "suite" in defaults.split(",")
    for asked, wanted in [
        (("pgd",), ("pgd", "suite")),
        (("suite", "clean"), ("suite", "clean")),
        (("clean",), ("clean",)),
    ]:
        assert job.prepare(Request(("rse",), asked))[0].attacks == wanted


def test_the_headline_is_the_worst_of_all_that_ran(result):
    for name in result.report.defenses:
        keeps = {
            row["attack"]: row["accuracy"]
            for row in result.report.only(name).rows
            if row["rule"] == "mean_prob"
        }
        assert set(keeps) == {"clean", "pgd", "suite", "worst"}
        assert name != "none" or keeps["worst"] <= min(keeps.values())
    assert {row["attack"] for row in result.comparison.rows} >= {"worst"}
    assert result.report.settings["suite_budget"] == 1000


def test_a_report_says_how_every_recipe_was_trained(result):
    training = result.report.settings["training"]
    assert training["learning_rate"] == {
        name: RECIPES[name].learning_rate for name in ("none", "rse", "bayesian")
    }
    assert training["weight_average"] == "ema 0.99" and training["batch_size"] == 64
    assert training["warm_up_epochs"] == 0.11
    assert "training digits" in training["validation"]
    asked, _ = job.prepare(little_request(defenses=("jump_relu",)))
    assert set(study_request.settings(asked, 1)["training"]["learning_rate"]) == {"madry"}
    elsewhere = study_request.settings(replace(asked, data="mnist", eps=0.3), 1)["training"]
    assert elsewhere["learning_rate"] == {"madry": 4e-3} and elsewhere["validation"].startswith("none")


def test_one_budget_for_every_recipe(little, monkeypatch):
    """Every training has the same epochs, batches and average; only rates differ."""
    seen = {}

    def fit(defense, loader, **options):
        seen.setdefault(name, []).append((options["epochs"], loader.batch_size, options["average"]))

    monkeypatch.setattr(workshop, "fit", fit)
    for name, recipe in RECIPES.items():
        if recipe.learning_rate is not None:
            Workshop(little, eps=0.1, epochs=7).make(name)
    assert {each for row in seen.values() for each in row} == {(7, 64, ema(0.99))}
    assert {*RECIPES} - {*seen} == {"jump_relu", "rmc"}


def test_the_radius_of_a_training_grows_over_its_first_steps(little):
    x, y = (t[:8] for t in little.train.tensors)
    shop = Workshop(little, eps=0.3, epochs=46)  # of 3 steps each
    attack, net = shop.inner_attack(), shop.plain()
    radii = [float((attack(net, x, y) - x).abs().max()) for _ in range(20)]
    assert radii == pytest.approx([0.3 * min(1, t / 15) for t in range(1, 21)], abs=1e-5)


def test_defenses_that_share_a_training_are_one_family_and_the_longest_starts_first():
    asked, _ = job.prepare(Request(("none", "jump_relu", "rse", "madry"), ("clean",)))
    assert asked.families == [("jump_relu", "madry"), ("none",), ("rse",)]


@pytest.mark.slow
def test_processes_change_nothing(little, tmp_path, monkeypatch):
    monkeypatch.setattr(study_request, "QUICK", small(gradients=8, images=8))
    request, _ = job.prepare(little_request(defenses=("rse", "fast"), attacks=("pgd",)))
    found = [job.run(request, little, processes=count) for count in (1, 2)]
    for one, folder in zip(found, ("one", "two"), strict=True):
        job.write(one, tmp_path / folder)
    for name in ("report.json", "arrays.npz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for name in request.defenses:
        a, b = (one.made[name].state_dict() for one in found)
        assert all(torch.equal(a[key], b[key]) for key in a if isinstance(a[key], torch.Tensor))
        assert [str(c) for c in found[0].checks[name]] == [str(c) for c in found[1].checks[name]]
    assert torch.equal(found[0].certificates["rse"].radius, found[1].certificates["rse"].radius)


def test_all_means_every_recipe_and_its_own_attack():
    request, _ = job.prepare(Request(("all",), ("clean", "pgd")))
    assert request.defenses == tuple(RECIPES)
    assert request.attacks == ("clean", "pgd", "suite", "adaptive")
    for asked in (("all", "none"), ("rse", "all", "none"), ("all", "all")):
        request, _ = job.prepare(Request(asked, ("clean",)))
        assert sorted(request.defenses) == sorted(RECIPES) and request.attacks == (
            "clean",
            "suite",
            "adaptive",
        )
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
