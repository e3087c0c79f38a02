"""What is particular to each builder, and the surgery below them."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.nn.passes import execution_order, input_shapes
from probdefense.objectives import elbo
from tests.worlds import import_torchvision, tiny_batch, tiny_net


def noise_layers(defense):
    return {name: m for name, m in defense.net.named_modules() if isinstance(m, pd.nn.Noise)}


def scales(defense):
    return {name: round(float(layer.scale), 3) for name, layer in noise_layers(defense).items()}


class Shuffled(nn.Module):
    """Registers its convolutions in another order than it runs them, and one of them runs twice."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(2, 2, 1)
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(2 * 36, 3)

    def forward(self, x):
        x = (x - 0.5) / 0.25
        z = self.shared(self.shared(self.first(x)).relu()).relu()
        return self.head(self.last(z).flatten(1))


def test_rse_puts_noise_before_every_convolution_and_none_before_linear():
    defense = pd.defenses.rse(tiny_net())
    assert scales(defense) == {"input_noise": 0.2, "4.noise": 0.1}


def test_rse_before_linear_takes_the_last_one_too():
    defense = pd.defenses.rse(tiny_net(), before_linear=True)
    assert scales(defense) == {"input_noise": 0.2, "4.noise": 0.1, "7.noise": 0.1}


def test_rse_finds_the_convolution_that_runs_first():
    for example in (None, tiny_batch()[0]):
        on_input = pd.defenses.rse(Shuffled(), example=example)
        assert scales(on_input) == {"input_noise": 0.2, "last.noise": 0.1, "shared.noise": 0.1}
        at_conv = pd.defenses.rse(Shuffled(), init_at="conv", example=example)
        assert scales(at_conv) == {"first.noise": 0.2, "last.noise": 0.1, "shared.noise": 0.1}


def test_reused_modules_get_one_site_per_use_in_order_of_execution():
    defense, (x, _) = pd.defenses.rse(Shuffled()), tiny_batch()
    assert list(defense.draw(x)) == ["input_noise", "shared.noise", "shared.noise.1", "last.noise"]
    draws = defense.draw(x)
    base = defense.at(draws)(x)
    for name in draws:
        other = {**draws, name: draws[name] + 1}
        assert not torch.allclose(defense.at(other)(x), base), f"{name} is not used"


def test_noise_sits_on_the_raw_pixels_even_when_the_network_normalizes():
    x, _ = tiny_batch()
    for net in (tiny_net(), Shuffled()):
        defense = pd.defenses.rse(net, sigma_init=0.2, sigma_inner=0.0).eval()
        draws = defense.draw(x)
        moved = x + 0.2 * draws["input_noise"]
        torch.testing.assert_close(defense.at(draws)(x)[0], net.eval()(moved))
        assert defense.input_noise[0] == "normal" and float(defense.input_noise[1]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"init_at": "conv"},
        {"multiplicative": True},
        {"when": "train"},
    ],
)
def test_input_noise_is_none_where_a_certificate_would_be_wrong(options):
    assert pd.defenses.rse(tiny_net(), **options).input_noise is None


def test_input_noise_behind_a_layer_is_none():
    net = nn.Sequential(nn.Flatten(), pd.nn.Noise(0.1), nn.Linear(36, 3))
    assert pd.deterministic(net).input_noise is None

    class SkipsTheNoise(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise, self.head = pd.nn.Noise(0.1), nn.Linear(36, 3)

        def forward(self, x):
            return self.head((self.noise(x) + x).flatten(1))

    assert pd.deterministic(SkipsTheNoise()).input_noise is None


def test_input_noise_is_the_trained_scale():
    learned = pd.defenses.rse(tiny_net(), scale="variational", sigma_init=0.3)
    with torch.no_grad():
        learned.guide.posteriors["input_noise"].log_scale.fill_(math.log(0.5))
    assert float(learned.input_noise[1]) == pytest.approx(0.15)


@pytest.mark.parametrize(
    "family",
    [dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0), dist.Uniform(-1.0, 1.0), dist.StudentT(5.0)],
)
def test_noise_of_any_family_has_its_moments(family):
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    defense = pd.defenses.rse(net, family=family, sigma_init=0.5, where=lambda path, _: path == "0")
    x = torch.full((1, 10), 0.5)
    draws = defense(x, 4000).detach().double()
    assert abs(float(draws.mean()) - 0.5) < 0.02
    assert float(draws.std()) == pytest.approx(0.5 * float(family.stddev), rel=0.08)


