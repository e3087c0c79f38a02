"""JumpReLU and BReLU: the activations by hand, and where they land in a network."""

import copy
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probdefense as pd
from probdefense.attacks.bpda import bpda
from probdefense.defenses import brelu, jump_relu, quantiles, surrogates, tune_kappa
from probdefense.nn import BReLU, JumpReLU, MarginalJumpReLU, smoothed_jump
from tests.worlds import import_torchvision, monte_carlo_tolerance, tiny_batch, tiny_net


class Functional(nn.Module):
    """ReLUs of every kind: one module that runs twice, and three spellings of the function."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x):
        a, b, c, d, e = self.layers
        z = self.act(b(self.act(a(x))))
        z = torch.relu(d(F.relu(c(z))))
        return e(z).relu()


def positive(shape=(64, 6), seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def jumps(defense):
    return {name: m for name, m in defense.net.named_modules() if isinstance(m, JumpReLU)}


def test_the_jump_by_hand():
    z = torch.tensor([-2.0, -0.1, 0.0, 0.2, 0.5, 0.50001, 3.0])
    torch.testing.assert_close(JumpReLU(0.5)(z), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.50001, 3.0]))
    torch.testing.assert_close(JumpReLU(0.0)(z), z.relu())
    assert bool(JumpReLU(0.5)(torch.tensor([torch.nan])).isnan()), "a NaN must not become a zero"


def test_units_below_the_threshold_pass_no_gradient_and_the_surrogate_restores_it():
    z = torch.tensor([0.1, 0.4, 0.6], requires_grad=True)
    (hard,) = torch.autograd.grad(JumpReLU(0.5)(z).sum(), z)
    assert hard.tolist() == [0.0, 0.0, 1.0]
    (soft,) = torch.autograd.grad(smoothed_jump(0.5, width=0.2)(z).sum(), z)
    u = (z.detach() - 0.5) / 0.1
    s = u.sigmoid()
    torch.testing.assert_close(soft, s + z.detach() / 0.1 * s * (1 - s))
    (zero,) = torch.autograd.grad(smoothed_jump(0.0)(z).sum(), z)
    assert zero.tolist() == [1.0, 1.0, 1.0]


def test_the_bounded_relu_by_hand():
    z = torch.tensor([-1.0, 0.0, 0.3, 1.0, 1.5])
    assert BReLU(1.0)(z).tolist() == pytest.approx([0.0, 0.0, 0.3, 1.0, 1.0])
    assert BReLU(0.25)(z).tolist() == [0.0, 0.0, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    "make", [tiny_net, lambda: resnet(), lambda: Functional()], ids=["cnn", "resnet", "functional"]
)
def test_kappa_zero_is_the_relu_network_bit_for_bit(make):
    net = make().eval()
    x = {"Functional": positive()}.get(type(net).__name__, torch.rand(2, 3, 32, 32))
    x = tiny_batch()[0] if isinstance(net, nn.Sequential) else x
    point = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(net(point).square().sum(), point)
    defense = jump_relu(net, kappa=0.0)
    moved = x.clone().requires_grad_(True)
    (same,) = torch.autograd.grad(defense(moved).square().sum(), moved)
    assert torch.equal(defense(x)[0], net(x)) and torch.equal(same, gradient)


def resnet():
    return import_torchvision().models.resnet18(weights=None, num_classes=4)


def test_a_jump_does_what_a_rewritten_network_does():
    class Rewritten(Functional):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                x = x * (x > 0.07)
            return x

    net = Functional()
    rewritten = Rewritten()
    rewritten.load_state_dict(net.state_dict())
    x = positive()
    assert not torch.allclose(rewritten(x), net(x))
    torch.testing.assert_close(jump_relu(net, kappa=0.07)(x)[0], rewritten(x))


def test_every_relu_is_bounded_whatever_its_spelling():
    """The ResNeXt baseline of RSE imported BReLU and never used it."""
    net, x = Functional(), positive()
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(5)
            layer.bias.add_(1.0)
    assert float(net(x).max().detach()) > 1
    seen = []
    defense = brelu(net, ceiling=0.5)
    for layer in defense.net.layers[1:]:
        layer.register_forward_hook(lambda _, args, out: seen.append(args[0].detach()))
    assert float(defense(x).max().detach()) <= 0.5
    assert len(seen) == 4 and all(0.4 < float(z.max()) <= 0.5 for z in seen)


def test_a_reused_module_and_the_functions_get_one_site_per_use():
    random = jump_relu(Functional(), kappa=dist.Uniform(0.0, 0.2))
    x = positive()
    names = ["act.jump", "act.jump.1", *(f"functional_jump.layer{use}" for use in ("", ".1", ".2"))]
    draws = random.draw(x)
    assert list(draws) == names and draws["act.jump"].shape == (64, 1)
    base = random.at(draws)(x)
    for name in names:
        assert not torch.equal(random.at(draws | {name: draws[name] + 0.5})(x), base), f"{name} is not used"
    twice = jump_relu(resnet(), kappa=dist.Uniform(0.0, 0.2)).draw(torch.rand(2, 3, 32, 32))
    assert len(twice) == 17 and twice["layer1.0.relu.jump.1"].shape == (2, 1, 1, 1)


def test_copies_of_a_functional_network_are_independent():
    first = jump_relu(Functional(), kappa=0.5)
    second = copy.deepcopy(first)
    second.net.functional_jump.layer.kappa = 0.0
    x = positive()
    assert not torch.equal(first(x), second(x))
    assert torch.equal(first(x), copy.deepcopy(first)(x))


def test_a_failed_forward_leaves_no_mode_behind():
    defense = jump_relu(Functional(), kappa=100.0)
    with pytest.raises(ValueError, match="expected inputs that fit the network"):
        defense(torch.rand(2, 5))
    assert torch.equal(F.relu(torch.ones(3)), torch.ones(3))


def test_noise_stays_on_the_raw_input_of_a_functional_network():
    defense = pd.defenses.rse(jump_relu(Functional(), kappa=0.1), before_linear=True)
    assert defense.input_noise is not None


def test_random_thresholds_cut_with_their_probability():
    """An activation of 0.45 passes U(0.3, 0.5) with chance 3/4, each example by itself."""
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    defense, draws = jump_relu(net, kappa=dist.Uniform(0.6 * 0.5, 0.5)), 2000
    passed = (defense(torch.full((5, 3), 0.45), draws) > 0).double()
    assert torch.equal(passed[..., :1].expand_as(passed), passed), "one threshold per example"
    tolerance = monte_carlo_tolerance(0.75**0.5 * 0.5, draws)
    assert float((passed.mean(0) - 0.75).abs().max()) < tolerance
    assert 0.5 < float(passed[:, 0, 0].ne(passed[:, 1, 0]).double().mean()) / (2 * 0.75 * 0.25) < 1.5
    assert float(defense.mean()(torch.full((1, 3), 0.405)).max()) > 0, "the static base has the mean 0.4"
    assert float(defense.mean()(torch.full((1, 3), 0.395)).max()) == 0


def test_the_marginal_jump_is_the_mean_over_random_thresholds():
    z = torch.tensor([-0.5, 0.0, 0.3, 0.5, 0.7, 2.0])
    threshold, draws = dist.Normal(0.5, 0.2), 40_000
    layer = JumpReLU(threshold)
    kappa = threshold.sample((draws, 1))
    many = torch.func.functional_call(layer, {"threshold.value": kappa}, (z.expand(draws, -1),)).double()
    exact = MarginalJumpReLU(threshold)(z).detach().double()
    tolerance = monte_carlo_tolerance(1.0, draws) * z.double() / 2 + 1e-6
    assert bool(((many.mean(0) - exact).abs() <= tolerance.clamp_min(1e-6)).all())
    shifted = MarginalJumpReLU(dist.Normal(0.52, 0.2))(z).detach().double()
    assert not bool(((many.mean(0) - shifted).abs() <= tolerance.clamp_min(1e-6)).all())


def test_learned_thresholds_find_the_jump_that_the_data_have():
    """Logits (20 J(z), 5) and labels that change at z = 0.5: the threshold has to come to 0.5."""
    x = torch.linspace(0, 1, 200).unsqueeze(1)
    y = (x[:, 0] < 0.5).long()
    net = nn.Sequential(nn.ReLU(), nn.Linear(1, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.tensor([[20.0], [0.0]]))
    net[1].bias.copy_(torch.tensor([0.0, 5.0]))
    defense = jump_relu(net, kappa=dist.Normal(0.2, 0.1), learned=True)
    layer = next(m for m in defense.modules() if isinstance(m, MarginalJumpReLU))
    assert {
        id(p) for group in defense.param_groups(0.1) for p in group["params"] if group["weight_decay"] == 0
    } == {
        id(layer.loc),
        id(layer.log_scale),
    }
    optimizer = torch.optim.Adam(defense.param_groups(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        pd.objectives.elbo(defense, x, y).backward()
        optimizer.step()
    assert float(layer.loc.detach()) == pytest.approx(0.5, abs=0.03) and not defense.stochastic


def test_quantiles_cut_the_same_share_everywhere():
    net, (x, _) = tiny_net().eval(), tiny_batch(32)
    kappa = quantiles(net, x, 0.25)
    assert set(kappa) == {"3", "5"}
    defense = jump_relu(net, kappa=kappa)
    shares = []
    for path in kappa:
        defense.net.get_submodule(path).jump.register_forward_hook(
            lambda _, args, out: shares.append(float((out > 0).sum() / (args[0] > 0).sum()))
        )
    defense(x)
    assert shares[0] == pytest.approx(0.75, abs=0.002)
    assert quantiles(net, x, 0.0) == {"3": 0.0, "5": 0.0}
    assert set(quantiles(Functional(), positive(), 0.5)) == {"act", "functional"}


def test_kappa_by_path_leaves_the_others_alone():
    defense = jump_relu(tiny_net(), kappa={"5": 0.3})
    assert list(jumps(defense)) == ["5.jump"] and jumps(defense)["5.jump"].kappa == pytest.approx(0.3)
    functional = jump_relu(Functional(), kappa={"functional": 0.3})
    assert list(jumps(functional)) == ["functional_jump.layer"]
    chosen = jump_relu(Functional(), kappa=0.3, where=lambda path, module: path == "act")
    assert list(jumps(chosen)) == ["act.jump"]


def test_tuning_takes_the_largest_threshold_within_the_drop():
    """Ten points whose margin activation is 0.05, 0.15, ..., 0.95: accuracy at kappa is known."""
    x = torch.zeros(10, 2)
    x[:, 0] = torch.arange(10) / 10 + 0.05
    net = nn.Sequential(nn.ReLU(), nn.Linear(2, 2, bias=True))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        net[1].bias.copy_(torch.tensor([0.0, 1e-3]))
    y, grid = torch.zeros(10).long(), [k / 10 for k in range(10)]
    for drop, kappa in ((0.0, 0.0), (0.1, 0.1), (0.25, 0.2), (0.3, 0.3), (1.0, 0.9)):
        assert tune_kappa(net, (x, y), max_drop=drop, candidates=grid) == kappa
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    assert tune_kappa(net, batches, max_drop=0.3, candidates=grid) == 0.3
    by_default = tune_kappa(net, (x, y), max_drop=0.3)
    cut = float((x[:, 0] <= by_default).float().mean())
    assert cut == pytest.approx(0.3)


def test_tuning_a_random_defense_uses_one_set_of_draws():
    train, test = pd.data.digits()
    defense = pd.defenses.rse(pd.models.small_cnn())
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    pd.fit(
        defense, loader, epochs=2, optimizer=torch.optim.Adam(defense.parameters(), lr=5e-3), progress=False
    )
    validation = tuple(t[:100] for t in test.tensors)
    grid = [0.0, 0.01, 0.05, 0.2, 0.8]
    strict, loose = (
        tune_kappa(defense.eval(), validation, max_drop=drop, candidates=grid, num_samples=4)
        for drop in (0.0, 0.1)
    )
    assert 0 <= strict <= loose < 0.8 and loose > 0
    assert tune_kappa(defense, validation, max_drop=0.1, candidates=grid, num_samples=4) == loose


def test_it_retrofits_random_and_trained_defenses():
    x, y = tiny_batch()
    for base in (
        pd.deterministic(tiny_net()),
        pd.defenses.rse(tiny_net()),
        pd.defenses.bayesian(tiny_net(), num_data=50),
    ):
        defense = jump_relu(base, kappa=0.1)
        assert list(defense.sites) == list(base.sites) and len(jumps(defense)) == 2
        assert defense.num_data == base.num_data
        a, b = (d.freeze(2, torch.Generator().manual_seed(0))(x) for d in (jump_relu(base, kappa=0.0), base))
        assert torch.equal(a, b)
        pd.objectives.elbo(defense, x, y).backward()


def test_surrogates_speak_of_every_jump():
    defense = jump_relu(tiny_net(), kappa={"3": 0.2, "5": dist.Uniform(0.2, 0.6)})
    found = surrogates(defense, width=0.5)
    at = {name.rpartition("net.")[2]: float(smooth(torch.tensor(0.4))) for name, smooth in found.items()}
    assert at.keys() == jumps(defense).keys()
    assert at["5.jump"] == pytest.approx(0.2), "the mean threshold is 0.4"
    assert at["3.jump"] == pytest.approx(0.4 * float(torch.tensor(2.0).sigmoid()))


def test_bpda_walks_over_the_jump_that_hides_the_gradient():
    """Logits (10 J(x), 3) at x = 0.45 below a threshold of 0.5: the error at 0.65 has no gradient."""
    net = nn.Sequential(nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[10.0], [0.0]]))
        net[1].bias.copy_(torch.tensor([0.0, 3.0]))
    defense, x, y = jump_relu(net, kappa=0.5), torch.full((1, 1), 0.45), torch.tensor([1])
    attack = partial(pd.attacks.pgd, eps=0.2, random_start=False, num_steps=5)
    blind = attack(defense, x, y)
    with bpda(defense, surrogates(defense)):
        seeing = attack(defense, x, y)
    assert torch.equal(blind, x) and float(seeing) == pytest.approx(0.65)
    assert int(defense(blind)[0].argmax()) == 1 and int(defense(seeing)[0].argmax()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: jump_relu(nn.Linear(3, 2), kappa=0.1),
            r"found no ReLU in Linear; looked for nn.ReLU modules",
        ),
        (lambda: brelu(nn.Sequential(nn.Tanh())), "found no ReLU in Sequential"),
        (lambda: jump_relu(tiny_net(), kappa=-0.1), "expected kappa >= 0 and finite, got -0.1"),
        (lambda: jump_relu(tiny_net(), kappa=float("nan")), "expected kappa >= 0 and finite"),
        (lambda: jump_relu(tiny_net(), kappa=dist.Normal(-1.0, 0.1)), "expected kappa >= 0"),
        (lambda: jump_relu(tiny_net(), kappa={"4": 0.1}), "no ReLU at 4; found: 3, 5"),
        (
            lambda: jump_relu(tiny_net(), kappa=0.1, where=lambda *_: False),
            r"\(here: 3, 5\) that where accepts",
        ),
        (
            lambda: jump_relu(tiny_net(), kappa=0.1, learned=True),
            "needs a distribution to start from",
        ),
        (lambda: jump_relu(tiny_net(), kappa=dist.Uniform(0.0, 1.0), learned=True), "with loc and scale"),
        (lambda: brelu(tiny_net(), ceiling=0.0), "expected ceiling > 0"),
        (lambda: quantiles(tiny_net(), tiny_batch()[0], 1.0), r"expected a share in \[0, 1\), got 1.0"),
        (lambda: tune_kappa(tiny_net(), tiny_batch(), max_drop=-0.1), "expected max_drop >= 0"),
        (lambda: surrogates(pd.deterministic(tiny_net())), "found no JumpReLU"),
        (lambda: smoothed_jump(0.5, width=0.0), "expected width > 0"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_network_that_never_calls_a_relu_is_refused_when_it_runs():
    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x).tanh()

    defense = jump_relu(Smooth(), kappa=0.1)
    with pytest.raises(ValueError, match="found no ReLU in Smooth; looked for nn.ReLU modules and for calls"):
        defense(torch.rand(2, 4))
