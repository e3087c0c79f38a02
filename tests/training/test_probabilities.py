"""A network whose last layer is a softmax is trained on a second one: fit says so."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd

DATA = TensorDataset(torch.rand(12, 4), torch.arange(12) % 3)


def wrapped(last: nn.Module, kind: str) -> pd.Defense:
    net = nn.Sequential(nn.Linear(4, 3), last)
    return pd.deterministic(net) if kind == "plain" else pd.defenses.bayesian(net, num_data=12)


@pytest.mark.parametrize("kind", ["plain", "bayesian"])
def test_training_on_probabilities_warns_once(kind):
    with pytest.warns(UserWarning, match="look like probabilities.*weakens the training") as caught:
        pd.fit(wrapped(nn.Softmax(-1), kind), DataLoader(DATA, 4), epochs=3, progress=False)
    assert len([each for each in caught if "probabilities" in str(each.message)]) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ["plain", "bayesian"])
@pytest.mark.parametrize("last", [nn.Identity(), nn.LogSoftmax(-1)], ids=["logits", "log-probabilities"])
def test_training_on_logits_says_nothing(kind, last):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.fit(wrapped(last, kind), DataLoader(DATA, 4), epochs=2, progress=False)
