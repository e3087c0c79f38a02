"""Families, floors and the signal-to-noise report of random weights; the rest of RSE."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.core.families import divergence
from probdefense.defenses import MultiplicativeLogNormal, bayesian, rse, signal_to_noise
from probdefense.objectives import adversarial, elbo
from tests.worlds import monte_carlo_tolerance, tiny_batch, tiny_net


def test_the_multiplicative_family_has_its_moments_and_keeps_signs():
    loc, scale, draws = torch.tensor([-2.0, 0.5, 0.0]), torch.tensor(0.3), 40_000
    q = MultiplicativeLogNormal(loc, scale)
    value = q.sample((draws,)).double()
    assert bool((value[:, 0] < 0).all()) and bool((value[:, 1] > 0).all()) and bool((value[:, 2] == 0).all())
    exact = loc.abs().double() * math.sqrt(math.expm1(0.3**2))
    torch.testing.assert_close(q.stddev.double(), exact)
    assert bool(((value.mean(0) - loc).abs() <= monte_carlo_tolerance(1.0, draws) * exact).all())
    # The variance of a sample variance needs the fourth moment: for a log-normal, by its own draws.
    spread = (value - loc).square()
    tolerance = monte_carlo_tolerance(1.0, draws) * spread.std(0)
    assert bool(((spread.mean(0) - exact**2).abs() <= tolerance).all())


def test_the_density_of_the_multiplicative_family_integrates_to_one():
    for loc in (-1.5, 0.7):
        q = MultiplicativeLogNormal(torch.tensor(loc), torch.tensor(0.4))
        grid = torch.linspace(-12, 12, 200_001)
        density = q.log_prob(grid).exp()
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-3)
        assert float(torch.trapezoid(density * grid, grid)) == pytest.approx(loc, abs=1e-3)


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace, MultiplicativeLogNormal])
def test_every_family_has_a_closed_kl_from_a_normal_prior(family):
    """The closed form against the mean of log q - log p over draws."""
    q = family(torch.tensor([-0.8, 0.3, 1.2]), torch.tensor([0.2, 0.3, 0.1]))
    p, draws = dist.Normal(0.1, 0.9), 40_000
    closed = divergence(q, p, q.sample(), "weights").double()
    value = q.sample((draws,))
    sampled = (q.log_prob(value) - p.log_prob(value)).sum(1).double()
    assert abs(float(closed - sampled.mean())) < monte_carlo_tolerance(float(sampled.std()), draws)


def by_layer(name, tensor):
    return {"1": dist.Laplace, "4": MultiplicativeLogNormal}.get(name.partition(".")[0], dist.Normal)


def test_families_by_name_make_one_site_each():
    x, y = tiny_batch()
    defense = bayesian(tiny_net(), num_data=50, family=by_layer, init_scale=0.05)
    families = {site.name: type(site.distribution("posterior")) for site in defense.sites.values()}
    assert (
        set(families.values()) == {dist.Laplace, MultiplicativeLogNormal, dist.Normal} and len(families) == 3
    )
    draws = torch.stack(
        [defense.draw(x)[next(n for n, f in families.items() if f is dist.Laplace)] for _ in range(300)]
    )
    noise = ((draws - draws.mean(0)) / 0.05).double().detach()
    kurtosis = float(noise.pow(4).mean() / noise.pow(2).mean() ** 2)
    assert kurtosis > 4.5, "a Laplace has 6, a Normal 3"
    step = defense.step(x, y)
    assert set(step.kl) == set(families) and all(torch.isfinite(kl) for kl in step.kl.values())


def test_the_floor_is_a_floor_and_the_start_is_the_start():
    defense = bayesian(tiny_net(), num_data=50, init_scale=0.05, floor=0.02)
    posterior = defense.guide.posteriors["weights"]
    torch.testing.assert_close(posterior.scale, torch.full_like(posterior.scale, 0.05))
    with torch.no_grad():
        posterior.log_scale.fill_(-40.0)
    assert float(posterior().stddev.min().detach()) == pytest.approx(0.02)


def test_signal_to_noise_by_hand():
    """Weights (3, 4) with scales (0.3, 0.4): 5 / 0.5. A Laplace scale counts sqrt 2 times."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
        net[1].weight.fill_(2.0)
    defense = bayesian(
        net, init_scale=0.1, family=lambda name, _: dist.Laplace if name[0] == "1" else dist.Normal
    )
    with torch.no_grad():
        defense.guide.posteriors["weights"].log_scale.copy_(torch.tensor([0.3, 0.4]).log())
    found = signal_to_noise(defense)
    assert list(found) == ["0", "1"]
    assert found == pytest.approx({"0": 10.0, "1": 2 / (0.1 * math.sqrt(2))})


def trained(num_steps, **options):
    """Signal to noise and smallest scale of a linear classifier of the middle pixels of digits."""
    torch.manual_seed(0)
    x, y = (t[:256] for t in pd.data.digits().train.tensors)
    x = x[:, :, 2:6, 2:6]
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    defense = bayesian(net, num_data=256, init_scale=0.2, **options)
    optimizer = torch.optim.Adam(defense.param_groups(), lr=0.05)
    for _ in range(num_steps):
        optimizer.zero_grad()
        elbo(defense, x, y).backward()
        optimizer.step()
    scale = defense.guide.posteriors["weights"].scale
    return signal_to_noise(defense)["1"], float(scale.mean().detach()), float(scale.min().detach())


