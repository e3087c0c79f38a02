"""Deep ensembles and MC-dropout: discrete sites, drawn and enumerated."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import cross_entropy

import probdefense as pd
from probdefense.defenses import bayesian, ensemble, jump_relu, mc_dropout, rse
from probdefense.logits.rules import mean_prob
from probdefense.objectives import adversarial, elbo
from tests.worlds import monte_carlo_tolerance, tiny_batch, tiny_net

K = 3


def members():
    torch.manual_seed(1)
    return [tiny_net().eval() for _ in range(K)]


def rows(nets, x):
    return torch.stack([net(x) for net in nets])


def test_k_draws_are_the_k_members_once_each():
    nets, (x, _) = members(), tiny_batch()
    defense, each = ensemble(nets).eval(), rows(nets, x)
    for logits in (defense(x, K), defense.freeze(K)(x), defense.keyed(5, torch.arange(len(x)), K)(x)):
        orders = [
            order for order in itertools.permutations(range(K)) if torch.allclose(each[list(order)], logits)
        ]
        assert len(orders) == 1
    torch.testing.assert_close(mean_prob(defense(x, 2 * K)), mean_prob(each))
    torch.testing.assert_close(defense.mean()(x)[0], mean_prob(each))


def test_single_draws_are_uniform_over_members():
    nets, x = members(), tiny_batch(1)[0]
    defense, each, draws = ensemble(nets).eval(), rows(nets, x), 600
    with torch.no_grad():
        logits = torch.stack([defense(x)[0] for _ in range(draws)])
        counts = (logits.unsqueeze(1) - each).abs().flatten(2).amax(2).lt(1e-6).double().mean(0)
    assert float(counts.sum()) == pytest.approx(1.0)
    assert float((counts - 1 / K).abs().max()) < monte_carlo_tolerance(math.sqrt(2) / K, draws)


def test_one_step_trains_every_member_on_its_own_likelihood(float64):
    nets, (x, y) = [net.double() for net in members()], tiny_batch()
    x, defense = x.double(), ensemble(members()).double().eval()
    step = defense.step(x, y)
    exact = torch.stack([cross_entropy(net(x), y, reduction="none") for net in nets]).mean(0)
    torch.testing.assert_close(-step.log_lik, exact)
    torch.testing.assert_close(step.logits, mean_prob(rows(nets, x)))
    elbo(defense, x, y).backward()
    exact.mean().backward()
    for net, member in zip(nets, defense.net.members, strict=True):
        for ours, theirs in zip(member.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_enumerated_elbo_is_the_mean_of_pyros_over_members(float64):
    (x, y), defense = tiny_batch(), bayesian(ensemble(members()), num_data=50, init_scale=0.1).double().eval()
    x = x.double()
    weights = {"weights": defense.draw(x)["weights"]}
    step = defense.step(x, y, weights)
    ours = -50 * step.log_lik.mean() + step.kl["weights"]
    theirs = []
    for k in range(K):
        values = weights | {"member": torch.tensor([k])}
        log_lik = poutine.trace(poutine.condition(defense.model, data=values)).get_trace(x, y)
        theirs.append(-log_lik.nodes["y"]["fn"].log_prob(y).sum() * 50 / len(y) + step.kl["weights"])
    torch.testing.assert_close(ours, torch.stack(theirs).mean())


def test_svi_reaches_every_member_over_several_steps():
    defense, (x, y) = ensemble(members(), num_data=50), tiny_batch()
    before = {n: p.detach().clone() for n, p in defense.named_parameters()}
    svi = SVI(defense.model, defense.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(20):
        svi.step(x, y)
    assert not [n for n, p in defense.named_parameters() if torch.equal(before[n], p)]


def test_a_given_member_is_trained_alone():
    defense, (x, y) = ensemble(members()), tiny_batch()
    adversarial(elbo, lambda f, x, y: x, same_draw=True)(defense, x, y).backward()
    trained = [any(p.grad is not None for p in member.parameters()) for member in defense.net.members]
    assert sum(trained) == 1


def test_members_may_differ_in_architecture_and_in_noise():
    small, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), tiny_batch()
    defense = rse(ensemble([tiny_net(), small]), before_linear=True).eval()
    assert {name.split(".")[1] for name in defense.sites if name.startswith("members")} == {"0", "1"}
    logits = defense(x, 200).detach()
    assert logits.shape == (200, 6, 3) and len(torch.unique(logits[:, 0, 0])) == 200, "noise is on in all"
    off = rse(ensemble([tiny_net(), small]), before_linear=True, sigma_init=0.0, sigma_inner=0.0).eval()
    from_small = (off(x, 2).detach() - small(x).detach()).abs().flatten(1).amax(1) < 1e-5
    assert int(from_small.sum()) == 1


def test_it_composes_with_what_comes_after():
    (x, y), nets = tiny_batch(), members()
    for defense in (
        bayesian(ensemble(nets), num_data=50),
        jump_relu(ensemble(nets), kappa=0.05),
        mc_dropout(ensemble(nets), rate=0.3),
    ):
        x_adv = pd.attacks.pgd(defense.samples(K), x, y, eps=0.1, num_steps=2, seed=0)
        assert x_adv.shape == x.shape and torch.isfinite(elbo(defense, x, y))


def test_eot_over_members_climbs_the_mean_of_their_losses():
    nets, (x, y) = members(), tiny_batch()
    point = x.clone().requires_grad_(True)
    loss = torch.stack([cross_entropy(net(point), y, reduction="none") for net in nets]).mean(0).sum()
    (gradient,) = torch.autograd.grad(loss, point)
    x_adv = pd.attacks.fgsm(ensemble(nets).eval().samples(K), x, y, eps=0.05)
    torch.testing.assert_close(x_adv, (x + 0.05 * gradient.sign()).clamp(0, 1))


def test_fit_makes_an_ensemble_better_than_its_members():
    train, test = pd.data.digits()
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)) for _ in range(4)]
    defense = ensemble(nets, num_data=len(train))
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.Adam(defense.parameters(), lr=1e-2)
    pd.fit(defense, loader, epochs=4, optimizer=optimizer, progress=False)
    x, y = test.tensors
    logits = defense(x, 4).detach()
    nll = torch.stack([cross_entropy(row, y) for row in logits])
    whole = cross_entropy(defense.mean()(x)[0], y).detach()
    assert float(nll.max()) < 0.5 and float(whole) < float(nll.mean())
    accuracy = float((defense.mean()(x)[0].argmax(1) == y).float().mean())
    assert accuracy > 0.93


def test_one_network_is_no_ensemble():
    net = tiny_net()
    assert not ensemble([net]).stochastic
    x, _ = tiny_batch()
    torch.testing.assert_close(ensemble([net]).eval()(x)[0], net.eval()(x))


def test_members_with_other_classes_are_named():
    defense = ensemble([nn.Linear(4, 3), nn.Linear(4, 5)])
    with pytest.raises(ValueError, match="members with one number of classes, got"):
        defense(torch.rand(2, 4), 2)
    with pytest.raises(ValueError, match="members with one number of classes, got"):
        for _ in range(20):
            defense(torch.rand(2, 4))


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.drop2d = nn.Conv2d(1, 4, 3), nn.Dropout2d(0.9)
        self.drop, self.head = nn.Dropout(0.9), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.drop(self.drop2d(self.features(x)).flatten(1)))


def test_dropout_by_hand():
    defense = mc_dropout(linear_sum(3), rate=0.75)
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    x = torch.tensor([[0.1, 0.2, 0.3]])
    torch.testing.assert_close(defense.at({"dropout": mask})(x).detach()[0, 0, 0], torch.tensor(1.6))


def linear_sum(size):
    net = nn.Linear(size, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [0.0]]).expand(2, size))
    return net


def test_dropout_has_the_moments_of_its_rate_in_both_modes():
    x, draws = torch.full((1, 1), 0.5), 20_000
    for mode in (True, False):
        defense = mc_dropout(linear_sum(1), rate=0.3).train(mode)
        kept = (defense(x, draws)[:, 0, 0] > 0).double()
        assert abs(float(kept.mean()) - 0.7) < monte_carlo_tolerance(math.sqrt(0.21), draws)
        mean = float(defense(x, draws).detach()[:, 0, 0].double().mean())
        assert abs(mean - 0.5) < monte_carlo_tolerance(0.5 * math.sqrt(0.3 / 0.7), draws)


def test_dropout_modules_become_sites_and_drop_nothing_themselves():
    defense, (x, _) = mc_dropout(WithDropout(), rate=0.5), tiny_batch()
    assert list(defense.sites) == ["drop2d.dropout", "drop.dropout"]
    draws = defense.draw(x)
    assert draws["drop2d.dropout"].shape == (6, 4, 1, 1) and draws["drop.dropout"].shape == (6, 64)
    assert set(torch.cat([value.flatten() for value in draws.values()]).tolist()) == {0.0, 1.0}
    y = torch.zeros(6).long()
    defense.train()
    assert torch.equal(defense.step(x, y, draws).logits, defense.step(x, y, draws).logits)
    kept = {name: torch.ones_like(value) / 2 for name, value in draws.items()}
    net = defense.net
    torch.testing.assert_close(defense.at(kept)(x)[0], net.head(net.features(x).flatten(1)))


def test_masks_come_before_linear_layers_where_there_is_no_dropout():
    assert list(mc_dropout(tiny_net(), rate=0.2).sites) == ["7.dropout"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ensemble([]), "expected at least one network to make an ensemble of, got none"),
        (
            lambda: ensemble([rse(tiny_net())]),
            r"expected plain networks, got Defense; .* rse\(ensemble\(nets\)\)",
        ),
        (lambda: ensemble(["net"]), "expected plain networks, got str"),
        (
            lambda: mc_dropout(tiny_net(), rate=0.0),
            r"expected rate in \(0, 1\), the probability of zero, got 0.0",
        ),
        (lambda: mc_dropout(tiny_net(), rate=1.0), r"expected rate in \(0, 1\)"),
        (lambda: mc_dropout(tiny_net(), rate=-0.5), r"expected rate in \(0, 1\)"),
        (lambda: mc_dropout(nn.Conv2d(1, 1, 3), rate=0.5), "looked for Dropout modules and Linear layers"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
