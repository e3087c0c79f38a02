"""What a person sees who prints an object."""

import torch

import probdefense as pd
from tests.core.test_own_programs import autoguided, make


def test_a_defense_lists_its_sites():
    text = repr(pd.defenses.bayesian(pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.25), num_data=100))
    assert "76,564 trained parameters, num_data=100" in text
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "Normal(0, 1)" in lines["input_noise"] and lines["input_noise"].endswith("0.25")
    assert "38,282" in lines["weights"] and lines["weights"].endswith("0.02")


def test_a_plain_network_says_that_nothing_is_random():
    assert "nothing is random" in repr(pd.deterministic(torch.nn.Linear(4, 3)))


def test_a_prediction_is_one_line():
    text = repr(pd.predict(pd.deterministic(torch.nn.Linear(4, 3)), torch.rand(5, 4)))
    assert text.startswith("Prediction of 5 inputs, 3 classes, 1 draws") and "settled 100 %" in text


def test_a_report_is_its_table():
    report = pd.evaluate(pd.deterministic(torch.nn.Linear(4, 3)), (torch.rand(5, 4), torch.zeros(5).long()))
    assert report.table() in repr(report) and "norm inf" in repr(report)


def test_a_program_of_ones_own_lists_its_sites_sizes_and_num_data():
    for made, posterior in ((make(), "Normal"), (autoguided(), "AutoNormal")):
        text = repr(made)
        assert "num_data=40" in text.splitlines()[0]
        lines = {line.split()[0]: line.split() for line in text.splitlines()}
        assert lines["linear.weight"][1:4] == ["12", "Normal", posterior]
        assert "<td>linear.weight</td><td>12</td>" in made._repr_html_()
    assert "per example" in repr(make()) and "per example" not in repr(autoguided())
    bare = pd.Defense(make().model, make().guide)
    assert "they are listed if it is made with example=x" in repr(bare)


def test_printing_a_defense_changes_nothing():
    made, before = make(), torch.get_rng_state()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    assert repr(made) == repr(made) and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_a_frozen_defense_can_be_exported():
    module = pd.defenses.rse(pd.models.small_cnn()).as_module(num_samples=3, frozen=True)
    x = torch.rand(4, 1, 8, 8)
    module(x)  # the shapes of the noise are found in the first pass
    program = torch.export.export(module, (x,), strict=False)
    assert torch.allclose(program.module()(1 - x), module(1 - x), atol=1e-6)
