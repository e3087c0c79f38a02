"""Noise whose covariance over channels is trained, and noise after residual blocks."""

import math

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.nn import CorrelatedNoise, Noise
from tests.worlds import FAILURE_RATE, LinearWorld, normal_quantile, tiny_batch, tiny_net


def correlated(defense):
    return {name: m for name, m in defense.net.named_modules() if isinstance(m, CorrelatedNoise)}


def stirred(layer):
    """The same layer with a covariance that is no multiple of the identity."""
    with torch.no_grad():
        layer.log_scale.add_(torch.linspace(-0.5, 0.5, len(layer.log_scale)))
        layer.factor.copy_(torch.randn(layer.factor.shape, generator=torch.Generator().manual_seed(1)) / 3)
    return layer


def noise_of(layer, count, shape):
    """What the layer adds to zeros."""
    like = torch.zeros(count, *shape)
    latent = list(layer._latent(like).shape)
    eps = torch.randn(latent, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return torch.func.functional_call(layer, {"eps.value": eps}, like)


def test_a_lower_triangular_factor_by_hand():
    layer = CorrelatedNoise(0.5, 2, axis=-1)
    with torch.no_grad():
        layer.factor.copy_(
            torch.tensor([[7.0, 9.0], [2.0, 7.0]])
        )  # what is above the diagonal does not count
    eps = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    moved = torch.func.functional_call(layer, {"eps.value": eps}, torch.ones(2, 2)).detach()
    torch.testing.assert_close(moved, torch.tensor([[1.5, 3.0], [1.0, 2.0]]))
    torch.testing.assert_close(layer.covariance.detach(), torch.tensor([[0.25, 1.0], [1.0, 4.25]]))


def test_a_low_rank_factor_by_hand():
    layer = CorrelatedNoise(0.5, 2, axis=-1, rank=1)
    with torch.no_grad():
        layer.factor.copy_(torch.tensor([[1.0], [2.0]]))
    eps = torch.tensor([[2.0, 0.0, 3.0]])
    moved = torch.func.functional_call(layer, {"eps.value": eps}, torch.zeros(1, 2)).detach()
    torch.testing.assert_close(moved, torch.tensor([[4.0, 6.0]]))
    torch.testing.assert_close(layer.covariance.detach(), torch.tensor([[1.25, 2.0], [2.0, 4.25]]))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("axis", "shape"), [(1, (3, 2, 2)), (-1, (3,)), (-1, (4, 3))])
def test_the_covariance_of_samples_is_that_of_the_factor(rank, axis, shape):
    layer, count = stirred(CorrelatedNoise(0.5, 3, axis=axis, rank=rank)), 40_000
    noise = noise_of(layer, count, shape).movedim(axis, -1).flatten(1, -2) if len(shape) > 1 else None
    noise = noise_of(layer, count, shape).unsqueeze(1) if noise is None else noise
    expected = layer.covariance.detach()
    torch.testing.assert_close(expected, (layer.mixing @ layer.mixing.T).detach())
    deviation = expected.diagonal().sqrt()
    tolerance = normal_quantile(FAILURE_RATE / 100) * math.sqrt(2 / count) * torch.outer(deviation, deviation)
    for position in noise.unbind(1):
        found = position.T @ position / count
        assert bool(((found - expected).abs() < tolerance).all())
        assert not bool(((found - expected.diagonal().diag()).abs() < tolerance).all()), "no power"
    if noise.shape[1] > 1:
        across = noise[:, 0].T @ noise[:, 1] / count
        assert bool((across.abs() < tolerance).all()), "positions are independent"