def test_noise_before_a_block_runs_once_and_first():
    """A Sequential runs every child it is given, so a hook on it would run the layer twice."""
    net = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Flatten(), nn.Linear(32, 3))
    defense = pd.defenses.rse(net, where=lambda path, module: path == "0", init_at="conv")
    x, draws = tiny_batch()[0], defense.draw(tiny_batch()[0])
    assert list(draws) == ["0.noise"]
    torch.testing.assert_close(defense.at(draws)(x)[0], net(x + 0.2 * draws["0.noise"]))


def test_where_chooses_by_path():
    defense = pd.defenses.rse(tiny_net(), where=lambda path, module: path == "7")
    assert scales(defense) == {"input_noise": 0.2}
    inner = pd.defenses.rse(tiny_net(), where=lambda path, module: path in ("4", "7"), init_at="conv")
    assert scales(inner) == {"4.noise": 0.2, "7.noise": 0.1}


@pytest.mark.parametrize(
    ("scale_shape", "shapes"),
    [
        ("scalar", {"input_noise": (), "4.noise": ()}),
        ("channel", {"input_noise": (1, 1, 1), "4.noise": (3, 1, 1)}),
        ("element", {"input_noise": (1, 6, 6), "4.noise": (3, 6, 6)}),
    ],
)
def test_scale_shapes(scale_shape, shapes):
    x, _ = tiny_batch()
    learned = pd.defenses.rse(tiny_net(), scale="learned", scale_shape=scale_shape, example=x)
    assert {name: tuple(layer.scale.shape) for name, layer in noise_layers(learned).items()} == shapes


def test_learned_scale_has_the_gradient_of_the_expected_likelihood(float64):
    """Central differences on common random numbers; a spurious log-prior term would show here."""
    x, y = tiny_batch()
    x = x.double()
    defense = pd.defenses.rse(tiny_net(), scale="learned", num_data=50).eval()
    draws = {n: v.detach() for n, v in defense.draw(x).items()}

    def loss():
        return -defense.step(x, y, draws).log_lik.mean()

    loss().backward()
    for layer in noise_layers(defense).values():
        exact, h = layer.log_scale.grad.clone(), 1e-5
        with torch.no_grad():
            layer.log_scale += h
            up = loss()
            layer.log_scale -= 2 * h
            down = loss()
            layer.log_scale += h
        torch.testing.assert_close(exact, (up - down) / (2 * h), rtol=1e-5, atol=1e-9)


def test_learned_scales_collapse_under_the_plain_likelihood_and_a_floor_holds_them():
    train, _ = pd.data.digits()
    x, y = (t[:256] for t in train.tensors)
    for floor in (0.0, 0.05):
        torch.manual_seed(0)
        defense = pd.defenses.rse(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), before_linear=True, scale="learned", floor=floor
        )
        optimizer = torch.optim.Adam(defense.param_groups(), lr=0.05)
        for _ in range(120):
            optimizer.zero_grad()
            elbo(defense, x, y).backward()
            optimizer.step()
        scale = float(defense.input_noise[1])
        assert floor <= scale < floor + 0.03, (floor, scale)


