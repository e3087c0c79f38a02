"""What a report turns into holds the numbers of its rows."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from tests.contract import defended
from tests.worlds import tiny_batch, tiny_net


def report(name="defense", builder="rse"):
    attacks = {"fgsm": pd.attacks.fgsm}
    return pd.evaluate(
        defended(builder), tiny_batch(6), attacks, eps=[0.1, 0.2], num_samples=4, name=name, seed=1
    )


def test_reports_are_summed():
    reports = [report("a"), report("b"), report("c")]
    assert sum(reports).rows == (reports[0] + reports[1] + reports[2]).rows
    assert sum(reports[:1]) is reports[0]
    with pytest.raises(TypeError, match="expected a Report to add, got int"):
        1 + reports[0]


def test_pandas_has_the_rows():
    found, one = report().to_pandas(), report()
    assert len(found) == len(one.rows) == 6 and [*found] == [*one.rows[0]]
    for name in ("attack", "eps", "rule", "accuracy", "low", "high", "gradients"):
        assert found[name].tolist() == [row[name] for row in one.rows]


def test_xarray_has_every_number_at_its_place_and_nothing_elsewhere():
    both = report("a") + report("b", "pni")
    found = both.to_xarray()
    assert found["accuracy"].dims == ("defense", "attack", "eps", "rule")
    for row in both.rows:
        place = {name: row[name] for name in ("defense", "attack", "eps", "rule")}
        for name in ("accuracy", "low", "high", "gradients"):
            assert float(found[name].sel(place)) == row[name]
        by_example = both.arrays.at("correct", *place.values()).mean(0)
        assert np.array_equal(found["correct"].sel(place), by_example)
    assert int(found["accuracy"].notnull().sum()) == len(both.rows)
    assert bool(found["accuracy"].sel(attack="clean", eps=0.1).isnull().all())
    assert found["label"].values.tolist() == tiny_batch(6)[1].tolist()
    assert '"seed": 1' in found.attrs["settings"]


def test_xarray_of_defenses_on_other_examples_has_no_axis_of_examples():
    other = pd.evaluate(defended("rse"), tiny_batch(4), num_samples=4, name="other", seed=1)
    one = pd.evaluate(defended("rse"), tiny_batch(6), num_samples=4, name="one", seed=1)
    other.settings = one.settings
    found = (one + other).to_xarray()
    assert "correct" not in found and float(found["num_examples"].sel(defense="other")[0, 0, 0]) == 4


def test_xarray_of_equal_labels_of_other_examples_has_no_axis_of_examples():
    x, y, net = torch.rand(4, 4), torch.zeros(4).long(), pd.deterministic(nn.Linear(4, 3))
    one, other = (
        pd.evaluate(net, (x, y), name=str(first), chunk_size=4, first=first, num_samples=4)
        for first in (0, 4)
    )
    assert "correct" in one.to_xarray() and "correct" not in (one + other).to_xarray()


def test_tables_count_gradients_per_image():
    one = report()
    row = one.row(attack="fgsm", eps=0.1, rule="mean_prob")
    per_image = round(row["gradients"] / 6)
    assert f" {per_image}\n" in one.table() + "\n" and row["gradients"] == 6 * per_image
    assert "gradients/image" in one.table().splitlines()[0]
    assert one.to_markdown(("attack", "gradients/image")).splitlines()[4] == f"| fgsm | {per_image} |"
    assert rf"fgsm & {per_image} \\" in one.to_latex(("attack", "gradients/image"))
    assert one._repr_html_().count("<tr>") == 7


SHOWN = {
    "certificate": lambda d, x, y: pd.certify(d, x, n0=5, n=20, seed=0),
    "prediction": lambda d, x, y: pd.predict(d, x, 4, seed=0),
    "checks": lambda d, x, y: pd.checks.run(d, x, y, eps=0.1, num_gradients=10, num_samples=2, num_verdict=2),
    "history": lambda d, x, y: pd.fit(pd.defenses.rse(tiny_net()), [(x, y)], epochs=2, progress=False),
    "comparison": lambda d, x, y: pd.compare_all(report("a") + report("b", "pni")),
    "report": lambda d, x, y: report(),
    "defense": lambda d, x, y: d,
}


@pytest.mark.parametrize("name", SHOWN)
def test_objects_show_themselves(name):
    x, y = tiny_batch(6)
    found = SHOWN[name](defended("rse"), x, y)
    html, text = found._repr_html_(), repr(found)
    assert html.count("<table>") == html.count("</table>") == 1 and html.count("<tr>") > 1
    assert "tensor(" not in text + html and max(map(len, text.splitlines())) < 400


def test_the_texts_say_what_matters():
    world = pd.deterministic(nn.Linear(4, 3))
    checks = pd.checks.run(world, torch.rand(8, 4), torch.zeros(8).long(), eps=0.1, num_gradients=8)
    assert repr(checks).splitlines()[1].split() == ["check", "verdict", "evidence"]
    assert f"{len(checks.fired)} found something wrong" in repr(checks)
    certificate = pd.Certificate(
        torch.tensor([2, -1]),
        torch.tensor([0.25, 0.0]),
        torch.tensor([0.9, 0.4]),
        torch.tensor([9, 9]),
        0.2,
        0.01,
    )
    expected = "Certificate of 2 images, 1 of them abstentions: l2 radius 0.25 (median), 0.25 (largest)"
    assert repr(certificate) == f"{expected}; normal input noise 0.2 px, alpha 0.01"
    history = pd.History(loss=[2.0, 1.0], accuracy=[0.25, 0.5], seconds=[1.0, 2.0])
    assert repr(history).startswith(
        "History of 2 epochs: loss 2 to 1 nats, accuracy 0.25 to 0.5, 3 seconds\nepoch  loss  accuracy  seconds"
    )
    assert repr(pd.History()) == "History of no epoch"
    assert "0.25      1" in repr(history) and "25.0" not in repr(history)  # shares, as above the table


def test_the_worst_case_cost_the_sum_of_its_attacks():
    attacks = {"fgsm": pd.attacks.fgsm, "pgd": pd.with_draws(partial(pd.attacks.pgd, num_steps=3), 2)}
    found = pd.evaluate(defended("rse"), tiny_batch(6), attacks, eps=0.1, num_samples=4, seed=0)
    rows = {row["attack"]: row for row in found.rows if row["rule"] == "mean_prob"}
    for name in ("gradients", "queries"):
        assert rows["worst"][name] == rows["fgsm"][name] + rows["pgd"][name] > 0
    assert rows["worst"]["attack_samples"] is None


def test_tables_name_what_the_intervals_are_about():
    head, _, first = report().table().splitlines()[:3]
    assert "estimand" in head and "population" in first
    assert "| population |" in report().to_markdown()


@pytest.mark.parametrize("table", ["table", "to_markdown", "to_latex"])
def test_columns_that_no_row_has_are_refused(table):
    one = report()
    assert "max_queries" not in getattr(one, table)(("attack", "num_examples"))
    for columns, error, match in (
        (
            ("attack", "accuracies"),
            ValueError,
            "expected columns of the report, got attack, accuracies; known",
        ),
        ((), ValueError, "expected columns of the report, got none"),
        ("accuracy", TypeError, "expected columns as tuple or list, got str"),
    ):
        with pytest.raises(error, match=match):
            getattr(one, table)(columns)
