"""A step of an own program is Pyro's own number, whatever the program does."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import probdefense as pd
from probdefense.objectives import (
    adversarial,
    distilled,
    elbo,
    gaussian_augmented,
    mixed,
    multi_sample,
    trades,
)

N, B = 40, 8

pytestmark = pytest.mark.filterwarnings("ignore:Found (vars|auxiliary|non-auxiliary) in:UserWarning")


def batch(count=B):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


class Model(PyroModule):
    """A linear layer with a positive scale above it; `extra` is what a program may add."""

    def __init__(self, extra=None):
        super().__init__()
        self.extra = extra
        self.lin = PyroModule[nn.Linear](4, 3)
        self.lin.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
        self.tau = PyroSample(dist.Gamma(3.0, 3.0))

    def forward(self, x, y=None):
        logits = self.tau * self.lin(x)
        observe = partial(pyro.sample, "y", dist.Categorical(logits=logits), obs=y)
        plate = pyro.plate("data", size=N, subsample=x)
        if self.extra is not None:
            return self.extra(self, x, y, logits, plate, observe)
        with plate:
            observe()
        return logits


class Guide(PyroModule):
    """Written by hand, with a plain Normal and a LogNormal."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(3, 4))
        self.scale = PyroParam(torch.full((3, 4), 0.3), constraints.positive)
        self.rate = PyroParam(torch.tensor(0.2), constraints.positive)

    def forward(self, x, y=None):
        pyro.sample("tau", dist.LogNormal(0.1, self.rate))
        pyro.sample("lin.weight", dist.Normal(self.loc, self.scale).to_event(2))


def masked(model, x, y, logits, plate, observe):
    with plate, poutine.mask(mask=torch.arange(len(x)) % 2 == 0):
        observe()
    return logits


def weighted(model, x, y, logits, plate, observe):
    weight = torch.tensor([1.0, 0.5, 5.0])[y] if y is not None else torch.tensor(1.0)
    with plate, poutine.scale(scale=weight):
        observe()
    return logits


def tempered(model, x, y, logits, plate, observe):
    with poutine.scale(scale=0.3), plate:
        observe()
    return logits


def with_factor(model, x, y, logits, plate, observe):
    pyro.factor("ridge", -model.lin.bias.square().sum())
    with plate:
        observe()
    return logits


def factor_per_example(model, x, y, logits, plate, observe):
    with plate:
        observe()
        pyro.factor("smooth", -0.1 * logits.square().sum(-1))
    return logits


def factor_alone(model, x, y, logits, plate, observe):
    with plate:
        if y is None:
            pyro.factor("loss", torch.zeros(len(x)))
        else:
            pyro.factor("loss", -nn.functional.cross_entropy(logits, y, reduction="none"))
    return logits


def with_deterministic(model, x, y, logits, plate, observe):
    pyro.deterministic("logits", logits)
    with plate:
        pyro.deterministic("probs", logits.softmax(-1), event_dim=1)
        observe()
    return logits


def observed_twice(model, x, y, logits, plate, observe):
    with plate:
        observe()
        pyro.sample("size", dist.Normal(logits[:, 0], 1.0), obs=x[:, 0])
    pyro.sample("bias", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=model.lin.bias)
    return logits


def raters(model, x, y, logits, plate, observe):
    with pyro.plate("raters", 5, dim=-2), pyro.plate("images", size=N, subsample=x, dim=-1):
        pyro.sample("y", dist.Categorical(logits=logits), obs=y if y is None else y.expand(5, len(y)))
    return logits


def raters_inside(model, x, y, logits, plate, observe):
    with pyro.plate("images", size=N, subsample=x, dim=-2), pyro.plate("raters", 5, dim=-1):
        pyro.sample(
            "y", dist.Categorical(logits=logits[:, None]), obs=y if y is None else y[:, None].expand(-1, 5)
        )
    return logits


PROGRAMS = [
    None,
    masked,
    weighted,
    tempered,
    with_factor,
    factor_per_example,
    factor_alone,
    with_deterministic,
    observed_twice,
    raters,
    raters_inside,
]

AUTOGUIDES = [
    autoguide.AutoDelta,
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    partial(autoguide.AutoIAFNormal, hidden_dim=[16]),
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoStructured,
]


def hidden(model):
    return poutine.block(model, hide=["y", "size", "bias", "ridge", "smooth", "loss", "logits", "probs"])


