"""Noise on the features that the last layer reads: correlated, or of a distribution that depends on them."""

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.nn import ConditionalNoise, CorrelatedNoise
from probdefense.objectives import elbo
from tests.worlds import tiny_batch, tiny_net

builders = pytest.mark.parametrize("builder", [pd.defenses.wca, pd.defenses.conditional_noise])


def layer_of(defense):
    kinds = (CorrelatedNoise, ConditionalNoise)
    (found,) = ((path, m) for path, m in defense.net.named_modules() if isinstance(m, kinds))
    return found


class Crossed(nn.Module):
    """Registers its last layer first, and has one that never runs."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.idle = nn.Linear(4, 3), nn.Linear(36, 4), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())


@builders
def test_it_sits_before_the_linear_layer_that_runs_last(builder):
    assert list(builder(tiny_net()).sites) == ["7.noise"]
    path, layer = layer_of(builder(Crossed(), example=tiny_batch()[0]))
    assert path == "head.noise"
    assert layer.axis == -1


@builders
def test_a_layer_may_be_named(builder):
    defense, (x, _) = builder(tiny_net(), "4"), tiny_batch()
    path, layer = layer_of(defense)
    assert (path, layer.axis) == ("4.noise", 1)
    assert defense.draw(x)["4.noise"].shape == (6, 3, 6, 6)
    with pytest.raises(ValueError, match="a layer at '9'"):
        builder(tiny_net(), "9")
    with pytest.raises(ValueError, match="never runs"):
        builder(Crossed(), "idle", example=x)
    with pytest.raises(ValueError, match="a linear layer"):
        builder(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()))
    with pytest.raises(TypeError, match="layer as str"):
        builder(tiny_net(), 7)


@builders
def test_every_member_of_an_ensemble_gets_noise(builder):
    pair = pd.defenses.ensemble([tiny_net(), tiny_net()])
    assert list(builder(pair).sites) == ["member", "members.0.7.noise", "members.1.7.noise"]
    assert list(builder(pair, "4").sites) == ["member", "members.0.4.noise", "members.1.4.noise"]
    assert list(builder(pair, "members.1.4").sites) == ["member", "members.1.4.noise"]


def test_conditional_noise_by_hand():
    layer = ConditionalNoise(1, hidden=2, scale=0.5, axis=-1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.bias.zero_()
        layer.loc_weight.copy_(torch.tensor([[3.0, 5.0]]))
        layer.scale_weight.copy_(torch.tensor([[0.0, 2.0]]).log1p())  # doubles and trebles: log s = a log 3
        layer.scale_bias.zero_()
    h, eps = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [2.0]])
    moved = torch.func.functional_call(layer, {"eps.value": eps}, h).detach()
    # h = 2: a = (2, 0), m = 6, s = 1; h = -1: a = (0, 1), m = 5, s = 3
    torch.testing.assert_close(moved, torch.tensor([[2.0 + 6.0 + 1.0], [-1.0 + 5.0 + 6.0]]))


def test_the_latent_is_standard_normal_and_the_layer_makes_the_rest():
    torch.manual_seed(0)
    defense, (x, _) = pd.defenses.conditional_noise(tiny_net()).eval(), tiny_batch()
    _, layer = layer_of(defense)
    nn.init.normal_(layer.loc_weight)
    draws = defense.draw(x)
    prior = defense.sites["7.noise"].distribution("posterior")
    assert (float(prior.mean), float(prior.stddev)) == (0.0, 1.0)
    features = defense.net[:7](x)
    loc, scale = layer.moments(features)
    weight, bias = defense.net[7].weight, defense.net[7].bias
    expected = (features + loc + scale * draws["7.noise"]) @ weight.T + bias
    torch.testing.assert_close(defense.at(draws)(x)[0], expected)
    torch.testing.assert_close(defense.mean()(x)[0], (features + loc) @ weight.T + bias)


def test_the_gradient_reaches_both_networks_and_the_scale_of_the_input():
    torch.manual_seed(0)
    defense, (x, y) = pd.defenses.conditional_noise(tiny_net()), tiny_batch()
    elbo(defense, x, y).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in defense.parameters())
    _, layer = layer_of(defense)
    h = torch.rand(3, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(layer.moments(h)[1].sum(), h)
    assert float(slope.abs().flatten(1).amax(1).min()) > 0


@builders
def test_no_certificate(builder):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    x, _ = tiny_batch()
    defense = builder(nn.Linear(4, 3)) if builder is pd.defenses.conditional_noise else builder(flat)
    assert defense.input_noise is None
    with pytest.raises(ValueError, match="no certificate"):
        pd.certify(defense, torch.rand(2, 4) if builder is pd.defenses.conditional_noise else x)


def test_the_amortizing_network_gets_no_prior_and_no_noise_of_its_own():
    noisy = pd.defenses.conditional_noise(tiny_net())
    bayesian = pd.defenses.bayesian(noisy, num_data=9)
    assert not any("noise" in name for names in bayesian.sites["weights"].names for name in names)
    everywhere = pd.defenses.rse(noisy, before_linear=True)
    assert list(everywhere.sites) == ["7.noise", "input_noise", "4.noise", "7.noise_1"]


def eot_gradient(function, x, copies):
    """The mean gradient over copies of an image in one batch, as released attacks average."""
    many = x.expand(copies, *x.shape[1:]).clone().requires_grad_()
    logits = function(many)[0]
    loss = nn.functional.cross_entropy(logits, torch.zeros(copies, dtype=torch.int64), reduction="sum")
    return torch.autograd.grad(loss, many)[0].mean(0)


@builders
def test_noise_shared_by_the_batch_makes_eot_over_copies_an_eot_of_one(builder):
    """What the released code of WCA-Net and Learn2Perturb does, and what ours does not."""
    torch.manual_seed(0)
    defense, (x, _) = builder(tiny_net()), tiny_batch(1)
    with torch.no_grad():
        for name, parameter in defense.named_parameters():
            if name.endswith(("noise.log_scale", "noise.scale_bias")):
                parameter.fill_(1.0)
    shared = defense.freeze(1)  # one draw for the whole batch
    torch.testing.assert_close(eot_gradient(shared, x, 30), eot_gradient(shared, x, 1))
    singles = torch.stack([eot_gradient(defense, x, 1) for _ in range(60)])
    means = torch.stack([eot_gradient(defense, x, 30) for _ in range(60)])
    ratio = float(singles.var(0).sum() / means.var(0).sum())
    assert 15 < ratio < 60, "thirty independent draws have a thirtieth of the variance"
