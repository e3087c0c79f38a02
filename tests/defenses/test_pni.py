"""Parametric noise injection: the forward pass by hand, and what keeps its coefficients up."""

from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.defenses import bayesian, pni, rse
from probdefense.objectives import adversarial, elbo
from tests.worlds import monte_carlo_tolerance, tiny_batch, tiny_net


def linear(weight):
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
    return net


def test_the_forward_pass_by_hand():
    """Weights (1, 3; 1, 3) have standard deviation 1; alpha 0.5 and eta (1, -2; 0, 4)."""
    defense = pni(linear([[1.0, 3.0], [1.0, 3.0]]), alpha_init=0.5)
    eta = torch.tensor([1.0, -2.0, 0.0, 4.0])
    answer = defense.at({"weight_noise": eta})(torch.tensor([[1.0, 1.0]])).detach()
    torch.testing.assert_close(answer, torch.tensor([[[1.5 + 2.0, 1.0 + 5.0]]]))


@pytest.mark.parametrize(("place", "answer"), [("input", [[[6.0, 3.0]]]), ("output", [[[4.5, 3.0]]])])
def test_noise_on_activations_by_hand(place, answer):
    """Input (0.2, 0.6) has deviation 0.2, output (5, 3) deviation 1; eta (1, 0) and (-1, 0) times 0.5."""
    net = linear([[10.0, 5.0], [0.0, 5.0]])
    defense = pni(net, alpha_init=0.5, place=place)
    eta = torch.tensor([[1.0 if place == "input" else -1.0, 0.0]])
    given = defense.at({"pni": eta})(torch.tensor([[0.2, 0.6]])).detach()
    torch.testing.assert_close(given, torch.tensor(answer))


def test_the_deviation_of_the_weight_is_a_constant_of_the_gradient():
    net = linear([[1.0, 3.0], [1.0, 3.0]])
    defense, x = pni(net, alpha_init=0.5), torch.tensor([[1.0, 1.0]])
    defense.at({"weight_noise": torch.tensor([1.0, -2.0, 0.0, 4.0])})(x).sum().backward()
    torch.testing.assert_close(defense.net.weight.grad, torch.ones(2, 2))
    torch.testing.assert_close(defense.net.weight_noise.alpha.grad, torch.tensor(3.0))  # sum of eta x


def test_noise_on_activations_does_not_depend_on_the_batch_and_shows_its_whole_gradient(float64):
    defense, (x, _) = pni(tiny_net().double(), place="input").eval(), tiny_batch()
    x = x.double()
    frozen = defense.freeze(2)
    torch.testing.assert_close(frozen(x)[:, 1:3], frozen(x[1:3]))
    assert torch.autograd.gradcheck(
        lambda point: frozen(point), x[:2].requires_grad_(True), eps=1e-6, atol=1e-6
    )


def test_draws_have_the_standard_deviation_of_the_paper():
    weight = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    defense, draws = pni(linear_of(weight), alpha_init=0.3), 20_000
    with torch.no_grad():
        logits = defense(torch.eye(50)[:1], draws)[:, 0].double()
    exact = 0.3 * float(weight.std(correction=0))
    for column in range(2):
        relative = float(logits[:, column].std()) / exact - 1
        assert abs(relative) < monte_carlo_tolerance(2**-0.5, draws)


def linear_of(weight):
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        net.weight.copy_(weight)
    return net


@pytest.mark.parametrize(
    ("scale_shape", "shapes"),
    [
        ("scalar", [(), (), ()]),
        ("channel", [(3, 1, 1, 1), (4, 1, 1, 1), (3, 1)]),
        ("element", [(3, 1, 3, 3), (4, 3, 3, 3), (3, 16)]),
    ],
)
def test_coefficients_have_their_shapes_and_no_weight_decay(scale_shape, shapes):
    defense = pni(tiny_net(), scale_shape=scale_shape)
    alphas = {n: p for n, p in defense.named_parameters() if n.endswith("alpha")}
    assert [tuple(p.shape) for p in alphas.values()] == shapes
    decayed, spared = defense.param_groups(weight_decay=0.1)
    assert {id(p) for p in spared["params"]} == {id(p) for p in alphas.values()}
    assert len(decayed["params"]) == len(list(tiny_net().parameters()))


