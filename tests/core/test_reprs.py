"""What a person sees who prints an object."""

import torch

import probdefense as pd


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