def test_variational_noise_with_full_kl_stays_at_its_prior():
    train, _ = pd.data.digits()
    x, y = (t[:256] for t in train.tensors)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    final = {}
    for weight in (1.0, 1e-3):
        torch.manual_seed(0)
        defense = pd.defenses.rse(net, before_linear=True, scale="variational", num_data=len(y))
        optimizer = torch.optim.Adam(defense.param_groups(), lr=0.05)
        for _ in range(120):
            optimizer.zero_grad()
            elbo(defense, x, y, kl_weight={"*noise": weight}).backward()
            optimizer.step()
        final[weight] = float(defense.input_noise[1])
    assert final[1.0] == pytest.approx(0.2, rel=0.1) and final[1e-3] < 0.15


def test_bayesian_leaves_normalization_layers_alone_unless_asked():
    by_default = pd.defenses.bayesian(tiny_net())
    names = {n for group in by_default.sites["weights"].names for n in group}
    assert names == {"1.weight", "4.weight", "4.bias", "7.weight", "7.bias"}
    everything = pd.defenses.bayesian(tiny_net(), where=lambda *_: True)
    assert {n for group in everything.sites["weights"].names for n in group} == names | {"2.weight", "2.bias"}


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    net = Tied()
    defense, x = pd.defenses.bayesian(net), torch.rand(3, 4)
    assert defense.guide.posteriors["weights"].loc.numel() == 16 + 4 + 4
    torch.testing.assert_close(defense.mean()(x)[0], net(x))
    filled = defense.sites["weights"].fill(torch.randn(24), defense.net)
    assert torch.equal(filled["a.weight"], filled["b.weight"])
    assert defense(x, 2).shape == (2, 3, 4)


def test_priors_by_name_make_one_site_per_family():
    def prior(name, tensor):
        if name.endswith("bias"):
            return None
        return dist.Laplace(0.0, 0.5) if name == "1.weight" else dist.Normal(0.0, tensor.std())

    x, y = tiny_batch()
    defense = pd.defenses.bayesian(tiny_net(), num_data=50, prior=prior)
    kinds = {type(s.prior()).__name__ if s.prior else None for s in defense.sites.values()}
    assert kinds == {"Normal", "Laplace", None} and len(defense.sites) == 3
    kl = defense.step(x, y).kl
    assert len(kl) == 2 and all(torch.isfinite(value) for value in kl.values())


def test_closed_kl_against_a_laplace_prior():
    net = nn.Linear(5, 4)
    defense = pd.defenses.bayesian(net, num_data=10, prior=dist.Laplace(0.0, 0.7), init_scale=0.4)
    closed = defense.step(torch.rand(2, 5), torch.tensor([0, 1])).kl["weights"].detach()
    q = defense.guide.posteriors["weights"]()
    value = q.sample((20_000,))
    sampled = (q.log_prob(value) - dist.Laplace(0.0, 0.7).log_prob(value)).sum(1).detach()
    assert float(closed) == pytest.approx(float(sampled.mean()), abs=5 * float(sampled.std()) / 20_000**0.5)


def test_a_family_without_a_closed_kl_warns():
    defense = pd.defenses.bayesian(nn.Linear(3, 2), num_data=10, prior=dist.StudentT(3.0))
    with pytest.warns(
        UserWarning, match="KL\\(Normal \\|\\| StudentT\\) of site 'weights' has no closed form"
    ):
        defense.step(torch.rand(2, 3), torch.tensor([0, 1]))


