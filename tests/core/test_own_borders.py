"""Own programs that would train, freeze or load something else than what was meant."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLaplaceApproximation, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.objectives import elbo
from tests.worlds import monte_carlo_tolerance

N = 40


class Model(PyroModule):
    """A linear layer whose plate is made by `plate(x)`; `columns` adds a latent in a plate of its own."""

    def __init__(self, plate=lambda x: pyro.plate("data", size=N, subsample=x), columns=False, spread=1.0):
        super().__init__()
        self.plate, self.columns = plate, columns
        self.lin = PyroModule[nn.Linear](4, 3, bias=False)
        self.lin.weight = PyroSample(dist.Normal(0.0, spread).expand([3, 4]).to_event(2))

    def forward(self, x, y=None):
        if self.columns:
            with pyro.plate("columns", 4):
                x = x * pyro.sample("gain", dist.LogNormal(0.0, 0.1))
        logits = self.lin(x)
        with self.plate(x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


class Local(Model):
    """With a contrast per example."""

    def forward(self, x, y=None):
        with pyro.plate("images", size=N, subsample=x):
            contrast = pyro.sample("contrast", dist.LogNormal(0.0, 0.3))
        return super().forward(contrast.unsqueeze(-1) * x, y)


def batch(count=8):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def blocked(model):
    return poutine.block(model, hide=["y"])


def of(model, kind=AutoNormal, **options):
    return pd.Defense(model, kind(blocked(model), **options), example=batch(2)[0])


SIZELESS = {
    "length": lambda x: pyro.plate("data", len(x)),
    "nothing": lambda x: pyro.plate("data"),
    "no plate": lambda x: warnings.catch_warnings(),
}


@pytest.mark.parametrize("plate", SIZELESS.values(), ids=SIZELESS)
@pytest.mark.parametrize("generator", [False, True])
def test_a_plate_without_its_size_is_refused_by_the_first_fit(plate, generator):
    defense, data = of(Model(plate)), batch(N)
    before = {name: value.clone() for name, value in defense.state_dict().items() if torch.is_tensor(value)}
    loader = DataLoader(TensorDataset(*data), 10)
    with pytest.raises(ValueError, match=r"num_data=10 .*pyro.plate\(..., size="):
        pd.fit(defense, (b for b in loader) if generator else loader, epochs=1, progress=False)
    if not generator:  # of a generator only the second batch tells
        assert all(torch.equal(before[name], defense.state_dict()[name]) for name in before)


@pytest.mark.parametrize("plate", SIZELESS.values(), ids=SIZELESS)
def test_a_plate_without_its_size_is_right_with_all_the_data(plate):
    (x, y), defense, sized = batch(N), of(Model(plate)), of(Model())
    values = []
    for made in (defense, sized):
        torch.manual_seed(1)
        values.append(elbo(made, x, y))
    torch.testing.assert_close(*values)
    pd.fit(defense, [(x, y)], epochs=1, progress=False)


def test_a_batch_beyond_the_plate_is_refused():
    defense = of(Model())
    with pytest.raises(
        ValueError, match="at most num_data=40 examples, as the plate around 'y' says, got 41"
    ):
        defense.step(*batch(41))


@pytest.mark.parametrize(
    "observe",
    [
        lambda logits, y: pyro.sample("y", dist.Categorical(logits=logits).to_event(1), obs=y),
        lambda logits, y: [
            pyro.sample(f"y{i}", dist.Categorical(logits=logits[i]), obs=y[i])
            for i in pyro.plate("data", len(y))
        ],
    ],
)
def test_a_likelihood_of_the_whole_batch_is_refused_by_name(observe):
    class Whole(Model):
        def forward(self, x, y=None):
            logits = self.lin(x)
            if y is not None:
                observe(logits, y)
            return logits

    with pytest.raises(ValueError, match=r"one log-likelihood per example \(8,\); got 'y0?' of shape \(\)"):
        of(Whole()).step(*batch())


def test_a_model_that_observes_nothing_is_refused():
    class Silent(Model):
        def forward(self, x, y=None):
            return self.lin(x)

    with pytest.raises(ValueError, match="the model observed nothing; expected"):
        of(Silent()).step(*batch())


def test_a_site_to_be_enumerated_is_refused_by_name():
    class Switched(Model):
        def forward(self, x, y=None):
            on = pyro.sample("on", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            return super().forward(on * x, y)

    model = Switched()
    defense = pd.Defense(model, AutoNormal(poutine.block(model, hide=["y", "on"])), example=batch(2)[0])
    with pytest.raises(ValueError, match="site 'on' of the model is marked for enumeration"):
        defense.step(*batch())


def test_a_site_of_the_guide_that_the_model_lacks_is_refused_by_name():
    def guide(misspelled, **options):
        class Guide(PyroModule):
            def forward(self, x, y=None):
                pyro.sample("lin.weight", dist.Normal(torch.zeros(3, 4), 0.1).to_event(2))
                pyro.sample(misspelled, dist.Normal(0.0, 1.0), **options)

        return Guide()

    with pytest.raises(ValueError, match=r"got 'lin.weigth', which it lacks; the model has 'lin.weight'"):
        pd.Defense(Model(), guide("lin.weigth"), example=batch(2)[0]).step(*batch())
    meant = guide("scratch", infer={"is_auxiliary": True})
    assert pd.Defense(Model(), meant, example=batch(2)[0]).step(*batch()).kl


# Plates


def test_a_latent_in_a_plate_of_its_own_is_shared_by_the_batch():
    defense, (x, _) = of(Model(columns=True)), batch()
    frozen = defense.freeze(3)
    assert frozen(x).shape == (3, 8, 3)
    torch.testing.assert_close(frozen(x)[:, 2:4], frozen(x[2:4]))
    torch.testing.assert_close(defense.mean()(x)[:, 2:4], defense.mean()(x[2:4]))


def test_an_autoguide_does_not_fit_rows_at_random():
    with pytest.raises(ValueError, match="one value of site 'contrast' to every row of the plate 'images'"):
        of(Local())
    with pytest.raises(ValueError, match="hide the site"):
        of(Local(), AutoDiagonalNormal)


def test_rows_that_are_named_are_fitted():
    def rows(x, y=None):
        return pyro.plate("images", N, subsample=torch.arange(len(x)))

    defense, (x, y) = of(Local(), create_plates=rows), batch()
    torch.manual_seed(1)
    ours = N * elbo(defense, x, y)
    torch.manual_seed(1)
    with pyro.validation_enabled(False):
        theirs = Trace_ELBO().differentiable_loss(defense.model, defense.guide, x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


# The parameter store


def trained_in_pyro(x, y):
    model = Model(spread=5.0)
    guide = AutoNormal(blocked(model))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(100):
        svi.step(x, y)
    return model, guide


def accuracy(defense, x, y):
    return float((pd.predict(defense, x, 30).label == y).float().mean())


def test_a_posterior_in_the_store_is_warned_of_and_taken_over_by_a_call():
    x = batch(N)[0]
    y = x[:, :3].argmax(1)
    model, guide = trained_in_pyro(x, y)
    right = accuracy(pd.Defense(model, guide), x, y)  # modules that Pyro trained know their values
    assert right > 0.85
    model = Model(spread=5.0)
    with pytest.warns(UserWarning, match="store holds other values of AutoNormal.locs.lin.weight"):
        fresh = of(model)
    assert accuracy(fresh, x, y) < right - 0.2
    model = Model(spread=5.0)
    guide = AutoNormal(blocked(model))
    guide(x)  # Pyro moves what its store holds into the modules
    assert accuracy(pd.Defense(model, guide), x, y) > 0.85


def test_other_names_in_the_store_are_nobodys_business():
    pyro.param("mine", torch.ones(3))
    of(Model())


# Laplace's approximation


def test_the_hessian_of_laplace_sees_the_labels():
    x, y = batch(N)
    model = Model()
    guide = AutoLaplaceApproximation(model)
    guide(x, y)  # with the labels, so that they are observed and need not be hidden
    defense = pd.Defense(model, guide)
    optimizer = torch.optim.Adam(defense.param_groups(), lr=0.2)
    pd.fit(defense, [(x, y)], epochs=60, optimizer=optimizer, progress=False)
    laplace = pd.Defense(model, guide.laplace_approximation(x, y))

    def energy(w):
        return nn.functional.cross_entropy(x @ w.view(3, 4).T, y, reduction="sum") + 0.5 * w.square().sum()

    hessian = torch.autograd.functional.hessian(energy, guide.loc.detach())
    exact = torch.linalg.inv(hessian).diagonal().sqrt()
    draws = torch.stack([laplace.draw(x)["lin.weight"].flatten() for _ in range(400)])
    tolerance = monte_carlo_tolerance(float(exact.max()) / 2**0.5, 400)
    assert float((draws.std(0) - exact).abs().max()) < tolerance
    assert float(exact.max()) < 1 - tolerance  # that of the prior is 1
    torch.testing.assert_close(laplace.mean()(x)[0], x @ guide.loc.detach().view(3, 4).T)
    assert torch.isfinite(elbo(laplace, x, y))