def with_autoguide(kind, extra=None):
    model = Model(extra)
    return pd.Defense(model, kind(hidden(model)), example=batch(2)[0])


def in_parts():
    """An autoguide of two others."""
    model = Model()
    guide = autoguide.AutoGuideList(hidden(model))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["tau"])))
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["lin.weight"])))
    return pd.Defense(model, guide, example=batch(2)[0])


def by_pyro(defense, x, y, estimator=Trace_ELBO, seed=1):
    torch.manual_seed(seed)
    with poutine.block(), pyro.validation_enabled(False):
        return estimator().differentiable_loss(defense.model, defense.guide, x, y)


def by_us(defense, x, y, seed=1, **options):
    torch.manual_seed(seed)
    return N * elbo(defense, x, y, **options)


def assert_same_gradients(defense, ours, theirs):
    parameters = [p for p in defense.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", PROGRAMS)
@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_programs(extra, kind):
    defense, (x, y) = with_autoguide(kind, extra), batch()
    ours, theirs = by_us(defense, x, y), by_pyro(defense, x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert defense.num_data == N
    assert_same_gradients(defense, ours, theirs)


@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_autoguides_with_fresh_and_with_given_draws(kind):
    defense, (x, y) = with_autoguide(kind), batch()
    ours, theirs = by_us(defense, x, y), by_pyro(defense, x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.manual_seed(1)
    step = defense.step(x, y, defense.draw(x))
    given = -step.log_lik.mean() * N + sum(step.kl.values())
    torch.testing.assert_close(given, theirs, rtol=1e-5, atol=1e-4)
    assert_same_gradients(defense, given, theirs)
    assert set(" + ".join(step.kl).split(" + ")) == {"lin.weight", "tau"}


def test_a_list_of_autoguides_has_one_term_per_part():
    defense, (x, y) = in_parts(), batch()
    torch.testing.assert_close(by_us(defense, x, y), by_pyro(defense, x, y), rtol=1e-5, atol=1e-4)
    assert set(defense.step(x, y).kl) == {"tau", "lin.weight"}


@pytest.mark.parametrize("extra", PROGRAMS)
def test_closed_divergences_of_guides_by_hand(extra):
    defense, (x, y) = pd.Defense(Model(extra), Guide(), example=batch(2)[0]), batch()
    ours, theirs = by_us(defense, x, y), by_pyro(defense, x, y, TraceMeanField_ELBO)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert_same_gradients(defense, ours, theirs)


def test_what_belongs_to_the_data_set_is_a_term_of_its_own():
    x, y = batch()
    for extra, name in ((with_factor, "ridge"), (observed_twice, "bias")):
        defense = with_autoguide(autoguide.AutoNormal, extra)
        assert name in defense.step(x, y).kl
    assert set(with_autoguide(autoguide.AutoNormal, factor_per_example).step(x, y).kl) == {
        "tau",
        "lin.weight",
    }


def test_labels_of_masked_rows_do_not_matter():
    defense, (x, y) = with_autoguide(autoguide.AutoNormal, masked), batch()
    other = torch.where(torch.arange(B) % 2 == 0, y, (y + 1) % 3)
    assert torch.equal(by_us(defense, x, y), by_us(defense, x, other))
    assert not defense.step(x, y).log_lik[1::2].any()


def test_a_prior_that_depends_on_what_the_guide_draws_after_it_has_no_closed_mean():
    """The guide's tau follows w, so KL(q(w) || p(w | tau)) at that tau is not the mean."""

    class Backwards(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x, y=None):
            w = pyro.sample("w", dist.Normal(self.loc, 1.0).to_event(2))
            pyro.sample("tau", dist.LogNormal(w.square().mean().log(), 0.1))

    class Scaled(PyroModule):
        def forward(self, x, y=None):
            tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(3, 4), tau).to_event(2))
            with pyro.plate("data", size=N, subsample=x):
                pyro.sample("y", dist.Categorical(logits=x @ w.T), obs=y)
            return x @ w.T

    defense, (x, y) = pd.Defense(Scaled(), Backwards(), example=batch(2)[0]), batch()
    step = defense.step(x, y)
    w, tau = step.draws["w"], step.draws["tau"]
    by_hand = dist.Normal(defense.guide.loc, 1.0).log_prob(w) - dist.Normal(0.0, tau).log_prob(w)
    torch.testing.assert_close(step.kl["w"], by_hand.sum(), rtol=1e-5, atol=1e-4)


# Draws and weights


def small_attack():
    return partial(pd.attacks.pgd, eps=0.1, num_steps=2)


@pytest.mark.parametrize("kind", AUTOGUIDES)
@pytest.mark.parametrize(
    "objective",
    [multi_sample(2), trades(small_attack(), beta=1.0), adversarial(elbo, small_attack(), same_draw=True)],
)
def test_objectives_that_give_draws_are_finite(kind, objective):
    defense, (x, y) = with_autoguide(kind), batch()
    loss = objective(defense, x, y)
    loss.backward()
    assert 0 < float(loss.detach()) < 20


def test_draws_that_lack_a_site_are_refused():
    defense, (x, y) = with_autoguide(autoguide.AutoNormal), batch()
    draws = defense.draw(x)
    assert set(draws) == {"lin.weight", "lin.weight_unconstrained", "tau", "tau_unconstrained"}
    del draws["tau_unconstrained"]
    with pytest.raises(ValueError, match=r"draws lack sites tau_unconstrained; .*defense.draw\(x\)"):
        defense.step(x, y, draws)


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoDelta])
def test_a_weight_by_site_is_that_of_the_whole_term(kind):
    defense, (x, y) = with_autoguide(kind), batch()
    assert set(defense.step(x, y).kl) == {"lin.weight", "tau"}
    plain, both = by_us(defense, x, y), by_us(defense, x, y, kl_weight=0.0)
    by_name = by_us(defense, x, y, kl_weight={"lin.weight": 0.0, "tau": 0.0})
    assert torch.equal(by_name, both)
    torch.manual_seed(1)
    kl = defense.step(x, y).kl
    torch.testing.assert_close(plain - by_us(defense, x, y, kl_weight={"tau": 0.25}), 0.75 * kl["tau"])
    torch.testing.assert_close(
        by_us(defense, x, y, kl_weight={"*": 0.5}), by_us(defense, x, y, kl_weight=0.5), rtol=1e-5, atol=1e-4
    )


