"""The contract of every builder: what a `Defense` promises whatever is random in it."""

import copy

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import probdefense as pd
from probdefense.objectives import elbo
from tests.contract import BUILDERS, DETERMINISTIC, DISCRETE, ENSEMBLES, OTHER_BASE, N, defended
from tests.worlds import FAILURE_RATE, LinearWorld, monte_carlo_tolerance, tiny_batch, tiny_net

every_builder = pytest.mark.parametrize("name", BUILDERS)
random_builders = pytest.mark.parametrize("name", [n for n in BUILDERS if n not in DETERMINISTIC])
single_nets = pytest.mark.parametrize("name", [n for n in BUILDERS if n not in ENSEMBLES])


def elbo_of(name):
    return Trace_ELBO if name in DISCRETE else TraceMeanField_ELBO


def first_net(name):
    return "members.0." if name in ENSEMBLES else ""


def buffers_of(defense: pd.Defense) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in defense.named_buffers()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_builder
def test_logits_have_a_sample_axis_and_are_not_probabilities(name):
    defense, (x, _) = defended(name), tiny_batch()
    logits = defense(x, num_samples=5).detach()
    assert logits.shape == (5 if defense.stochastic else 1, 6, 3)
    assert bool(torch.isfinite(logits).all())
    for sums in (logits.sum(-1), logits.exp().sum(-1)):
        assert float((sums - 1).abs().max()) > 0.01, "these look like probabilities"
    assert defense(x[:1]).shape == (1, 1, 3)


@random_builders
def test_two_calls_differ(name):
    defense, (x, _) = defended(name), tiny_batch()
    assert not torch.allclose(defense(x), defense(x))
    draws = defense(x, num_samples=4).detach()
    assert float(draws.std(0).min()) > 0


@every_builder
def test_frozen_functions_agree_on_any_subset(name):
    defense, (x, _) = defended(name), tiny_batch(40)
    frozen = defense.freeze(7)
    assert not frozen.stochastic
    whole = frozen(x)
    assert torch.equal(whole, frozen(x)) and len(whole) == (7 if defense.stochastic else 1)
    for rows in (slice(0, 1), slice(3, 10), slice(39, 40)):
        torch.testing.assert_close(frozen(x[rows]), whole[:, rows], rtol=1e-5, atol=1e-5)
    assert not whole.requires_grad or defense.net is not None


@every_builder
def test_frozen_functions_stay_when_the_defense_is_trained(name):
    defense, (x, y) = defended(name), tiny_batch()
    frozen = defense.freeze(3)
    before = frozen(x)
    optimizer = torch.optim.SGD(defense.parameters(), lr=0.5)
    elbo(defense, x, y).backward()
    optimizer.step()
    assert torch.equal(frozen(x), before)


@random_builders
def test_freezing_takes_its_seed_from_the_generator(name):
    defense, (x, _) = defended(name), tiny_batch()
    first, second, other = (defense.freeze(3, torch.Generator().manual_seed(seed))(x) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.allclose(first, other)


@every_builder
def test_input_gradient_reaches_the_pixels(name):
    defense, (x, _) = defended(name), tiny_batch()
    for function in (defense, defense.freeze(2), defense.mean()):
        point = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(point).square().sum(), point)
        assert float(gradient.abs().flatten(1).amax(1).min()) > 0


