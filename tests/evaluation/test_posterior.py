"""Certificates of Bayesian networks: exact where a layer is alone, sound on sampled weights and inputs."""

import math
import os
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.func import functional_call

import probdefense as pd
from probdefense.evaluation.ballots import clopper_pearson_low
from probdefense.evaluation.bounds import Box, Uncertain, layers_of, through
from probdefense.evaluation.posterior import _by_boxes, _independent
from tests.worlds import FAILURE_RATE, tiny_net

DATA = Path(os.environ.get("PROBDEFENSE_DATA", "."))


def seeded(net, scale=1.0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    return net


def dense():
    return seeded(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), 3.0)


def convolving():
    layers = (
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2, stride=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
    )
    return seeded(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)), 3.0)


NETS = {"dense": (dense, (6,)), "convolving": (convolving, (1, 4, 4))}


def inputs(shape, count=200):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def sampled(defense, count):
    """Networks of sampled weights, as functions."""
    (site,) = defense.sites.values()
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        draw = site.fill(site.draw((site.size,), generator).detach(), defense.net)
        yield lambda x, draw=draw: functional_call(defense.net, draw, (x,))


def holds(function, x, label, eps, steps=3):
    """Whether a network keeps the label at the points that sign steps find in the ball."""
    rows, low, high = torch.arange(len(x)), (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    point, kept = x.clone(), torch.ones(len(x), dtype=torch.bool)
    for _ in range(steps):
        point = point.detach().requires_grad_()
        logits = function(point)
        others = logits.clone()
        others[rows, label] = -torch.inf
        margin = logits[rows, label] - others.amax(1)
        kept &= margin > 0
        (gradient,) = torch.autograd.grad(margin.sum(), point)
        point = (point - eps * gradient.sign()).maximum(low).minimum(high)
    with torch.no_grad():
        return kept & (function(point).argmax(1) == label)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.003, 0.05])
@pytest.mark.parametrize("name", NETS)
def test_no_attacked_image_falls_below_its_bound(name, scale):
    make, shape = NETS[name]
    defense, x, eps, draws = pd.defenses.bayesian(make(), init_scale=scale), inputs(shape), 0.01, 80
    found = pd.certify_posterior(defense, x, eps=eps, num_boxes=2)
    held = sum(holds(function, x, found.label, eps).double() for function in sampled(defense, draws))
    most = 1 - clopper_pearson_low(draws - held.numpy(), draws, FAILURE_RATE / 200)
    for values in (found.boxes, found.tails):
        assert bool((values.numpy() <= most).all()) and bool(((values >= 0) & (values <= 1)).all())
        assert scale > 0.01 or float((values > 0.5).double().mean()) > 0.5, "a bound has to say something"


def test_bounds_are_not_far_from_the_truth_where_weights_spread():
    defense, x = pd.defenses.bayesian(dense(), init_scale=0.03), inputs((6,), 80)
    found = pd.certify_posterior(defense, x, eps=0.01)
    held = sum(holds(f, x, found.label, 0.01).double() for f in sampled(defense, 40)) / 40
    assert float(found.tails.mean()) > float(held.mean()) - 0.35
    assert float((held < 0.9).double().mean()) > 0.05, "weights that change the class are among them"


def test_of_a_linear_classifier_at_a_point_the_bound_is_the_probability():
    """The margin is normal: mean M x + b, variance of two rows of weights at x."""
    net = seeded(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), 0.5)
    defense, x = pd.defenses.bayesian(net, init_scale=0.2), inputs((4,), 20)
    found = pd.certify_posterior(defense, x, eps=0.0)
    margin = net(x).detach().double().diff(dim=1).abs().squeeze(1)
    deviation = float(torch.tensor(0.2)) * (2 * (x.double().square().sum(1) + 1)).sqrt()
    exact = torch.special.ndtr(margin / deviation)
    torch.testing.assert_close(found.tails, exact, rtol=1e-6, atol=1e-6)
    assert bool((found.tails <= exact + 1e-6).all()) and bool((found.boxes <= exact).all())


