"""Own programs in ArviZ: their names, what is kept of them, and what leaves one out."""

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import probdefense as pd
from probdefense import analysis
from probdefense.analysis import fits, to_arviz
from probdefense.analysis.trees import joined

N = 12

pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The inplace keyword:FutureWarning"),
]

OURS = [
    *("weight_scale", "signal_to_noise", "prior_scale", "noise_scale", "parameter", "noise_layer", "probs"),
    *("weight_rms", "noise_rms"),
    *("prior_parameter", "x", "example", "class", "eps", "chain", "draw", "w_dim_0"),
]


class Named(PyroModule):
    """Weights `w` in two layers and scalars of any names; `tau` is above the first layer."""

    def __init__(self, *names, noise=False, shape=()):
        super().__init__()
        self.names, self.noise, self.shape = names, noise, shape

    def forward(self, x, y=None):
        total = sum(
            pyro.sample(name, dist.Normal(0.0, 1.0).expand(self.shape).to_event()).sum()
            for name in self.names
        )
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        first = pyro.sample("first.weight", dist.Normal(torch.zeros(4, 4), tau).to_event(2))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
        if self.noise:
            total = total + pyro.sample("jitter", dist.Normal(0.0, 1.0))
        logits = (x @ first).tanh() @ w + total * torch.arange(3.0)
        with pyro.plate("data", size=N, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def autoguided(model, hide=()):
    return pd.Defense(model, AutoNormal(poutine.block(model, hide=["y", *hide])), example=batch()[0][:2])


def values(tree, group, name):
    return np.asarray(tree[group][name])


@pytest.mark.parametrize("shape", [(), pytest.param((2, 3), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OURS)
def test_a_latent_may_have_any_name(name, shape, tmp_path):
    defense, data = autoguided(Named(name, shape=shape)), batch()
    tree = to_arviz(defense, data, num_samples=5, weights=True)
    kept = f"{name}_1" if name in ("chain", "draw") else name
    found = values(tree, "posterior", kept)
    assert found.shape == (1, 5, *shape) and found.std(1).min() > 0
    rms = "weight_rms_1" if name == "weight_rms" else "weight_rms"
    axis = "parameter_1" if name == "parameter" else "parameter"
    assert name in tree["posterior"][rms][axis].values
    assert name in tree["constant_data"]["weight_scale"]["parameter"].values
    assert values(tree, "posterior_predictive", "probs").shape == (1, 5, N, 3)
    assert tree["posterior_predictive"]["probs"].dims == ("chain", "draw", "example", "class")
    tree.to_netcdf(str(tmp_path / "tree.nc"))
    read = arviz.from_netcdf(str(tmp_path / "tree.nc"))
    assert np.array_equal(values(read, "posterior", kept), found)
    assert len(arviz.summary(tree, kind="stats")) > 0


def test_several_collisions_at_once():
    tree = to_arviz(autoguided(Named(*OURS)), batch(), num_samples=3, weights=True)
    assert {*OURS, "weight_rms_1", "chain_1", "draw_1"} - {"chain", "draw"} <= set(
        tree["posterior"].data_vars
    )


def test_parameters_of_a_network_may_have_our_names_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.randn(4, 3))
            self.weight_scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x @ self.parameter * self.weight_scale

    tree = to_arviz(pd.defenses.bayesian(Net(), num_data=N), batch(), num_samples=4)
    assert values(tree, "posterior", "weight_scale").shape == (1, 4, 3)
    assert values(tree, "constant_data", "weight_scale").shape == (2,)
    assert list(tree["constant_data"]["parameter"].values) == ["parameter", "weight_scale"]
    assert list(tree["posterior"]["parameter_1"].values) == ["parameter", "weight_scale"]


def test_hyper_parameters_are_kept(monkeypatch):
    defense, data = autoguided(Named("shift")), batch()
    names = set(to_arviz(defense, data, num_samples=3)["posterior"].data_vars)
    assert "tau" in names and "first.weight" not in names
    monkeypatch.setattr(fits, "LAST_LAYER", 5)  # no layer is small enough
    names = set(to_arviz(defense, data, num_samples=3)["posterior"].data_vars)
    assert "tau" in names and "w" not in names


def test_discrete_latents_are_exported():
    class Choice(Named):
        def forward(self, x, y=None):
            pyro.sample("k", dist.Categorical(torch.ones(3)))
            return super().forward(x, y)

    tree = to_arviz(autoguided(Choice(), hide=["k"]), batch(), num_samples=40, weights=True)
    assert set(np.unique(values(tree, "posterior", "k"))) == {0, 1, 2}


def test_leaving_one_out_follows_what_the_guide_fitted():
    x, y = batch()
    fitted = analysis.loo(to_arviz(autoguided(Named()), (x, y), num_samples=200))
    assert np.isfinite(fitted.k_hat).all()
    guide = nn.Module()
    guide.forward = lambda x, y=None: None
    noise = pd.Defense(Named(noise=True), guide, example=x[:2])
    assert np.isnan(analysis.loo(to_arviz(noise, (x, y), num_samples=50)).k_hat).all()


def test_groups_are_joined_in_a_tree_of_xarray_too():
    xarray = pytest.importorskip("xarray")
    one, two = (
        xarray.DataTree.from_dict({name: xarray.Dataset({"a": 0})})
        for name in ("posterior", "log_likelihood")
    )
    assert list(joined(one, two).children) == ["posterior", "log_likelihood"]
