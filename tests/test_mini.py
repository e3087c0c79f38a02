"""The one-page program and the library say the same."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

import probdefense as pd
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.logits.losses import expected_cross_entropy
from probdefense.objectives import elbo

PATH = Path(__file__).parent.parent / "examples" / "mini_probdefense.py"
SPEC = importlib.util.spec_from_file_location("mini_probdefense", PATH)
mini = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mini)


def both():
    """One network, the same sites: weights N(loc, 0.1), noise of 0.2 on the raw input."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    small = mini.Mini(net, num_data=30, sigma=0.2, init_scale=0.1)
    noisy = nn.Sequential(pd.nn.Noise(0.2), *net)
    ours = pd.defenses.bayesian(noisy, num_data=30, init_scale=0.1)
    return small, ours


def test_one_page_imports_torch_and_pyro_only():
    lines = [line for line in PATH.read_text().splitlines() if line.startswith(("import ", "from "))]
    roots = {line.split()[1].partition(".")[0] for line in lines}
    assert roots <= {"math", "sys", "torch", "pyro"} and len(PATH.read_text().splitlines()) <= 150


def test_elbo(float64):
    small, ours = both()
    x, y = torch.rand(6, 3), torch.randint(4, (6,))
    torch.manual_seed(1)
    expected = small.elbo(x, y)
    torch.manual_seed(1)
    torch.testing.assert_close(elbo(ours, x, y), expected, rtol=1e-9, atol=1e-9)


def test_predictive(float64):
    small, ours = both()
    x = torch.rand(6, 3)
    torch.manual_seed(1)
    expected = mini.predict(small(x, 1))
    torch.manual_seed(1)
    torch.testing.assert_close(pd.rules.mean_prob(ours(x, 1)), expected)
    logits = torch.randn(9, 6, 4)
    torch.testing.assert_close(pd.rules.mean_prob(logits), mini.predict(logits))


def test_eot_gradient(float64):
    small, ours = both()
    x, y = torch.rand(6, 3), torch.randint(4, (6,))
    torch.manual_seed(1)
    expected = mini.eot_gradient(small, x, y, num_samples=1)
    torch.manual_seed(1)
    found = input_gradient(ours.samples(1), x, climb(expected_cross_entropy, y)).gradient
    torch.testing.assert_close(found, expected)


def test_it_runs(capsys):
    mini.main(num_steps=3)
    assert capsys.readouterr().out.count("accuracy") == 1