def test_activations_of_channels():
    shapes = {
        place: [
            tuple(p.shape)
            for n, p in pni(tiny_net(), place=place, scale_shape="channel").named_parameters()
            if "alpha" in n
        ]
        for place in ("input", "output")
    }
    assert shapes == {
        "input": [(1, 1, 1), (3, 1, 1), (16,)],
        "output": [(3, 1, 1), (4, 1, 1), (3,)],
    }


def test_tied_weights_get_one_noise():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    for host in (Tied(), bayesian(Tied())):
        defense = pni(host)
        site = defense.sites["weight_noise"]
        assert site.names == (("a.weight", "b.weight"),) and site.size == 9
        values = {"weight_noise": torch.randn(9)} | (
            {"weights": torch.randn(9)} if len(defense.sites) > 1 else {}
        )
        filled = defense.model.fill(torch.rand(1, 3), values)
        assert torch.equal(filled["a.weight"], filled["b.weight"])


def test_noise_is_in_proportion_to_weights_that_another_site_draws():
    x, eta, weights = (
        torch.tensor([[1.0, 1.0]]),
        torch.tensor([1.0, -2.0, 0.0, 4.0]),
        torch.tensor([2.0, 6.0, 2.0, 6.0]),
    )
    for defense in (
        pni(bayesian(linear([[0.0, 0.0], [0.0, 0.0]])), alpha_init=0.5),
        bayesian(pni(linear([[0.0, 0.0], [0.0, 0.0]]), alpha_init=0.5)),
    ):
        answer = defense.at({"weight_noise": eta, "weights": weights})(x).detach()
        torch.testing.assert_close(answer, torch.tensor([[[8.0 - 1.0, 8.0 + 4.0]]]))


def test_it_can_be_applied_twice_and_with_activation_noise():
    x, _ = tiny_batch()
    defense = pni(pni(tiny_net()))
    assert list(defense.sites) == ["weight_noise", "weight_noise_1"] and defense(x, 2).shape == (2, 6, 3)
    mixed = rse(pni(tiny_net()))
    assert set(mixed.sites) == {"weight_noise", "input_noise", "4.noise"} and mixed.input_noise is not None


def test_noise_stays_on_in_eval():
    """The published RSE master and what attacked it had noise only in training."""
    x, _ = tiny_batch()
    for place in ("weight", "input", "output"):
        defense = pni(tiny_net(), place=place).eval()
        assert not torch.equal(defense(x), defense(x))


def test_relative_noise_on_pixels_is_no_ground_for_a_certificate():
    net = nn.Sequential(nn.Linear(4, 3))
    assert pni(net, place="input").input_noise is None


def trained_alpha(objective):
    torch.manual_seed(0)
    x, y = (t[:256] for t in pd.data.digits().train.tensors)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    defense = pni(net)
    optimizer = torch.optim.SGD(defense.param_groups(), lr=0.1, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        objective(defense, x, y).backward()
        optimizer.step()
    return max(float(p.detach().abs()) for n, p in defense.named_parameters() if "alpha" in n)


def test_coefficients_collapse_under_the_likelihood_and_stay_up_under_a_strong_attack():
    """From 0.25. The weaker the attack, the less it holds them."""
    strong = adversarial(elbo, partial(pd.attacks.pgd, eps=0.3, num_steps=3))
    assert trained_alpha(elbo) < 0.05
    assert trained_alpha(strong) > 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pni(nn.Flatten()),
            "found nothing to add noise to in Flatten; looked for Conv1d, .* Linear",
        ),
        (lambda: pni(tiny_net(), alpha_init=0.0), "expected alpha_init > 0"),
        (lambda: pni(tiny_net(), place="bias"), "unknown place 'bias'"),
        (lambda: pni(tiny_net(), scale_shape="row"), "unknown scale_shape 'row'"),
        (lambda: pni(tiny_net(), place="input", scale_shape="element"), "is for weights"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