@every_builder
def test_every_parameter_gets_a_gradient_from_one_step(name):
    defense, (x, y) = defended(name), tiny_batch()
    elbo(defense, x, y).backward()
    missing = [n for n, p in defense.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@single_nets
def test_step_is_the_true_elbo(name, float64):
    defense, (x, y) = defended(name), tiny_batch()
    defense, x = defense.double().eval(), x.double()
    torch.manual_seed(1)
    ours = N * elbo(defense, x, y)
    torch.manual_seed(1)
    theirs = elbo_of(name)().differentiable_loss(defense.model, defense.guide, x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["rse variational", "bayesian", "bayesian on rse"])
def test_step_equals_the_sampled_elbo_in_expectation(name, float64):
    defense, (x, y) = defended(name), tiny_batch()
    defense, x = defense.double().eval(), x.double()
    draws = 400
    with torch.no_grad():
        ours = torch.stack([N * elbo(defense, x, y) for _ in range(draws)])
        theirs = torch.tensor([Trace_ELBO().loss(defense.model, defense.guide, x, y) for _ in range(draws)])
    spread = float(torch.hypot(ours.std(), theirs.std()))
    assert abs(float(ours.mean() - theirs.mean())) < monte_carlo_tolerance(spread, draws)
    assert spread < 0.2 * float(ours.mean()), "the test has no power"


def test_the_kl_covers_every_element_of_every_layer():
    defense = pd.defenses.bayesian(tiny_net(), num_data=N, where=lambda *_: True, init_scale=0.05)
    with torch.no_grad():
        defense.guide.posteriors["weights"].log_scale.add_(
            0.3 * torch.randn_like(defense.guide.posteriors["weights"].loc)
        )
    x, y = tiny_batch()
    total = torch.zeros(())
    reference = tiny_net()
    flat = defense.guide.posteriors["weights"]
    size = sum(p.numel() for p in reference.parameters())
    for loc, scale in zip(flat.loc, flat.log_scale.exp(), strict=True):
        total = total - scale.log() + (scale**2 + loc**2) / 2 - 0.5
    assert flat.loc.numel() == size
    torch.testing.assert_close(defense.step(x, y).kl["weights"], total)


def test_both_layouts_are_one_elbo(float64):
    x, y = tiny_batch()
    x = x.double()
    flat, per_tensor = (
        pd.defenses.bayesian(tiny_net_seeded(), num_data=N, layout=layout)
        for layout in ("flat", "per_tensor")
    )
    assert list(flat.sites) == ["weights"] and len(per_tensor.sites) == 5
    draws = flat.draw(x)
    views = flat.sites["weights"].views(draws["weights"])
    whole = flat.eval().step(x, y, draws)
    parts = per_tensor.eval().step(x, y, {name: view.flatten() for name, view in views.items()})
    torch.testing.assert_close(sum(whole.kl.values()), sum(parts.kl.values()))
    torch.testing.assert_close(whole.log_lik, parts.log_lik)


def tiny_net_seeded() -> nn.Module:
    torch.manual_seed(5)
    return tiny_net()


@single_nets
def test_plain_svi_moves_every_parameter_and_no_global_store(name):
    defense, twin, (x, y) = defended(name), defended(name), tiny_batch()
    before = {n: p.detach().clone() for n, p in defense.named_parameters()}
    svi = SVI(defense.model, defense.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(x, y)
    assert not [n for n, p in defense.named_parameters() if torch.equal(before[n], p)]
    assert len(pyro.get_param_store()) == 0
    assert all(torch.equal(before[n], p) for n, p in twin.named_parameters()), "two defenses share parameters"


@single_nets
def test_elbo_modules_with_torch_optimizers(name):
    defense, (x, y) = defended(name), tiny_batch()
    loss = elbo_of(name)()(defense.model, defense.guide)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in defense.parameters()}
    loss(x, y).backward()
    assert all(p.grad is not None for p in defense.parameters())


@every_builder
def test_predictive_runs_and_moves_no_statistics(name):
    defense, (x, _) = defended(name).train(), tiny_batch()
    before = buffers_of(defense)
    answer = Predictive(defense.model, guide=defense.guide, num_samples=3, return_sites=("_RETURN", "y"))(x)
    assert answer["_RETURN"].shape == (3, 6, 3) and answer["y"].shape == (3, 6)
    assert same(before, buffers_of(defense))


@every_builder
def test_nothing_but_a_labeled_training_forward_moves_statistics(name):
    defense, (x, y) = defended(name).train(), tiny_batch()
    modes = {module: module.training for module in defense.modules()}
    before = buffers_of(defense)
    defense(x, 3)
    defense.freeze(2)(x)
    defense.mean()(x)
    pd.predict(defense, x, 4)
    pd.attacks.pgd(defense, x, y, eps=0.1, num_steps=2)
    pd.evaluate(defense, (x, y), {"fgsm": pd.attacks.fgsm}, num_samples=3)
    defense.model(x)
    defense.eval().step(x, y)
    assert same(before, buffers_of(defense))
    defense.train()
    assert modes == {module: module.training for module in defense.modules()}
    defense.step(x, y)
    assert int(defense.net.get_submodule(f"{first_net(name)}2").num_batches_tracked) == 1


@every_builder
def test_state_dict_loads_into_a_fresh_object(name):
    defense, fresh, (x, _) = defended(name), BUILDERS[name](tiny_net()), tiny_batch()
    fresh.load_state_dict(defense.state_dict())
    a, b = (d.freeze(3, torch.Generator().manual_seed(0))(x) for d in (defense, fresh))
    assert torch.equal(a, b)


@every_builder
def test_copies_are_independent(name):
    defense, (x, y) = defended(name), tiny_batch()
    twin = copy.deepcopy(defense.eval())
    elbo(twin, x, y).backward()
    assert all(p.grad is None for p in defense.parameters())
    a, b = (d.freeze(3, torch.Generator().manual_seed(0))(x) for d in (defense, twin))
    assert torch.equal(a, b)


@every_builder
def test_builders_copy_and_keep_names_and_weights(name):
    net = tiny_net()
    before = {f"{first_net(name)}{n}": p.detach().clone() for n, p in net.named_parameters()}
    defense = BUILDERS[name](net)
    assert all(torch.equal(before[f"{first_net(name)}{n}"], p) for n, p in net.named_parameters())
    kept = dict(defense.net.named_parameters())
    moved = {
        alias: view
        for site in defense.sites.values()
        if site.posterior is not None and not site.local
        for alias, view in site.fill(site.center(), defense.net).items()
    }
    assert set(before) <= set(kept) | set(moved)
    for n, value in before.items():
        torch.testing.assert_close({**kept, **moved}[n].detach(), value)
    x, _ = tiny_batch()
    if name not in OTHER_BASE:
        torch.testing.assert_close(defense.eval().mean()(x)[0], net.eval()(x))


@every_builder
def test_backends_draw_from_one_distribution(name):
    defense, (x, _) = defended(name), tiny_batch()
    if not defense.stochastic:
        return
    draws = 300
    with torch.no_grad():
        means = [defense(x[:2], draws, backend=b) for b in ("loop", "vmap", "fold")]
    for logits in means:
        tolerance = monte_carlo_tolerance(float(torch.hypot(means[0].std(0), logits.std(0)).max()), draws)
        assert float((logits.mean(0) - means[0].mean(0)).abs().max()) < 1.5 * tolerance


@every_builder
def test_keyed_draws_belong_to_the_example(name):
    defense, (x, _) = defended(name), tiny_batch(8)
    ids = torch.arange(8)
    whole = defense.keyed(3, ids, 5)(x)
    part = defense.keyed(3, ids[5:], 5)(x[5:])
    torch.testing.assert_close(whole[:, 5:], part, rtol=1e-5, atol=1e-5)
    assert not defense.stochastic or not torch.allclose(whole, defense.keyed(4, ids, 5)(x))


def test_keyed_noise_differs_between_examples_and_frozen_noise_does_not():
    defense, x = defended("rse"), tiny_batch(1)[0].expand(4, -1, -1, -1)
    keyed = defense.keyed(0, torch.arange(4), 3)(x)
    assert float((keyed[:, 1:] - keyed[:, :1]).abs().max()) > 1e-3
    frozen = defense.freeze(3)(x)
    torch.testing.assert_close(frozen, frozen[:, :1].expand_as(frozen), rtol=1e-5, atol=1e-5)


def test_the_predictive_of_the_linear_world_is_exact():
    world = LinearWorld()
    x, _ = world.points(5)
    draws = 40_000
    with torch.no_grad():
        share = (world.noisy()(x, draws).argmax(-1) == 1).double().mean(0)
    exact = world.share_of_one(x).double()
    tolerance = monte_carlo_tolerance(0.5, draws)
    assert float((share - exact).abs().max()) < tolerance
    wrong = LinearWorld(sigma=1.2 * world.sigma).share_of_one(x).double()
    assert float((share - wrong).abs().max()) > tolerance, "the test has no power"


def test_gaussian_weights_give_the_known_mean_and_variance():
    net = nn.Linear(4, 3)
    defense = pd.defenses.bayesian(net, init_scale=0.3)
    x = torch.rand(2, 4)
    draws = 40_000
    with torch.no_grad():
        logits = defense(x, draws).double()
    variance = 0.3**2 * (x.double().square().sum(1) + 1)
    torch.testing.assert_close(
        logits.mean(0),
        net(x).double(),
        rtol=0,
        atol=monte_carlo_tolerance(float(variance.max().sqrt()), draws),
    )
    relative = logits.var(0) / variance.unsqueeze(1) - 1
    assert float(relative.abs().max()) < monte_carlo_tolerance(2**0.5, draws)


def test_as_module_gives_log_probabilities_for_other_libraries():
    defense, (x, _) = defended("rse"), tiny_batch()
    module = defense.as_module(num_samples=8)
    torch.testing.assert_close(module(x).exp().sum(-1), torch.ones(6))
    frozen = defense.as_module(num_samples=8, frozen=True)
    assert torch.equal(frozen(x), frozen(x)) and not torch.equal(module(x), module(x))
    assert list(module.parameters())


def test_parameter_groups_spare_the_guide_and_the_noise():
    defense = pd.defenses.bayesian(
        pd.defenses.rse(tiny_net(), scale="learned"), num_data=N, where=lambda name, _: name.startswith("7")
    )
    decayed, spared = defense.param_groups(weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    names = {id(p): n for n, p in defense.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {
        n for n in names.values() if "log_scale" in n or "guide" in n
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x, y: d(x, 0), "expected num_samples >= 1, got 0"),
        (lambda d, x, y: d(x, 2, max_batch=0), "expected max_batch >= 1"),
        (lambda d, x, y: d(x, 2, backend="jit"), "unknown backend 'jit'; known: auto, fold, loop, vmap"),
        (lambda d, x, y: d.freeze(0), "expected num_samples >= 1"),
        (lambda d, x, y: d(x[:, :, :3]), "expected inputs that fit the network, got"),
        (lambda d, x, y: d(x.double()), "expected inputs that fit the network, got"),
        (lambda d, x, y: d.step(x, y + 3), "expected y < 3"),
        (lambda d, x, y: d.step(x, y.float()), "expected y as int64"),
        (lambda d, x, y: d.step(x.repeat(20, 1, 1, 1), y.repeat(20)), "at most num_data=50"),
        (lambda d, x, y: d.model(x.repeat(20, 1, 1, 1), y.repeat(20)), "at most num_data=50"),
        (lambda d, x, y: pd.deterministic(d), "expected a plain nn.Module, got Defense"),
        (lambda d, x, y: pd.Defense.from_sites(tiny_net(), [], num_data=0), "expected num_data >= 1"),
    ],
)
def test_bad_use_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(defended("rse"), *tiny_batch())


def test_users_own_noise_layers_become_sites():
    net = nn.Sequential(pd.nn.Noise(0.3), nn.Flatten(), nn.Linear(36, 3))
    defense, (x, _) = pd.deterministic(net), tiny_batch()
    assert defense.stochastic and not torch.equal(defense(x), defense(x))
    assert defense.input_noise[0] == "normal" and float(defense.input_noise[1]) == pytest.approx(0.3)


def test_the_failure_rate_is_the_common_one():
    assert FAILURE_RATE == 2e-5