def test_randomness_fades_under_the_likelihood_and_a_prior_or_a_floor_holds_it():
    """Khan et al.'s objective as we read it has no prior, and nothing that keeps the noise in."""
    early, late = trained(100, prior=None), trained(200, prior=None)
    assert late[0] > 1.3 * early[0] and late[1] < early[1] < 0.2
    with_prior = trained(200)
    assert with_prior[0] < late[0] / 5 and with_prior[1] > 0.3
    assert trained(200, prior=None, floor=0.1)[2] >= 0.1 > late[2]


def test_adv_bnn_is_bayesian_and_adversarial_with_its_three_inner_attacks():
    x, y = tiny_batch()
    seen = []

    def spy(logits_fn, x, y):
        seen.append((logits_fn.stochastic, len(logits_fn(x))))
        return pd.attacks.pgd(logits_fn, x, y, eps=0.1, num_steps=2)

    for options in ({"same_draw": True}, {}, {"num_samples": 5}):
        defense = bayesian(tiny_net(), num_data=50)
        adversarial(elbo, spy, **options)(defense, x, y).backward()
        assert all(p.grad is not None for p in defense.parameters())
    assert seen == [(False, 1), (True, 1), (True, 5)]


def test_variational_noise_keeps_its_floor():
    defense = rse(tiny_net(), scale="variational", sigma_init=0.2, sigma_inner=0.1, floor=0.05)
    assert float(defense.input_noise[1]) == pytest.approx(0.2)
    with torch.no_grad():
        for posterior in defense.guide.posteriors.values():
            posterior.log_scale.fill_(-40.0)
    assert float(defense.input_noise[1]) == pytest.approx(0.05)
    inner = defense.guide.posteriors["4/noise"]().stddev * defense.net.get_submodule("4.noise").scale
    assert float(inner.detach()) == pytest.approx(0.05)


def test_noise_may_be_discrete():
    """Multiplicative Bernoulli noise: x or 1.5 x."""
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    defense = rse(
        net,
        family=dist.Bernoulli(0.25),
        multiplicative=True,
        sigma_init=0.5,
        where=lambda path, _: path == "0",
    )
    draws = 20_000
    values = defense(torch.full((1, 2), 0.4), draws)
    assert sorted(set(values.flatten().tolist())) == pytest.approx([0.4, 0.6])
    share = float((values > 0.5).double().mean())
    assert abs(share - 0.25) < monte_carlo_tolerance(math.sqrt(0.25 * 0.75), 2 * draws)


def test_noise_is_on_in_the_modes_that_were_asked_for():
    """The published RSE master switched it off in eval, and an attack was scored on that."""
    x, _ = tiny_batch()
    for when, modes in {"always": (True, False), "train": (True,), "test": (False,)}.items():
        defense = rse(tiny_net(), when=when)
        on = [mode for mode in (True, False) if not torch.equal(defense.train(mode)(x), defense(x))]
        assert tuple(on) == modes


def test_noise_at_test_alone_ruins_a_network_and_noise_in_training_saves_it():
    """The ablation of RSE's Fig. 2 on digits: accuracy of single draws."""
    train, test = pd.data.digits()
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    accuracy = {}
    for when in ("always", "train", "test"):
        torch.manual_seed(0)
        layers = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.ReLU())]
        net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))
        defense = rse(net, before_linear=True, sigma_init=0.3, sigma_inner=1.0, when=when)
        optimizer = torch.optim.Adam(defense.parameters(), lr=5e-3)
        pd.fit(defense, loader, epochs=6, optimizer=optimizer, progress=False)
        x, y = test.tensors
        accuracy[when] = float((defense.eval()(x, 10).argmax(-1) == y).float().mean())
    assert accuracy["train"] > accuracy["always"] > accuracy["test"] + 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bayesian(tiny_net(), floor=-0.1), "expected floor >= 0"),
        (
            lambda: bayesian(tiny_net(), init_scale=0.01, floor=0.02),
            "expected init_scale above the floor 0.02",
        ),
        (
            lambda: bayesian(tiny_net(), family=MultiplicativeLogNormal, where=lambda *_: True),
            "2.bias holds zeros, where multiplicative noise has an infinite KL",
        ),
        (lambda: signal_to_noise(rse(tiny_net())), "found no random weights"),
        (lambda: rse(tiny_net(), floor=-1.0), "expected floor >= 0"),
        (
            lambda: rse(tiny_net(), scale="variational", floor=0.15),
            "expected scales above floor=0.15, got 0.1",
        ),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_multiplicative_noise_without_a_prior_may_start_at_zero():
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.bias)
    defense = bayesian(net, family=MultiplicativeLogNormal, prior=None, init_scale=0.2)
    x, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    elbo(defense, x, y).backward()
    posterior = defense.guide.posteriors["weights"]
    assert torch.isfinite(posterior.loc.grad).all() and float(posterior.loc.grad[-2:].abs().min()) > 0
