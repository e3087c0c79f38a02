"""`evaluate`: fresh draws, exact controls, refusals, and reports that are what they say."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.logits.rules import mean_prob, single_draw, worst_of_draws
from probdefense.prediction.drawing import REPLAYS, draw_keyed
from tests.contract import defended
from tests.worlds import LinearWorld, monte_carlo_tolerance, tiny_batch


def null(logits_fn, x, y):
    """An attack that returns its input."""
    return x


def toward(distance, logits_fn, x, y):
    """A minimum-norm attack on the linear world: `distance` beyond the plane, in L2."""
    world = LinearWorld()
    unit = world.w / world.w.norm()
    way = (world.distance(x) + distance) * world.score(x).sign()
    return x - way.unsqueeze(1) * unit


@pytest.fixture
def noisy():
    world = LinearWorld(sigma=0.5)
    x, y = world.points(40)
    return world.noisy(), (x, y)


def test_no_radius_and_eight_null_attacks_leave_exactly_the_clean_accuracy():
    for builder in ("rse", "bayesian on rse", "ensemble"):
        defense, data = defended(builder), tiny_batch(12)
        attacks = {f"null {i}": null for i in range(8)} | {"pgd": partial(pd.attacks.pgd, num_steps=2)}
        report = pd.evaluate(defense, data, attacks, eps=0.0, num_samples=7)
        for rule in ("mean_prob", "single_draw"):
            rows = [row for row in report.rows if row["rule"] == rule]
            assert len(rows) == 11 and len({row["accuracy"] for row in rows}) == 1
            clean = report.arrays[f"correct/defense/clean/0/{rule}"]
            assert all(
                np.array_equal(report.arrays[f"correct/defense/{row['attack']}/0/{rule}"], clean)
                for row in rows
            )


@pytest.mark.parametrize("builder", ["rse", "bayesian on rse", "ensemble"])
def test_verdict_draws_belong_to_seed_and_example(builder):
    defense, (x, y) = defended(builder), tiny_batch(9)
    few, many = (pd.evaluate(defense, (x[:n], y[:n]), num_samples=12) for n in (4, 9))
    name = "correct/defense/clean/0/single_draw"
    assert np.array_equal(few.arrays[name], many.arrays[name][:, :4])
    draws = [draw_keyed(defense, x, 12, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])


def test_every_rule_reaches_its_exact_accuracy_in_the_linear_world(noisy):
    defense, (x, y) = noisy
    world = LinearWorld(sigma=0.5)
    right = torch.where(y == 1, world.share_of_one(x), 1 - world.share_of_one(x)).double()
    samples = 3000
    rules = (single_draw, worst_of_draws(3), mean_prob)
    report = pd.evaluate(defense, (x, y), rules=rules, num_samples=samples)
    for rule, exact in (("single_draw", right), ("worst_of_3_draws", right**3)):
        found = report.row(rule=rule)
        assert found["accuracy"] == pytest.approx(
            float(exact.mean()), abs=monte_carlo_tolerance(0.5, samples * len(x) // 3)
        )
    assert abs(float((right**3 - right).mean())) > 0.05, "the rules are told apart"
    assert report.row(rule="mean_prob")["num_samples"] == samples


def test_a_point_outside_ball_or_box_is_refused_with_the_name_of_the_attack(noisy):
    defense, data = noisy

    def far(logits_fn, x, y, *, eps):
        return (x + 1.5 * eps).clamp(0, 1)

    def out_of_box(logits_fn, x, y):
        return x + 1

    def other_shape(logits_fn, x, y):
        return x[:3]

    for name, attack, message in (
        ("far", far, r"attack 'far' left the ball: .* norm 0.15, expected at most eps=0.1 in the inf norm"),
        ("lost", out_of_box, r"attack 'lost' returned points outside the box \[0, 1\]"),
        ("cut", other_shape, r"attack 'cut' returned shape \(3, 6\), expected \(40, 6\)"),
        ("nan", lambda f, x, y: x * torch.nan, "attack 'nan' returned points outside the box"),
    ):
        with pytest.raises(ValueError, match=message):
            pd.evaluate(defense, data, {name: attack}, eps=0.1, num_samples=2)


def test_a_minimum_norm_attack_succeeds_at_a_radius_only_within_it():
    world = LinearWorld()
    x, y = world.points(30)
    beyond = partial(toward, 0.01)
    radii = [0.02, 0.1, 0.2]
    report = pd.evaluate(world.plain(), (x, y), {"min": beyond}, norm=2, eps=radii, rules=[mean_prob])
    distance = (world.distance(x) + 0.01).numpy()
    for radius in radii:
        expected = float((distance > radius + 1e-6).mean())
        assert report.row(attack="min", eps=radius)["accuracy"] == pytest.approx(expected, abs=1e-9)
    assert 0 < report.row(attack="min", eps=0.1)["accuracy"] < 1
    np.testing.assert_allclose(report.arrays["distance/defense/min"], distance, atol=1e-5)
    curve = report.curve("min", "mean_prob")
    assert curve[0]["accuracy"] == 1 and curve[-1]["accuracy"] == 0 and len(curve) == 31
    assert report.curve("min", "mean_prob", radii=[0.1])[0]["accuracy"] == pytest.approx(
        report.row(attack="min", eps=0.1)["accuracy"]
    )
    short = pd.evaluate(world.plain(), (x, y), {"min": partial(toward, -0.01)}, norm=2, eps=1.0)
    assert short.row(attack="min", rule="mean_prob")["accuracy"] == 1, (
        "points that do not fool count for nothing"
    )


def test_the_worst_case_is_the_stronger_attack_of_every_example():
    world = LinearWorld()
    x, y = world.points(30)
    unit = world.w.sign()

    def side(label, logits_fn, x, y, *, eps):
        """Pushes the examples of one class over the plane, and the others away from it."""
        return x + (eps * unit if label == 0 else -eps * unit)

    attacks = {"up": partial(side, 0), "down": partial(side, 1)}
    report = pd.evaluate(world.plain(), (x, y), attacks, eps=[0.05, 0.3], rules=[mean_prob])
    for radius in (0.05, 0.3):
        both = [report.arrays[f"correct/defense/{name}/{radius:g}/mean_prob"] for name in attacks]
        worst = report.arrays[f"correct/defense/worst/{radius:g}/mean_prob"]
        assert np.array_equal(worst, np.logical_and(*both))
        assert worst.mean() < min(one.mean() for one in both)


def test_choosing_the_worst_case_does_not_see_the_verdict():
    """Coins that depend on the point: choosing among 8 points by the verdict would leave 1 in 256."""

    def coins(x, num_samples):
        chaos = (1e4 * x.sum(1)).sin()
        lead = torch.randn(num_samples, len(x)) * chaos + torch.randn(num_samples, len(x))
        return torch.stack([lead, -lead], dim=-1)

    def shift(by, logits_fn, x, y):
        return x + by

    data = 0.2 + 0.5 * torch.rand(400, 4), torch.randint(2, (400,))
    attacks = {f"shift {i}": partial(shift, i / 100) for i in range(1, 9)}
    report = pd.evaluate(coins, data, attacks, num_samples=20, rules=[single_draw])
    by_verdict = np.min(
        [report.arrays[f"correct/defense/{n}/0.2/single_draw"] for n in attacks], axis=0
    ).mean()
    assert by_verdict < 0.3
    tolerance = monte_carlo_tolerance(0.5, 400 * 20)
    assert report.row(attack="worst")["accuracy"] == pytest.approx(0.5, abs=tolerance)


def test_several_radii_cost_and_time():
    defense, (x, y) = defended("rse"), tiny_batch(5)
    attack = pd.with_draws(partial(pd.attacks.pgd, num_steps=3), 4)
    report = pd.evaluate(defense, (x, y), {"pgd": attack, "null": null}, eps=[0.1, 0.2, 0.1], num_samples=3)
    assert [row["eps"] for row in report.rows if row["attack"] == "pgd"] == [0.1, 0.1, 0.2, 0.2]
    for radius in (0.1, 0.2):
        row = report.row(attack="pgd", eps=radius, rule="mean_prob")
        assert (row["attack_samples"], row["gradients"], row["queries"]) == (4, 3 * 4 * 5, 3 * 4 * 5)
        assert report.timing[f"defense/pgd/{radius:g}"] > 0
    assert report.row(attack="null", eps=0.1, rule="mean_prob")["gradients"] == 0
    assert [row["eps"] for row in report.curve("pgd", "mean_prob")] == [0.0, 0.1, 0.2]
    plain = pd.evaluate(defended("deterministic"), (x, y), {"pgd": attack})
    assert plain.row(attack="pgd", rule="mean_prob")["attack_samples"] == 1


def test_what_is_reported_is_what_one_recomputes():
    defense, (x, y) = defended("deterministic"), tiny_batch(30)
    attack = partial(pd.attacks.pgd, num_steps=5, random_start=False)
    report = pd.evaluate(defense, (x, y), {"pgd": attack}, eps=0.1)
    points = attack(defense, x, y, eps=0.1)
    expected = float((defense(points)[0].argmax(-1) == y).float().mean())
    row = report.row(attack="pgd", rule="mean_prob")
    assert row["accuracy"] == pytest.approx(expected) and row["low"] <= expected <= row["high"]
    assert row["draws"] == "none" and row["num_samples"] == 1


def test_the_report_is_bytes_that_depend_on_the_seed_alone(tmp_path):
    defense, data = defended("bayesian on rse"), tiny_batch(6)
    attacks = {"pgd": partial(pd.attacks.pgd, num_steps=2), "null": null}
    texts = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(run)
        report = pd.evaluate(defense, data, attacks, num_samples=5, seed=seed)
        texts.append((report.save(tmp_path / str(run)) / "report.json").read_bytes())
    assert texts[0] == texts[1] != texts[2]
    content = json.loads(texts[0])
    assert list(content) == ["version", "settings", "rows"] and b"second" not in texts[0]
    promised = {"defense", "attack", "rule", "accuracy", "low", "high", "num_examples", "num_samples"}
    assert all(promised | {"attack_samples", "gradients"} <= set(row) for row in content["rows"])
    loaded = pd.Report.load(tmp_path / "2")
    assert loaded.rows == report.rows and loaded.settings == report.settings
    assert loaded.timing == report.timing and set(loaded.arrays) == set(report.arrays)
    (tmp_path / "2" / "report.json").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="expected report version 1, got 0"):
        pd.Report.load(tmp_path / "2")


def test_reports_add_up_only_if_they_were_asked_the_same():
    data = tiny_batch(6)
    a, b, c = (
        pd.evaluate(defended("rse"), data, name=name, num_samples=count)
        for name, count in (("a", 3), ("b", 3), ("c", 4))
    )
    both = a + b
    assert both.defenses == ["a", "b"] and both.only("b").rows == b.rows
    assert set(both.only("a").arrays) == set(a.arrays)
    assert both.table().count("\n") == 1 + len(both.rows)
    with pytest.raises(ValueError, match="different settings do not add up: num_samples differ"):
        a + c
    with pytest.raises(ValueError, match="expected one of a, b, got 'c'"):
        both.only("c")
    with pytest.raises(ValueError, match="found 2 of 2"):
        a.row(attack="clean")
    with pytest.raises(ValueError, match="expected an attack of the report"):
        a.curve("pgd", "mean_prob")


class Learner:
    """Answers right from its second input on: it remembers how many it has seen."""

    stochastic = False
    group = 1

    def __init__(self, y):
        self.y, self.seen, self.seeds = y, 0, []

    def __call__(self, x, num_samples=None):
        return torch.zeros(1, len(x), 3)

    def respond(self, x, *, seed):
        self.seeds.append(seed)
        logits = torch.nn.functional.one_hot(self.y[: len(x)], 3).float()
        logits[0] *= -1 if self.seen == 0 else 1
        self.seen += len(x)
        return logits.unsqueeze(0)

    def state(self):
        return self.seen

    def restore(self, state):
        self.seen = state


def test_an_adaptive_defense_is_replayed_from_where_it_was_found():
    x, y = tiny_batch(5)
    learner = Learner(y)
    report = pd.evaluate(learner, (x, y), {"null": null})
    correct = report.arrays["correct/defense/null/0.2/mean_prob"]
    assert correct.shape == (REPLAYS, 5) and not correct[:, 0].any() and correct[:, 1:].all()
    assert learner.seen == 0 and len(set(learner.seeds)) == REPLAYS
    assert report.rows[0]["draws"] == "shared"


@pytest.mark.parametrize(
    ("name", "kind"),
    {"rse": "independent", "bayesian": "shared", "ensemble": "shared", "deterministic": "none"}.items(),
)
def test_draws_are_shared_where_weights_are_random(name, kind):
    assert pd.evaluate(defended(name), tiny_batch(5), {"null": null}).rows[0]["draws"] == kind


def test_draws_that_all_examples_share_widen_the_interval():
    net = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.zeros_(net.weight)  # a draw is right everywhere or nowhere
    defense = pd.defenses.bayesian(net, num_data=1)
    x, y = torch.full((400, 1), 0.5), torch.zeros(400, dtype=torch.long)
    row = pd.evaluate(defense, (x, y), {}, rules=[single_draw], num_samples=20).rows[0]
    assert row["high"] - row["low"] > 0.3, "20 draws decide, not 8,000 verdicts"


def test_data_sets_and_loaders_are_the_tensors_they_hold():
    defense, (x, y) = defended("rse"), tiny_batch(7)
    held = TensorDataset(x, y)
    reports = [pd.evaluate(defense, data, num_samples=4) for data in ((x, y), held, DataLoader(held, 3))]
    assert reports[0].rows == reports[1].rows == reports[2].rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "expected eps >= 0"),
        ({"eps": []}, "expected at least one eps and one rule"),
        ({"rules": []}, "expected at least one eps and one rule"),
        ({"norm": 3}, "expected norm 1, 2 or math.inf"),
        ({"num_samples": 0}, "expected num_samples >= 1"),
        ({"estimand": "future"}, "unknown estimand 'future'; known: population, test set"),
        ({"name": "a/b"}, "without '/', got 'a/b'"),
        ({"attacks": {"clean": null}}, "expected names other than 'clean' and 'worst'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pd.evaluate(defended("deterministic"), tiny_batch(), **options)


def test_bad_data_are_refused():
    defense, (x, y) = defended("deterministic"), tiny_batch()
    with pytest.raises(TypeError, match="expected .x, y., a data set or a loader of batches, got int"):
        pd.evaluate(defense, 3)
    with pytest.raises(ValueError, match="got an empty loader"):
        pd.evaluate(defense, [])
    with pytest.raises(ValueError, match="expected y < 3"):
        pd.evaluate(defense, (x, y + 3))
    with pytest.raises(ValueError, match="expected num_samples >= 1"):
        pd.with_draws(null, 0)


def test_the_estimand_is_named_and_moves_the_interval():
    defense, data = defended("bayesian on rse"), tiny_batch(20)
    reports = {e: pd.evaluate(defense, data, estimand=e, num_samples=30) for e in ("population", "test set")}
    rows = {e: report.row(rule="single_draw") for e, report in reports.items()}
    assert reports["test set"].settings["estimand"] == "test set"
    width = {e: row["high"] - row["low"] for e, row in rows.items()}
    assert width["test set"] < width["population"] and not math.isnan(width["population"])


def test_a_network_that_draws_for_itself_is_a_function_of_the_seed():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = LinearWorld().net

        def forward(self, x):
            return self.net(x + 0.3 * torch.randn_like(x))

    data = LinearWorld().points(30)
    for defense in (pd.deterministic(Own()), pd.defenses.rse(Own(), before_linear=True)):
        rows = [pd.evaluate(defense, data, {"fgsm": pd.attacks.fgsm}, eps=0.1, seed=0).rows for _ in range(3)]
        assert rows[0] == rows[1] == rows[2]
