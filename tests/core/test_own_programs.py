"""Defenses from a user's own Pyro model and guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.objectives import adversarial, elbo
from tests.worlds import monte_carlo_tolerance

N = 40


class Model(PyroModule):
    """Random weights and a noise site on the input; observes y in a scaled plate."""

    def __init__(self, noise=0.1):
        super().__init__()
        self.noise = noise
        self.linear = PyroModule[nn.Linear](4, 3)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))

    def forward(self, x, y=None):
        if self.noise:
            with pyro.plate("data", size=N, subsample=x):
                x = x + self.noise * pyro.sample("eps", dist.Normal(0.0, 1.0).expand(x.shape).to_event(1))
        logits = self.linear(x)
        with pyro.plate("labels", size=N, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


class Guide(PyroModule):
    def __init__(self, depends_on_x=False):
        super().__init__()
        self.loc = PyroParam(torch.randn(3, 4))
        self.scale = PyroParam(torch.full((3, 4), 0.2), constraint=constraints.positive)
        self.depends_on_x = depends_on_x

    def forward(self, x, y=None):
        with pyro.plate("data", size=N, subsample=x):
            loc = 0.1 * x if self.depends_on_x else torch.zeros_like(x)
            pyro.sample("eps", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("linear.weight", dist.Normal(self.loc, self.scale).to_event(2))


def batch(count=8):
    return torch.rand(count, 4), torch.randint(3, (count,))


def local():
    return pyro.settings.context(module_local_params=True)


def make(**options):
    with local():
        return pd.Defense(Model(), Guide(**options), example=batch()[0])


def make_globally(**options):
    """As most people write it, without Pyro's setting for local parameters."""
    return pd.Defense(Model(), Guide(**options), example=batch()[0])


def nested():
    """A guide inside a guide."""

    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = Guide()

        def forward(self, x, y=None):
            return self.inner(x, y)

    return pd.Defense(Model(), Outer())


def autoguided(kind=AutoNormal):
    with local():
        model = Model(noise=0.0)
        return pd.Defense(model, kind(poutine.block(model, hide=["y"])), example=batch()[0])


def half_guided():
    """A noise site that the guide does not know: it keeps its prior, and must freeze all the same."""
    with local():
        model = Model()
        return pd.Defense(model, AutoNormal(poutine.block(model, hide=["y", "eps"])), example=batch()[0])


@pytest.mark.parametrize("make_defense", [make, make_globally, nested, autoguided, half_guided])
def test_draws_freezing_and_gradients(make_defense):
    defense, (x, _) = make_defense(), batch()
    assert defense.stochastic and defense(x, 5).shape == (5, 8, 3)
    assert not torch.equal(defense(x), defense(x))
    frozen = defense.freeze(4)
    assert torch.equal(frozen(x), frozen(x))
    torch.testing.assert_close(frozen(x)[:, 2:5], frozen(x[2:5]))
    point = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(frozen(point).sum(), point)
    assert float(gradient.abs().min()) > 0
    assert torch.equal(defense.mean()(x), defense.mean()(x))


def test_freezing_a_value_that_depends_on_x_is_refused():
    with pytest.raises(ValueError, match="site 'eps' depends on x"):
        make(depends_on_x=True).freeze(2)
    with local():
        late = pd.Defense(Model(), Guide(depends_on_x=True))
    with pytest.raises(ValueError, match="site 'eps' depends on x"):
        late.freeze(2)(batch()[0])


@pytest.mark.parametrize("make_defense", [make, autoguided])
def test_step_is_the_elbo(make_defense):
    defense, (x, y) = make_defense(), batch()
    with local(), torch.no_grad():
        draws = 600
        theirs = torch.tensor([Trace_ELBO().loss(defense.model, defense.guide, x, y) for _ in range(draws)])
        ours = torch.stack([N * elbo(defense, x, y) for _ in range(draws)])
    tolerance = monte_carlo_tolerance(float(torch.hypot(ours.std(), theirs.std())), draws)
    assert abs(float(ours.mean() - theirs.mean())) < tolerance


