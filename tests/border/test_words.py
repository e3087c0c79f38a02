"""Keywords and units that are nearly right are refused with the right ones."""

import math

import pytest
import torch
from torch import nn

import probdefense as pd

X, Y = torch.rand(4, 1, 4, 4), torch.arange(4) % 3


def plain() -> pd.Defense:
    return pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))


@pytest.mark.parametrize("name", ["pgd", "bim", "fgsm", "apgd", "square", "suite", "nes"])
def test_a_radius_in_gray_levels_is_refused_by_every_attack(name):
    with pytest.raises(
        ValueError, match="expected eps <= 1 in l-inf.*got 8; 8 of 255 gray levels are 8 / 255"
    ):
        getattr(pd.attacks, name)(plain(), X, Y, eps=8)


@pytest.mark.parametrize(
    "eps", [8, [0.1, 8], torch.tensor([0.1, 0.1, 0.1, 8.0])], ids=["one", "several", "each"]
)
def test_a_radius_in_gray_levels_is_refused_before_an_evaluation(eps):
    if isinstance(eps, torch.Tensor):
        with pytest.raises(ValueError, match="got 8; 8 of 255"):
            pd.attacks.pgd(plain(), X, Y, eps=eps)
    else:
        with pytest.raises(ValueError, match="got 8; 8 of 255"):
            pd.evaluate(plain(), (X, Y), {"fgsm": pd.attacks.fgsm}, eps=eps)


def test_a_radius_in_gray_levels_is_refused_in_training():
    defense, data = plain(), torch.utils.data.TensorDataset(X, Y)
    inner = pd.objectives.adversarial(pd.objectives.elbo, lambda f, x, y: pd.attacks.pgd(f, x, y, eps=8))
    with pytest.raises(ValueError, match="got 8; 8 of 255"):
        pd.fit(defense, torch.utils.data.DataLoader(data, 4), epochs=1, objective=inner, progress=False)


def test_other_norms_reach_further_than_one_pixel():
    assert pd.attacks.pgd(plain(), X, Y, eps=1.5, norm=2, num_steps=1).shape == X.shape
    assert pd.attacks.pgd(plain(), X, Y, eps=1.0, norm=math.inf, num_steps=1).shape == X.shape


def test_a_misspelled_keyword_of_an_attack_names_the_right_one():
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'; did you mean 'num_steps'"):
        pd.attacks.pgd(plain(), X, Y, eps=0.1, steps=3)


@pytest.mark.parametrize(
    ("build", "wrong", "right"),
    [
        (pd.defenses.rse, "sigma_initial", "sigma_init"),
        (pd.defenses.bayesian, "priors", "prior"),
        (pd.defenses.ensemble, "num_dat", "num_data"),
    ],
)
def test_a_misspelled_keyword_of_a_builder_names_the_right_one(build, wrong, right):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'; did you mean '{right}'"):
        build(net, **{wrong: 1})