def test_no_prior_no_kl():
    defense = pd.defenses.bayesian(nn.Linear(3, 2), prior=None)
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    assert defense.step(x, y).kl == {}
    assert torch.isfinite(elbo(defense, x, y))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: pd.defenses.rse(nn.Linear(3, 2)),
            "found nothing to put noise before in Linear; looked for Conv1d",
        ),
        (lambda: pd.defenses.rse(tiny_net(), where=lambda *_: False), "looked for where"),
        (lambda: pd.defenses.rse(tiny_net(), scale_shape="element", scale="learned"), "pass example=x"),
        (lambda: pd.defenses.rse(tiny_net(), scale="free"), "unknown scale 'free'"),
        (lambda: pd.defenses.rse(tiny_net(), sigma_init=-1.0), "expected sigma_init >= 0"),
        (lambda: pd.defenses.rse(tiny_net(), when="now"), "expected when to be"),
        (
            lambda: pd.defenses.rse(tiny_net(), scale="variational", family=dist.StudentT(3.0)),
            "needs Normal or Laplace noise, got StudentT",
        ),
        (lambda: pd.defenses.bayesian(tiny_net(), init_scale=0.0), "expected init_scale > 0"),
        (
            lambda: pd.defenses.bayesian(tiny_net(), where=lambda *_: False),
            "no parameter of Sequential was chosen",
        ),
        (
            lambda: pd.defenses.bayesian(tiny_net(), layout="round"),
            "expected layout 'flat' or 'per_tensor'",
        ),
        (lambda: pd.defenses.bayesian(pd.defenses.bayesian(tiny_net())), "(no parameters left)|2.weight"),
        (lambda: pd.defenses.bayesian("net"), "expected an nn.Module or a Defense, got str"),
        (
            lambda: pd.defenses.rse(pd.defenses.bayesian(tiny_net(), num_data=5), num_data=6),
            "expected num_data=5",
        ),
    ],
)
def test_bad_requests_say_what_to_do(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_the_dry_run_changes_nothing():
    defense, (x, _) = pd.defenses.rse(Shuffled()), tiny_batch()
    state = torch.get_rng_state()
    order = [path for path, _, _ in execution_order(defense.net, x)]
    assert order == ["input_noise.eps", "shared.noise.eps", "shared.noise.eps", "last.noise.eps"]
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_that_takes_no_empty_batch_runs_once():
    class OwnTensors(Shuffled):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x.view(len(x), -1).view(x.shape))

    (x, _), calls = tiny_batch(), []
    assert list(input_shapes(OwnTensors(), ["last", "first"], x)) == ["first", "last"] and calls == [0, 1]
    assert pd.defenses.rse(OwnTensors())(x, 2).shape == (2, 6, 3)


BUILDERS_FOR_RESNET = {
    "deterministic": pd.deterministic,
    "rse": pd.defenses.rse,
    "bayesian": lambda net: pd.defenses.bayesian(net, num_data=10),
    "both": lambda net: pd.defenses.bayesian(pd.defenses.rse(net), num_data=10),
}


@pytest.mark.parametrize("name", BUILDERS_FOR_RESNET)
def test_resnet18_goes_through_every_builder(name):
    net = import_torchvision().models.resnet18(weights=None, num_classes=4)
    defense = BUILDERS_FOR_RESNET[name](net)
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 3])
    assert defense.eval()(x, 2).shape[1:] == (2, 4)
    if "rse" in name or name == "both":
        convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
        assert len(noise_layers(defense)) == convolutions
    loss = elbo(defense, x, y)
    loss.backward()
    assert all(p.grad is not None for p in defense.parameters())


def test_normalize_is_checked():
    with pytest.raises(ValueError, match="one mean and one positive std per channel"):
        pd.nn.Normalize([0.5], [0.0])


@pytest.mark.parametrize(
    "family",
    [
        dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()]),
        dist.Normal(0.0, 1.0).mask(False),
    ],
)
def test_noise_of_a_nested_family_is_refused(family):
    with pytest.raises((ValueError, TypeError), match="expected"):
        pd.defenses.rse(nn.Linear(4, 3), before_linear=True, family=family)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "build", [pd.defenses.rse, pd.defenses.bayesian, lambda net: pd.defenses.ensemble([net, net])]
)
def test_a_network_that_cannot_be_copied_is_explained(build):
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 2, 3)), nn.Flatten(), nn.Linear(2, 3))
    net(torch.rand(1, 1, 3, 3))
    with pytest.raises(ValueError, match="parametrizations"):
        build(net)