@pytest.mark.parametrize("rank", [None, 2])
def test_scale_and_volume_are_those_of_the_covariance(rank):
    layer = stirred(CorrelatedNoise(0.5, 3, axis=-1, rank=rank))
    covariance = layer.covariance.double()
    torch.testing.assert_close(layer.scale.double(), covariance.diagonal().sqrt())
    torch.testing.assert_close(layer.log_volume.double(), covariance.logdet() / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_it_starts_as_independent_noise_and_needs_no_example(covariance):
    defense = pd.defenses.rse(
        tiny_net(), scale="learned", covariance=covariance, sigma_inner=0.3, before_linear=True
    )
    layers = correlated(defense)
    assert list(layers) == ["4.noise", "7.noise"]
    assert [len(layer.log_scale) for layer in layers.values()] == [3, 16]
    assert type(defense.net.input_noise) is Noise  # one channel has a variance, and no covariance
    for layer in layers.values():
        torch.testing.assert_close(layer.covariance.detach(), 0.09 * torch.eye(len(layer.log_scale)))


def test_a_diagonal_covariance_is_a_scale_per_channel():
    options = {"scale": "learned", "before_linear": True}
    diagonal = pd.defenses.rse(tiny_net(), covariance="diagonal", **options)
    channel = pd.defenses.rse(tiny_net(), scale_shape="channel", **options)
    shapes = [
        {n: tuple(p.shape) for n, p in d.named_parameters() if "noise" in n} for d in (diagonal, channel)
    ]
    assert shapes[0] == shapes[1] and sorted(shapes[0].values()) == [(1, 1, 1), (3, 1, 1), (16,)]


def test_features_of_tokens_are_the_last_axis():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2))
    defense = pd.defenses.rse(
        net,
        scale="learned",
        covariance="full",
        before_linear=True,
        init_at="conv",
        example=torch.rand(2, 3, 4),
    )
    first, second = correlated(defense).values()
    assert (first.axis, len(first.log_scale), len(second.log_scale)) == (-1, 4, 15)
    assert defense.draw(torch.rand(6, 3, 4))["0.noise"].shape == (6, 3, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"covariance": "full"}, "scale='learned'"),
        ({"covariance": "low_rank", "scale": "variational"}, "scale='learned'"),
        ({"covariance": "full", "scale": "learned", "scale_shape": "element"}, "268"),
        ({"covariance": "banded", "scale": "learned"}, "'diagonal', 'full'|diagonal, full"),
        ({"after": "layer"}, "block"),
    ],
)
def test_what_no_covariance_can_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        pd.defenses.rse(tiny_net(), example=tiny_batch()[0], **options)


def test_a_certificate_counts_on_the_smallest_eigenvalue():
    world = LinearWorld(sigma=0.25)
    defense = pd.defenses.rse(
        world.net, sigma_init=0.25, before_linear=True, scale="learned", covariance="full"
    )
    (layer,) = correlated(defense).values()
    assert float(defense.input_noise[1].min()) == pytest.approx(0.25)
    with torch.no_grad():
        stirred(layer).factor.mul_(0.2)
    family, scale = defense.input_noise
    eigenvalues = torch.linalg.eigvalsh(layer.covariance.detach().double())
    assert family == "normal" and float(scale.min()) == pytest.approx(float(eigenvalues[0].sqrt()), rel=1e-4)
    x, _ = world.points(40)
    certificate = pd.certify(defense, x, n0=50, n=500, seed=0)
    assert certificate.sigma == pytest.approx(float(eigenvalues[0].sqrt()), rel=1e-4)
    assert bool((certificate.radius <= world.distance(x)).all())  # the plane is there, whatever the noise
    assert float(certificate.radius.max()) > 0


class Block(nn.Module):
    def __init__(self, width, stride=1):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return self.two(self.one(x).relu()).relu()


def residual_net():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Block(2), Block(4, 2), nn.Flatten(), nn.Linear(36, 3))


def test_noise_goes_after_every_block_and_nowhere_else():
    defense, (x, _) = pd.defenses.rse(residual_net(), after="block", sigma_inner=0.3), tiny_batch()
    assert list(defense.sites) == ["1.noise", "2.noise"]
    draws = defense.draw(x)
    assert draws["1.noise"].shape == (6, 2, 6, 6) and draws["2.noise"].shape == (6, 4, 3, 3)
    net = defense.net
    seen = net[1].two(net[1].one(net[0](x)).relu()).relu() + 0.3 * draws["1.noise"]
    seen = net[2].two(net[2].one(seen).relu()).relu() + 0.3 * draws["2.noise"]
    torch.testing.assert_close(defense.at(draws)(x)[0], net[4](seen.flatten(1)))
    assert defense.input_noise is None


def test_scales_after_blocks_have_the_shape_of_what_blocks_return():
    (x, _), options = tiny_batch(), {"after": "block", "scale": "learned"}
    element = pd.defenses.rse(residual_net(), scale_shape="element", example=x, floor=0.01, **options)
    assert [tuple(m.log_scale.shape) for m in element.net.modules() if isinstance(m, Noise)] == [
        (2, 6, 6),
        (4, 3, 3),
    ]
    full = pd.defenses.rse(residual_net(), covariance="full", **options)
    assert [len(layer.log_scale) for layer in correlated(full).values()] == [2, 4]
    chosen = pd.defenses.rse(residual_net(), where=lambda path, _: path == "2", **options)
    assert list(chosen.sites) == ["2.noise"]
    assert len(list(pd.defenses.rse(pd.models.resnet20(), after="block").sites)) == 9
    with pytest.raises(ValueError, match="residual blocks"):
        pd.defenses.rse(tiny_net(), after="block")