def test_one_random_weight_has_the_mass_of_its_interval():
    """The margin is w - 1/2 at x = 1: it holds for w > 1/2, which two disjoint boxes cover."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
        net[1].bias.copy_(torch.tensor([0.0, 0.5]))
    moving = {"1.weight": Uncertain(net[1].weight.detach().double(), torch.tensor([[0.25], [0.0]]).double())}
    layers, point = layers_of(net, moving), Box(torch.ones(1, 1).double(), torch.ones(1, 1).double())
    one, two = (_by_boxes(layers, point, 0, count) for count in (1, 2))
    normal = dist.Normal(0.0, 1.0)
    exact = float(normal.cdf(torch.tensor(2.0)))
    assert one == pytest.approx(2 * exact - 1, abs=1e-4) and one < 2 * exact - 1
    assert two == pytest.approx(exact, abs=1e-4) and two < exact


def test_an_output_leaves_its_tails_as_rarely_as_stated():
    """The largest output over the box of inputs, for 50,000 draws of six weights and a bias."""
    generator = torch.Generator().manual_seed(4)
    mean, deviation, middle, half = (torch.rand(6, generator=generator).double() for _ in range(4))
    mean, half = mean - 0.5, 0.3 * half
    parts = {
        "0.weight": Uncertain(mean[None], deviation[None]),
        "0.bias": Uncertain(torch.zeros(1), torch.ones(1)),
    }
    parts = {name: Uncertain(*(value.double() for value in part)) for name, part in parts.items()}
    layer = layers_of(nn.Sequential(nn.Linear(6, 1)), parts)
    weights = mean + deviation * torch.randn(50_000, 6, generator=generator).double()
    bias = torch.randn(50_000, generator=generator).double()
    highest = weights @ middle + weights.abs() @ half + bias
    lowest = weights @ middle - weights.abs() @ half + bias
    for reach in (0.5, 1.0, 2.0, 3.0):
        bounds = through(layer, Box((middle - half)[None], (middle + half)[None]), reach)
        tail = float(torch.special.ndtr(torch.tensor(-reach)))
        allowed = tail + 4.3 * math.sqrt(tail * (1 - tail) / 50_000)
        for outside in (highest > bounds.high, lowest < bounds.low):
            assert (
                allowed / 6 < float(outside.double().mean()) + 1e-3
                and float(outside.double().mean()) < allowed
            )


@pytest.mark.parametrize("name", NETS)
def test_outputs_of_weights_and_inputs_in_boxes_are_within_bounds(name):
    make, shape = NETS[name]
    net, x, generator = make(), inputs(shape, 1), torch.Generator().manual_seed(2)
    parts = {
        n: Uncertain(p.detach().double(), torch.full_like(p, 0.05).double())
        for n, p in net.named_parameters()
    }
    box = Box(x.double() - 0.02, x.double() + 0.02)
    bounds, width = through(layers_of(net, parts), box), 0.0
    for _ in range(300):
        corners = {
            n: (2 * torch.randint(2, p.shape, generator=generator) - 1) for n, p in net.named_parameters()
        }
        moved = {n: part.center + part.spread * corners[n] for n, part in parts.items()}
        point = x.double() + 0.02 * (2 * torch.randint(2, x.shape, generator=generator) - 1)
        out = functional_call(net.double(), moved, (point,))
        assert bool((out >= bounds.low).all()) and bool((out <= bounds.high).all())
        width = max(width, float((out - (bounds.low + bounds.high) / 2).abs().max()))
    assert width > 0.1 * float((bounds.high - bounds.low).max()) / 2


def test_networks_of_known_layers_are_themselves_at_a_point():
    net = nn.Sequential(
        pd.nn.Normalize([0.3, 0.4], [0.5, 0.2]),
        nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)),
        *(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3)),
    )
    with torch.no_grad():
        net[1][1].running_mean.uniform_(-1, 1)
        net[1][1].weight.uniform_(-1, 1)
    x = torch.rand(5, 2, 8, 8)
    out = through(layers_of(net.eval(), {}), Box(x.double(), x.double()))
    wanted = net.double()(x.double())
    for end in out:
        torch.testing.assert_close(end, wanted, rtol=0, atol=1e-10)
    assert bool((out.low <= wanted).all()) and bool((out.high >= wanted).all())


def test_a_tie_is_not_certified():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    x = inputs((4,), 3)
    found = pd.certify_posterior(pd.defenses.bayesian(net, init_scale=1e-3), x, eps=0.0)
    assert float(found.boxes.max()) == 0.0 and float(found.tails.max()) <= 0.5
    assert not bool(found.certified.any())


def test_a_mode_of_training_changes_no_bound():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    defense, x = pd.defenses.bayesian(seeded(net), init_scale=1e-3), inputs((4,), 5)
    still, moving = (pd.certify_posterior(d, x, eps=0.01) for d in (defense.eval(), defense.train()))
    assert torch.equal(still.probability, moving.probability) and torch.equal(still.label, moving.label)


def test_the_vote_of_a_certified_image_is_its_label():
    defense, x = pd.defenses.bayesian(dense(), init_scale=0.05), inputs((6,), 60)
    found = pd.certify_posterior(defense, x, eps=0.01)
    assert 10 < int(found.certified.sum()) < 60
    moved = (x + 0.01 * (2 * torch.randint(2, x.shape) - 1)).clamp(0, 1)
    votes = pd.rules.vote(defense(moved, 400)).argmax(1)
    assert bool((votes == found.label)[found.certified & (found.probability > 0.7)].all())


def test_the_table_says_what_it_is_about():
    defense, x = pd.defenses.bayesian(dense(), init_scale=0.05), inputs((6,), 40)
    found = pd.certify_posterior(defense, x, eps=0.01)
    row = found.accuracy(found.label)
    assert row["accuracy"] == pytest.approx(float(found.certified.double().mean()))
    assert row["low"] < row["accuracy"] < row["high"]
    text = found.table(found.label)
    assert "infinite vote of the posterior on l-inf balls of 0.01 px" in text and "; 0 for " in text
    assert torch.equal(found.probability, found.boxes.maximum(found.tails))


class Tied(nn.Module):
    def forward(self, x):
        return x * x


REFUSED = {
    "nothing random": (
        lambda: pd.deterministic(dense()),
        TypeError,
        "expected a Defense with random weights",
    ),
    "a network": (dense, TypeError, "expected a Defense with random weights"),
    "local sites": (
        lambda: pd.defenses.rse(dense(), before_linear=True),
        ValueError,
        "at site 'input_noise'",
    ),
    "noise beside": (
        lambda: pd.defenses.bayesian(pd.defenses.rse(dense(), before_linear=True)),
        ValueError,
        "nothing else random",
    ),
    "members": (lambda: pd.defenses.ensemble([dense(), dense()]), ValueError, "at site 'member'"),
    "noise on weights": (lambda: pd.defenses.pni(dense()), ValueError, "at site 'weight_noise'"),
    "another family": (
        lambda: pd.defenses.bayesian(dense(), family=dist.Laplace),
        ValueError,
        "normal weights",
    ),
    "another layer": (
        lambda: pd.defenses.bayesian(nn.Sequential(nn.Linear(6, 6), Tied(), nn.Linear(6, 3))),
        ValueError,
        "found Tied at '1'; its bounds are not known",
    ),
    "another end": (
        lambda: pd.defenses.bayesian(nn.Sequential(nn.Linear(6, 3), nn.ReLU())),
        ValueError,
        "ends in a Linear layer",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_bound_is_refused(what):
    make, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        pd.certify_posterior(make(), inputs((6,), 2), eps=0.01)


def test_a_hook_of_somebody_else_is_refused():
    net = dense()
    defense = pd.defenses.bayesian(net)
    defense.net[1].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="without hooks, found one at '1'"):
        pd.certify_posterior(defense, inputs((6,), 2), eps=0.01)


def test_some_parameters_may_stand_still():
    defense = pd.defenses.bayesian(tiny_net_without_padding(), where=lambda name, _: name.startswith("4."))
    assert set(_independent(defense)) == {"4.weight", "4.bias"}
    found = pd.certify_posterior(defense, inputs((1, 6, 6), 4), eps=0.001)
    assert found.probability.shape == (4,)


def tiny_net_without_padding():
    return tiny_net().eval()


def public_posterior(name):
    """A posterior that nobody here trained, as a defense."""
    kept = np.load(DATA / "weights" / "deepbayes" / f"{name}_mnist_posterior.npz")
    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    means, variances = (
        [torch.tensor(kept[f"{kind}{i}"].T.copy()) for i in range(4)] for kind in ("mean", "var")
    )
    with torch.no_grad():
        for parameter, mean in zip(net.parameters(), means, strict=True):
            parameter.copy_(mean)
        defense = pd.defenses.bayesian(net)
        flat = torch.cat([variance.flatten() for variance in variances])
        defense.guide.posteriors["weights"].log_scale.copy_(flat.sqrt().log())
    return defense


def mnist(count):
    x, y = (part[:count] for part in pd.data.load("mnist", DATA).test.tensors)
    return x.flatten(1), y


@pytest.mark.skipif(
    not (DATA / "weights" / "deepbayes").is_dir(), reason="the public posteriors are not here"
)
@pytest.mark.parametrize("name", ["robust", "vogn"])
def test_public_posteriors_have_bounds_that_hold(name):
    defense, (x, y) = public_posterior(name), mnist(12)
    found = pd.certify_posterior(defense, x, eps=0.005, num_boxes=2)
    assert float((found.label == y).double().mean()) > 0.7
    assert float(found.certified.double().mean()) > 0.5 and float(found.boxes.max()) < 0.01
    held = sum(holds(f, x, found.label, 0.005).double() for f in sampled(defense, 40))
    most = 1 - clopper_pearson_low(40 - held.numpy(), 40, FAILURE_RATE / 12)
    assert bool((found.probability.numpy() <= most).all())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_gradients_change_nothing(mode):
    defense = pd.defenses.bayesian(torch.nn.Linear(4, 3), init_scale=0.01)
    x = torch.rand(3, 4)
    wanted = pd.certify_posterior(defense, x, eps=0.01)
    with mode():
        found = pd.certify_posterior(defense, x.clone(), eps=0.01)
    assert torch.equal(found.boxes, wanted.boxes) and torch.equal(found.tails, wanted.tails)
