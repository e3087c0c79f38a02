"""Defenses are cells of one table: any builder on any other, trained by any objective."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.defenses import bayesian, brelu, jump_relu, mc_dropout, pni, rse
from probdefense.evaluation.certification import certify
from probdefense.objectives import adversarial, elbo, mixed
from tests.worlds import tiny_batch, tiny_net


def test_noise_weights_and_jumps_train_adversarially_together():
    """RSE noise + random weights + JumpReLU under adversarial SVI, then attacked through all of it."""
    train, test = pd.data.digits()
    torch.manual_seed(0)
    net = pd.models.small_cnn(width=8)
    defense = jump_relu(bayesian(rse(net, sigma_init=0.1), num_data=len(train), init_scale=0.01), kappa=0.02)
    assert set(defense.sites) == {"weights", "input_noise", "2.noise"}
    attack = partial(pd.attacks.pgd, eps=0.1, num_steps=2)
    before = {name: p.detach().clone() for name, p in defense.named_parameters()}
    pd.fit(
        defense,
        DataLoader(train, batch_size=128, shuffle=True),
        epochs=4,
        objective=partial(adversarial(elbo, attack), kl_weight=0.05),
        optimizer=torch.optim.Adam(defense.param_groups(), lr=1e-2),
        progress=False,
    )
    assert not [n for n, p in defense.named_parameters() if torch.equal(p, before[n])]
    x, y = (t[:100] for t in test.tensors)
    defense.eval()
    report = pd.evaluate(
        defense, (x, y), {"pgd": partial(pd.attacks.pgd, num_steps=3)}, eps=0.1, num_samples=10
    )
    rows = {(row["attack"], row["rule"]): row["accuracy"] for row in report.rows}
    clean, robust = rows["clean", "mean_prob"], rows["pgd", "mean_prob"]
    assert clean > 0.7 and robust < clean
    family, scale = defense.input_noise
    assert family == "normal" and float(scale) == pytest.approx(0.1)
    radius = certify(defense, x[:20], n0=20, n=100, seed=0).radius
    assert float(radius.max()) > 0.05 and float(radius.min()) >= 0


ORDERS = {
    "jump on pni on rse": lambda net: jump_relu(pni(rse(net)), kappa=0.02),
    "rse on jump on bayesian": lambda net: rse(jump_relu(bayesian(net, num_data=50), kappa=0.02)),
    "dropout on random jump on rse": lambda net: mc_dropout(
        jump_relu(rse(net), kappa=dist.Uniform(0.0, 0.05)), rate=0.2
    ),
    "learned jump on bounded": lambda net: jump_relu(brelu(net), kappa=dist.Normal(0.02, 0.01), learned=True),
    "bayesian on learned jump": lambda net: bayesian(
        jump_relu(net, kappa=dist.Normal(0.02, 0.01), learned=True), num_data=50
    ),
    "pni on dropout on bayesian": lambda net: pni(mc_dropout(bayesian(net, num_data=50), rate=0.2)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_freezes_trains_and_answers_attacks(order):
    defense, (x, y) = ORDERS[order](tiny_net()), tiny_batch()
    attack = partial(pd.attacks.pgd, eps=0.1, num_steps=2)
    mixed(elbo, attack, weight=0.5)(defense, x, y).backward()
    assert not [
        n for n, p in defense.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    frozen = defense.eval().freeze(3)
    torch.testing.assert_close(frozen(x)[:, 2:4], frozen(x[2:4]), rtol=1e-5, atol=1e-5)
    x_adv = attack(defense.samples(4), x, y, seed=0)
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    fresh = ORDERS[order](tiny_net())
    fresh.load_state_dict(defense.state_dict())
    a, b = (d.eval().freeze(2, torch.Generator().manual_seed(0))(x) for d in (defense, fresh))
    assert torch.equal(a, b)


def test_a_learned_threshold_gets_no_prior_and_no_decay():
    defense = bayesian(jump_relu(tiny_net(), kappa=dist.Normal(0.1, 0.05), learned=True), num_data=50)
    assert {n for n, _ in defense.net.named_parameters() if "jump" in n} == {
        f"{path}.jump.{name}" for path in ("3", "5") for name in ("loc", "log_scale")
    }


@pytest.mark.parametrize(
    ("build", "shape", "count", "convolutions"),
    [
        (pd.models.lenet, (1, 28, 28), 260 + 5020 + 38520 + 10890 + 910, 2),
        (pd.models.resnet20, (3, 32, 32), 269_722, 19),
        (pd.models.vgg16, (3, 32, 32), 14_728_266, 13),
        (pd.models.model_a, (3, 96, 96), 896 + 18_496 + 73_856 + 147_584 + 295_168 + 590_080 + 2_570, 6),
    ],
)
def test_the_networks_of_the_papers_have_their_sizes(build, shape, count, convolutions):
    net = build().eval()
    assert sum(p.numel() for p in net.parameters()) == count
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == convolutions
    with torch.no_grad():
        assert net(torch.rand(2, *shape)).shape == (2, 10)


def test_the_residual_network_takes_every_builder():
    net, x = pd.models.resnet20(), torch.rand(2, 3, 32, 32)
    sizes = {
        "rse": (rse(net), 19),
        "jump": (jump_relu(net, kappa=dist.Uniform(0.0, 0.1)), 19),
        "pni": (pni(net), 1),
    }
    for defense, count in sizes.values():
        assert len(defense.draw(x)) == count
        assert defense.eval()(x, 2).shape == (2, 2, 10)
