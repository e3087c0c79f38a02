"""Antithetic draws: pairs that differ in sign about the location, unbiased, with less variance."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import probdefense as pd
from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.selection import remaining_margin
from probdefense.core.families import MultiplicativeLogNormal, mirrored
from probdefense.defenses import bayesian, ensemble, mc_dropout, rse
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import mean_prob
from tests.worlds import LinearWorld, monte_carlo_tolerance, tiny_batch, tiny_net

ROWS = 3000


def slopes(world: LinearWorld, draws: str) -> Tensor:
    """The gradient of the mean cross-entropy of two draws, along w, of many equal images."""
    x = world.points(1)[0].expand(ROWS, -1).clone().requires_grad_()
    logits = world.noisy().samples(2, draws=draws)(x)
    loss = expected_cross_entropy(logits, torch.ones(ROWS, dtype=torch.int64))
    return torch.autograd.grad(loss.sum(), x)[0] @ world.w / world.w.dot(world.w)


def true_slope(world: LinearWorld) -> float:
    """Of E log(1 + exp(-m)) with m normal, by a fine sum."""
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2)
    margin = float(world.score(world.points(1)[0])) + world.sigma * float(world.w.norm()) * z
    return float(-(density * torch.sigmoid(-margin)).sum() / density.sum())


@pytest.mark.parametrize("draws", ["independent", "antithetic"])
def test_the_mean_over_draws_is_unbiased(draws):
    world = LinearWorld(sigma=0.5)
    found = slopes(world, draws)
    tolerance = monte_carlo_tolerance(float(found.std()), ROWS)
    assert abs(float(found.mean()) - true_slope(world)) < tolerance
    assert tolerance < 0.05 * abs(true_slope(world))


def test_pairs_take_variance_away():
    world = LinearWorld(sigma=0.5)
    assert slopes(world, "antithetic").var() < 0.3 * slopes(world, "independent").var()


def test_single_draws_of_a_pair_are_distributed_as_ever():
    world = LinearWorld(sigma=0.5)
    x, _ = world.points(1)
    votes = world.noisy().samples(2, draws="antithetic")(x.expand(ROWS, -1)).argmax(-1).double()
    share = float(world.share_of_one(x))
    for half in votes:
        assert abs(float(half.mean()) - share) < monte_carlo_tolerance((share * (1 - share)) ** 0.5, ROWS)


@pytest.mark.parametrize("build", [rse, bayesian, lambda net: rse(bayesian(net))])
@pytest.mark.parametrize("tracked", [True, False])
def test_all_sites_flip_jointly_about_the_location(build, tracked, monkeypatch):
    seen: list[dict[str, Tensor]] = []
    defense, (x, _) = build(tiny_net()).eval(), tiny_batch(3)
    kept = defense._engine.__class__._run

    def noted(self, x, weights, noise, state=None):
        for k in range(len(next(iter({**weights, **noise}.values())))):
            seen.append({name: value[k] for name, value in {**weights, **noise}.items()})
        return kept(self, x, weights, noise, state)

    monkeypatch.setattr(defense._engine.__class__, "_run", noted)
    defense(x, 5)  # measures the layers
    seen.clear()
    with torch.set_grad_enabled(tracked):
        defense.samples(5, draws="antithetic")(x)
    center = {site.name: site.center() for site in defense.sites.values() if not site.local}
    for first, second in ((0, 1), (2, 3)):
        for name, value in seen[first].items():
            middle = (value + seen[second][name]) / 2
            torch.testing.assert_close(middle, torch.zeros_like(middle) + center.get(name, 0.0))
    name = next(iter(seen[0]))
    assert len(seen) == 5 and not torch.allclose(seen[0][name], seen[2][name])
    assert not torch.allclose(seen[2][name], seen[4][name])


def test_members_and_masks_are_shared_by_a_pair():
    (x, _), nets = tiny_batch(3), [tiny_net(), tiny_net()]
    logits = ensemble(nets).eval().samples(4, draws="antithetic")(x)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], logits[3])
    assert not torch.equal(logits[0], logits[2])  # in rounds through both
    masked = mc_dropout(nets[0], rate=0.5).eval()
    logits = masked.samples(2, draws="antithetic")(x)
    assert torch.equal(logits[0], logits[1])


def test_reflections_by_family():
    value = torch.tensor([0.25, 2.0])
    assert mirrored(dist.Laplace(1.0, 3.0), value).tolist() == [1.75, 0.0]
    assert mirrored(dist.Uniform(0.0, 4.0), value).tolist() == [3.75, 2.0]
    assert mirrored(dist.Exponential(1.0), value).tolist() == value.tolist()
    loc, scale, eps = torch.tensor([-2.0]), torch.tensor([0.3]), torch.tensor([0.7])
    up, down = (loc * torch.exp(scale * (sign * eps - scale / 2)) for sign in (1, -1))
    torch.testing.assert_close(mirrored(MultiplicativeLogNormal(loc, scale), up), down)


@pytest.mark.parametrize("kept", [1, 3_000_000])
def test_the_same_numbers_for_any_passes(kept, monkeypatch):
    monkeypatch.setattr("probdefense.core.costs.LAYER_BYTES", kept)
    defense, (x, _) = rse(bayesian(tiny_net())).eval(), tiny_batch(5)
    found = [defense.drawn(x, 5, seed=3, max_batch=size, draws="antithetic") for size in (None, 2, 5)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_gradients_of_parameters_pass_through_pairs():
    defense, (x, y) = bayesian(tiny_net(), num_data=6), tiny_batch(6)
    loss = expected_cross_entropy(defense.samples(2, draws="antithetic")(x), y).mean()
    loss.backward()
    (site,) = defense.sites.values()
    assert site.posterior.loc.grad.any() and site.posterior.log_scale.grad.any()


def test_an_attack_decides_on_independent_draws():
    calls: list[dict[str, str]] = []

    class Spied(pd.Defense):
        def forward(self, x, num_samples=None, **options):
            calls.append(options)
            return super().forward(x, num_samples, **options)

    inner = rse(tiny_net()).eval()
    spied, (x, y) = Spied(inner.model, inner.guide).eval(), tiny_batch(3)

    @attack
    def climbs_and_decides(logits_fn, x, y, *, seed=None, max_batch=None):
        logits_fn(x)
        remaining_margin(logits_fn, x, y, mean_prob)
        return x

    pd.with_draws(climbs_and_decides, 4, draws="antithetic")(spied, x, y)
    assert [options.get("draws", "independent") for options in calls] == ["antithetic", "independent"]


def test_through_an_evaluation_the_pairs_arrive_and_verdicts_do_not_move():
    defense, data = rse(tiny_net()).eval(), tiny_batch(6)
    reports = [
        pd.evaluate(
            defense,
            data,
            {"pgd": pd.with_draws(lambda f, x, y, *, eps: _noted(f, x, y, eps), 4, draws=draws)},
            eps=0.1,
            num_samples=5,
        )
        for draws in ("independent", "antithetic")
    ]
    assert reports[0].rows[0]["accuracy"] == reports[1].rows[0]["accuracy"]
    assert SPREADS[0] > 1e-3 and SPREADS[1] < SPREADS[0]


SPREADS: list[float] = []


def _noted(logits_fn, x, y, eps):
    with torch.no_grad():
        pairs = logits_fn(x).unflatten(0, (2, 2)).mean(1)
    SPREADS.append(float(pairs.std(0).mean()))
    return pd.attacks.pgd(logits_fn, x, y, eps=eps, num_steps=2)


def test_own_programs_are_refused(own_pair):
    with pytest.raises(ValueError, match="'independent'.*'antithetic'"):
        own_pair.samples(4, draws="antithetic")
    with pytest.raises(ValueError, match="unknown draws"):
        rse(tiny_net()).samples(4, draws="mirrored")


@pytest.fixture
def own_pair() -> pd.Defense:
    """A pair of Pyro programs."""
    import pyro
    from pyro.nn import PyroModule, PyroParam

    class Own(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loc = nn.Linear(4, 3), PyroParam(torch.zeros(()))

        def forward(self, x, y=None):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            logits = self.net(x) + shift
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)
            return logits

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.zeros(()))

        def forward(self, x, y=None):
            pyro.sample("shift", dist.Normal(self.loc, 1.0))

    return pd.Defense(Own(), Guide())