def test_closed_kl_where_the_guide_has_plain_normals():
    defense, (x, y) = make(), batch()
    with local():
        torch.manual_seed(0)
        ours = N * elbo(defense, x, y)
        torch.manual_seed(0)
        theirs = TraceMeanField_ELBO().differentiable_loss(defense.model, defense.guide, x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert defense.num_data == N


@pytest.mark.parametrize(
    "make_defense", [make, make_globally, nested, autoguided, lambda: autoguided(AutoDiagonalNormal)]
)
def test_fit_trains_every_parameter(make_defense):
    defense, (x, y) = make_defense(), batch(N)
    before = {n: p.detach().clone() for n, p in defense.named_parameters()}
    assert len(before) >= 3
    pyro.clear_param_store()
    pd.fit(defense, DataLoader(TensorDataset(x, y), batch_size=8), epochs=1, progress=False)
    assert not [n for n, p in defense.named_parameters() if torch.equal(before[n], p)]
    assert len(pyro.get_param_store()) == 0


def test_attacks_evaluation_and_prediction_work_on_it():
    defense, (x, y) = make(), batch()
    report = pd.evaluate(defense, (x, y), {"pgd": pd.attacks.pgd}, eps=0.1, num_samples=4)
    assert len(report.rows) == 4
    assert pd.predict(defense, x, 6).probs.shape == (8, 3)
    loss = adversarial(elbo, lambda f, x, y: pd.attacks.pgd(f, x, y, eps=0.1, num_steps=2), same_draw=True)
    assert torch.isfinite(loss(defense, x, y))


def test_given_draws_are_used():
    defense, (x, y) = make(), batch()
    draws = defense.draw(x)
    assert set(draws) == {"linear.weight", "eps"}
    a, b = defense.step(x, y, draws), defense.step(x, y, draws)
    assert torch.equal(a.logits, b.logits)
    torch.testing.assert_close(defense.at(draws)(x)[0], a.logits)


def test_plain_functions_are_refused():
    with pytest.raises(TypeError, match="expected model as an nn.Module.*PyroModule"):
        pd.Defense(lambda x, y=None: x, Guide())


def test_lazy_autoguides_without_an_example_are_refused():
    with (
        local(),
        pytest.raises(ValueError, match="AutoNormal makes its parameters on its first call.*example=x"),
    ):
        model = Model()
        pd.Defense(model, AutoNormal(poutine.block(model, hide=["y"])))


def test_autoguides_that_see_the_labels_are_refused_with_the_fix():
    with local(), pytest.raises(ValueError, match="hide the labels"):
        model = Model()
        pd.Defense(model, AutoNormal(model), example=batch()[0])


def test_param_statements_that_belong_to_no_module_are_refused():
    class Loose(PyroModule):
        def forward(self, x, y=None):
            loc = pyro.param("loose_loc", torch.zeros(3, 4))
            pyro.sample("linear.weight", dist.Normal(loc, 1.0).to_event(2))

    with local(), pytest.raises(ValueError, match="pyro.param statement 'loose_loc' belongs to no module"):
        pd.Defense(Model(), Loose(), example=batch()[0])


def test_loose_parameters_are_refused_before_training_without_an_example_too():
    class Loose(PyroModule):
        def forward(self, x, y=None):
            loc = pyro.param("loose_loc", torch.zeros(3, 4))
            pyro.sample("linear.weight", dist.Normal(loc, 1.0).to_event(2))

    with pytest.raises(ValueError, match="'loose_loc' belongs to no module"):
        pd.fit(pd.Defense(Model(), Loose()), [batch(N)], epochs=1, progress=False)


def test_the_users_store_is_left_alone():
    pyro.param("mine", torch.ones(1))
    defense = make_globally()
    pd.fit(defense, [batch(N)], epochs=1, progress=False)
    defense(batch()[0], 3)
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_builders_do_not_take_it():
    with pytest.raises(TypeError, match="a Defense of your own model and guide"):
        pd.defenses.rse(make())
