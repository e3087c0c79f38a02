"""Laplace approximations: the library's own numbers as random weights; its absence in one sentence."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from probdefense.defenses import laplace
from tests.worlds import import_torchvision, monte_carlo_tolerance


@pytest.fixture
def library():
    """laplace-torch, where it is installed."""
    pytest.importorskip("curvlinops")
    import_torchvision()
    return pytest.importorskip("laplace")


def trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    data = TensorDataset(torch.rand(30, 4), torch.randint(3, (30,)))
    return net, DataLoader(data, batch_size=10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", ["last_layer", "diagonal", "kron"])
def test_its_draws_have_the_mean_and_covariance_of_the_library(structure, library):
    net, loader = trained()
    defense = laplace(net, loader, structure=structure, num_samples=4000)
    weights, curvature = {"last_layer": ("last_layer", "full"), "diagonal": ("all", "diag")}.get(
        structure, ("all", "kron")
    )
    found = library.Laplace(
        net, "classification", subset_of_weights=weights, hessian_structure=curvature, prior_precision=1.0
    )
    found.fit(loader)
    torch.manual_seed(1)
    theirs, site = found.sample(4000), defense.sites["weights"]
    with torch.no_grad():
        values = defense.freeze(4000).values("weights")
        ours = torch.stack([torch.cat([v.flatten() for v in site.fill(w, net).values()]) for w in values])
    tolerance = 2 * monte_carlo_tolerance(float(theirs.var(0).max()), 4000)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=tolerance)
    assert float((ours.T.cov() - theirs.T.cov()).abs().max()) < 2 * tolerance
    x = torch.rand(2, 4)
    assert defense(x, 5).shape == (5, 2, 3)


def test_the_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace", None)
    net, loader = trained()
    with pytest.raises(ImportError, match=r"pip install probdefense\[laplace\]"):
        laplace(net, loader)


def test_bad_settings_are_refused():
    net, loader = trained()
    with pytest.raises(ValueError, match="unknown structure 'round'"):
        laplace(net, loader, structure="round")
    with pytest.raises(ValueError, match="expected prior_scale > 0"):
        laplace(net, loader, prior_scale=0.0)