def test_weights_by_site_train_as_one_number_does():
    x, y = batch(N)
    found = []
    for weight in (0.01, {"lin.weight": 0.01, "tau": 0.01}):
        torch.manual_seed(2)
        defense = with_autoguide(autoguide.AutoNormal)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=0.2)
        objective = partial(elbo, kl_weight=weight)
        pd.fit(defense, [(x, y)], epochs=10, objective=objective, optimizer=optimizer, progress=False)
        found.append(defense.guide.scales.lin.weight.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", AUTOGUIDES[2:6])
def test_joint_guides_have_one_weight(kind):
    defense, (x, y) = with_autoguide(kind), batch()
    (name,) = defense.step(x, y).kl
    assert set(name.split(" + ")) == {"lin.weight", "tau"}
    with pytest.raises(ValueError, match=r"one joint density.*got kl_weight 1.0, 0.1|got kl_weight 0.1, 1.0"):
        elbo(defense, x, y, kl_weight={"lin.weight": 0.1})
    assert torch.equal(by_us(defense, x, y, kl_weight={"*": 0.1}), by_us(defense, x, y, kl_weight=0.1))


@pytest.mark.parametrize(
    "make",
    [lambda: with_autoguide(autoguide.AutoNormal), lambda: pd.defenses.bayesian(nn.Linear(4, 3), num_data=N)],
)
def test_unknown_names_in_weights_are_refused(make):
    defense, (x, y) = make(), batch()
    known = ", ".join(sorted(defense.step(x, y).kl))
    with pytest.raises(ValueError, match=f"kl_weight names 'wieght', which matches no.*known: {known}"):
        elbo(defense, x, y, kl_weight={"wieght": 0.1})
    assert torch.isfinite(elbo(defense, x, y, kl_weight={"*": 0.1}))


# Sites without a reparameterization


class Discrete(PyroModule):
    """Sites `kind` says: one switch for all, one per example, one per rater and example, or a count."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, y=None):
        data = pyro.plate("data", size=N, subsample=x)
        logits = 8 * x[:, :3]
        if self.kind == "switch":
            logits = pyro.sample("z", dist.Bernoulli(0.5)) * logits
        if self.kind == "choice":
            logits = torch.tensor([0.0, 0.3, 1.0])[pyro.sample("z", dist.Categorical(torch.ones(3)))] * logits
        if self.kind == "count":
            logits = pyro.sample("z", dist.Poisson(1.0)) * logits
        if self.kind == "vector":
            logits = pyro.sample("z", dist.Bernoulli(0.5).expand([3]).to_event(1)) * logits
        if self.kind == "plate":
            with pyro.plate("columns", 3):
                logits = pyro.sample("z", dist.Bernoulli(0.5)) * logits
        if self.kind == "chain":
            z = pyro.sample("z", dist.Bernoulli(0.5))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            logits = w * logits
        with data:
            if self.kind == "local":
                logits = pyro.sample("z", dist.Bernoulli(0.5).expand([len(x)])).unsqueeze(-1) * logits
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


class DiscreteGuide(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        shape = {"choice": (3,), "vector": (3,), "plate": (3,)}.get(kind, ())
        self.logit = nn.Parameter(torch.full(shape, -0.3))

    def forward(self, x, y=None):
        if self.kind == "choice":
            pyro.sample("z", dist.Categorical(logits=torch.arange(3.0) * self.logit))
        elif self.kind == "count":
            pyro.sample("z", dist.Poisson(self.logit.exp()))
        elif self.kind == "vector":
            pyro.sample("z", dist.Bernoulli(logits=self.logit).to_event(1))
        elif self.kind == "plate":
            with pyro.plate("columns", 3):
                pyro.sample("z", dist.Bernoulli(logits=self.logit))
        elif self.kind == "local":
            with pyro.plate("data", size=N, subsample=x):
                pyro.sample("z", dist.Bernoulli(logits=self.logit.expand(len(x))))
        else:
            z = pyro.sample("z", dist.Bernoulli(logits=self.logit))
            if self.kind == "chain":
                pyro.sample("w", dist.Normal(0.5 + z * self.logit, 0.5))


KINDS = ["switch", "choice", "count", "vector", "plate", "local", "chain"]


def discrete(kind):
    return pd.Defense(Discrete(kind), DiscreteGuide(kind), example=batch(2)[0])


def gradients(loss, defense, draws):
    """Mean and standard error of the gradient over seeds."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        found.append(torch.autograd.grad(loss(), [defense.guide.logit])[0])
    return torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(draws)


@pytest.mark.parametrize("kind", KINDS)
def test_discrete_sites_have_the_value_and_the_gradient_of_pyro(kind):
    defense, (x, y) = discrete(kind), batch()
    with torch.no_grad():
        torch.manual_seed(0)
        step = defense.step(x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(step.log_lik, defense.step(x, y).log_lik)  # the score changes no value

    def theirs():
        with pyro.validation_enabled(False):
            return TraceGraph_ELBO()._loss_and_surrogate_loss(defense.model, defense.guide, (x, y), {})[1]

    ours, our_error = gradients(lambda: N * elbo(defense, x, y), defense, 150)
    graph, graph_error = gradients(theirs, defense, 150)
    error = torch.hypot(our_error, graph_error)
    assert bool(((ours - graph).abs() <= 4.5 * error).all()), (ours, graph, error)
    assert kind == "chain" or bool((ours.abs() > 3 * our_error).any())  # not zero, which no score would give


def exact(kind, objective):
    """The gradient of an objective, averaged over the values of the one switch."""
    defense, (x, y) = discrete(kind), batch()
    logit = defense.guide.logit
    total = 0.0
    for value in (0.0, 1.0):
        fixed = pd.Defense(defense.model, _At(value, logit), example=x[:2])
        total = total + dist.Bernoulli(logits=logit).log_prob(torch.tensor(value)).exp() * objective(
            fixed, x, y
        )
    return defense, torch.autograd.grad(total, logit)[0]


class _At(nn.Module):
    """The switch at a value, with the density of the guide."""

    def __init__(self, value, logit):
        super().__init__()
        self.value, self.logit = value, logit.detach()

    def forward(self, x, y=None):
        pyro.sample("z", dist.Delta(torch.tensor(self.value)))


def students():
    teacher = pd.deterministic(nn.Linear(4, 3))
    attack = partial(pd.attacks.fgsm, eps=0.1)
    return {
        "elbo": elbo,
        "particles": partial(elbo, num_particles=2),
        "trades": trades(partial(pd.attacks.pgd, eps=0.1, num_steps=1, random_start=False), beta=4.0),
        "distilled": distilled(teacher, 2.0),
        "labels": distilled(None, 2.0),
        "adversarial": adversarial(elbo, attack, same_draw=True),
        "mixed": mixed(elbo, lambda f, x, y: 0.9 * x, weight=0.5),
        "augmented": gaussian_augmented(elbo, 1e-4),
    }


@pytest.mark.parametrize("name", list(students()))
def test_every_objective_reaches_a_discrete_site(name):
    """Without a KL term, which the exact value by enumeration does not have either."""
    torch.manual_seed(0)
    objective = partial(students()[name], kl_weight=0.0)
    defense, right = exact("switch", objective)
    x, y = batch()
    ours, error = gradients(lambda: objective(defense, x, y), defense, 150)
    assert abs(float(ours - right)) < 4.5 * float(error) + 1e-6, (ours, right, error)


def test_multi_sample_reaches_a_discrete_site():
    """Two draws of one switch: four cases, by hand."""
    defense, (x, y) = discrete("switch"), batch()
    q = dist.Bernoulli(logits=defense.guide.logit)
    log_lik = [(z * 8 * x[:, :3]).log_softmax(-1).gather(-1, y[:, None])[:, 0] for z in (0.0, 1.0)]
    cases = [(a, b) for a in (0, 1) for b in (0, 1)]
    pairs = [torch.stack([log_lik[a], log_lik[b]]).logsumexp(0).mean() - math.log(2) for a, b in cases]
    chances = [sum(q.log_prob(torch.tensor(float(z))) for z in case).exp() for case in cases]
    right = torch.autograd.grad(
        -sum(c * p for c, p in zip(chances, pairs, strict=True)), defense.guide.logit
    )[0]
    objective = partial(multi_sample(2), kl_weight=0.0)
    ours, error = gradients(lambda: objective(defense, x, y), defense, 200)
    assert abs(float(ours - right)) < 4.5 * float(error), (ours, right, error)


def test_a_trained_switch_finds_its_posterior():
    class Switch(DiscreteGuide):
        pass

    defense = pd.Defense(Discrete("switch"), Switch("switch"), example=batch(2)[0])
    x = torch.rand(N, 4)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(defense.param_groups(), lr=0.1)
    pd.fit(defense, [(x, y)], epochs=100, optimizer=optimizer, progress=False)
    gain = float(dist.Categorical(logits=8 * x[:, :3]).log_prob(y).sum()) + N * math.log(3)
    assert gain > 10  # so the exact posterior is 1 to five digits
    assert float(defense.guide.logit.detach().sigmoid()) > 0.95


def test_a_discrete_site_of_the_model_alone_trains_its_prior():
    class Alone(PyroModule):
        def __init__(self):
            super().__init__()
            self.logit = nn.Parameter(torch.tensor(-0.3))

        def forward(self, x, y=None):
            logits = pyro.sample("z", dist.Bernoulli(logits=self.logit)) * 8 * x[:, :3]
            with pyro.plate("data", size=N, subsample=x):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)
            return logits

    class Nothing(nn.Module):
        def forward(self, x, y=None):
            return None

    defense, (x, y) = pd.Defense(Alone(), Nothing(), example=batch(2)[0]), batch()
    log_lik = [dist.Categorical(logits=z * 8 * x[:, :3]).log_prob(y).mean() for z in (0.0, 1.0)]
    chance = defense.model.logit.sigmoid()
    right = torch.autograd.grad(-(1 - chance) * log_lik[0] - chance * log_lik[1], defense.model.logit)[0]
    found = torch.stack(
        [torch.autograd.grad(elbo(defense, x, y), defense.model.logit)[0] for _ in range(100)]
    )
    assert abs(float(found.mean() - right)) < 4.5 * float(found.std()) / 10
    assert not defense.step(x, y).kl


@pytest.mark.parametrize("kind", KINDS)
def test_the_static_base_refuses_discrete_sites(kind):
    defense = discrete(kind)
    with pytest.raises(ValueError, match="site 'z' is discrete .*average draws instead of defense.mean"):
        defense.mean()(batch()[0])


def test_freezing_refuses_a_discrete_site_that_looks_at_the_input():
    class Looking(nn.Module):
        def forward(self, x, y=None):
            with pyro.plate("data", size=N, subsample=x):
                pyro.sample("z", dist.Bernoulli(x.mean(-1)))

    defense = pd.Defense(Discrete("local"), Looking(), example=batch(2)[0])
    with pytest.raises(ValueError, match="site 'z' depends on x"):
        defense.freeze(2)
    assert torch.isfinite(discrete("local").freeze(2)(batch()[0])).all()
