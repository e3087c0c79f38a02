"""Published protocols, each planted where the right number is known to be lower, are recognized."""

from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.checks import protocol
from probdefense.logits.adapters import Samples, Static
from tests.conftest import trained_on_digits

EPS = 0.12
pgd = partial(pd.attacks.pgd, eps=EPS, num_steps=20)


class Part(nn.Module):
    """What one network sees: some of the pixels."""

    def __init__(self):
        super().__init__()
        self.mask = (torch.rand(64) < 0.4).float()

    def forward(self, x):
        return x.flatten(1) * self.mask


def trained():
    x, y = pd.data.digits()[0].tensors
    net = nn.Sequential(Part(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def members():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = [trained() for _ in range(6)]
    return nets, tuple(part[:150] for part in pd.data.digits()[1].tensors)


@pytest.fixture(scope="module")
def rse():
    return trained_on_digits(
        lambda net: pd.defenses.rse(net, sigma_init=0.4, sigma_inner=0.2, before_linear=True), 100
    )


class Members:
    """Every draw is one of several networks that share few weaknesses; of a batch, or of each of its rows."""

    stochastic = True

    def __init__(self, nets, shared=True):
        self.nets, self.shared = nets, shared

    def __call__(self, x, num_samples=None):
        return torch.stack([self._draw(x) for _ in range(num_samples or 1)])

    def _draw(self, x):
        if self.shared:
            return self.nets[int(torch.randint(len(self.nets), ()))](x)
        chosen = torch.randint(len(self.nets), (len(x),))
        return torch.stack([net(x) for net in self.nets])[chosen, torch.arange(len(x))]

    def freeze(self, num_samples):
        chosen = torch.randint(len(self.nets), (num_samples,)).tolist()
        return Static(lambda x: torch.stack([self.nets[k](x) for k in chosen]))


def mean_verdict(f, points, y, draws=20):
    with torch.no_grad():
        return pd.rules.mean_prob(f(points, draws)).argmax(-1) == y


def honest(f, x, y):
    points = pgd(Samples(f, 4), x, y)
    return points, mean_verdict(f, points, y)


def frozen_draw(f, x, y):
    """RPF, CTRW: one network for the attack, others for the verdict."""
    points = pgd(f.freeze(1), x, y)
    return points, mean_verdict(f, points, y)


def no_gradient(f, x, y):
    with torch.no_grad():
        noise = EPS * (2 * torch.rand_like(x) - 1)
        points = (x + noise).clamp(0, 1)
        f(points)
    return points, mean_verdict(f, points, y)


def lucky_draw(f, x, y):
    """The best of some verdicts, each by one draw."""
    points = pgd(Samples(f, 4), x, y)
    with torch.no_grad():
        return points, (f(points, 12).argmax(-1) == y).any(0)


def any_iterate(f, x, y):
    """An example is lost once one draw of one iterate was wrong."""
    points, right = x, torch.ones(len(x), dtype=torch.bool)
    for _ in range(5):
        points = pd.attacks.fgsm(Samples(f, 1), points, y, eps=EPS / 10)
        with torch.no_grad():
            right &= (f(points, 8).argmax(-1) == y).all(0)
    return points, right


def fixed_seed(f, x, y):
    """The deployed draw is one, and only the attacker does not know it."""
    deployed = f.freeze(1)
    points = pgd(Samples(f, 1), x, y)
    with torch.no_grad():
        return points, deployed(points)[0].argmax(-1) == y


def of(found):
    return {check.name: check.verdict for check in found.fired}


def run(published, defense, data, **options):
    return protocol.run(published, defense, *data, eps=EPS, **options)


def test_an_honest_protocol_fires_nothing(rse, members):
    for defense, data in (rse, (Members(members[0]), members[1])):
        found = run(honest, defense, data)
        assert found.fired == [], found.table()
        assert len({check.name for check in found}) == 6


@pytest.mark.parametrize(
    ("published", "name", "verdict"),
    [
        (frozen_draw, "frozen draw", "attack too weak"),
        (no_gradient, "gradient path", "attack too weak"),
        (lucky_draw, "lucky draw", "fault"),
        (any_iterate, "any iterate", "fault"),
        (fixed_seed, "fixed-seed twin", "attack too weak"),
    ],
)
def test_a_published_protocol_is_recognized(published, name, verdict, members):
    nets, data = members
    found = run(published, Members(nets), data)
    assert of(found).get(name) == verdict, found.table()
    assert found[name].advice and found[name].evidence


def eot_of_copies(f, x, y, copies=10, steps=4):
    """The copies of every image are one batch of the function: one draw, or one each."""
    points = x.clone()
    for _ in range(steps):
        batch = points.repeat(copies, *[1] * (x.dim() - 1)).requires_grad_()
        loss = torch.nn.functional.cross_entropy(f(batch, 1)[0], y.repeat(copies))
        (slope,) = torch.autograd.grad(loss, batch)
        step = EPS / steps * slope.view(copies, *x.shape).sum(0).sign()
        points = (points + step).clamp(0, 1)
    return points, mean_verdict(f, points, y)


@pytest.mark.parametrize("shared", [True, False])
def test_draws_shared_by_copies_are_seen(shared, members):
    nets, data = members
    found = run(eot_of_copies, Members(nets, shared), data)
    check = found["shared noise"]
    assert check.evidence["copies"] == 10 and check.evidence["alike"] == float(shared)
    assert check.fired == shared, found.table()


def test_what_is_no_protocol_is_refused(rse):
    defense, data = rse
    with pytest.raises(ValueError, match=r"returns \(points, correct\), got Tensor"):
        run(lambda f, x, y: x, defense, data)
    with pytest.raises(ValueError, match=r"one verdict per example, shape \(100,\), got \(\)"):
        run(lambda f, x, y: (x, torch.tensor(0.5)), defense, data)
    with pytest.raises(ValueError, match="expected a random defense"):
        run(honest, pd.deterministic(torch.nn.Flatten()), data)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            lambda x: (1 - x, torch.ones(len(x))),
            ValueError,
            "expected points within eps=0.1 of x in the inf norm",
        ),
        (lambda x: (x[:1], torch.ones(len(x))), ValueError, "expected one point per example"),
        (
            lambda x: (x, torch.full((len(x),), 30)),
            ValueError,
            r"expected verdicts in \[0, 1\], got 30 to 30",
        ),
        (
            lambda x: (x, torch.full((len(x),), torch.nan)),
            ValueError,
            r"expected verdicts in \[0, 1\], got nan",
        ),
        (lambda x: (x, None), TypeError, "expected correct as"),
        (lambda x: (x, "all"), TypeError, "expected correct as"),
    ],
)
def test_what_a_protocol_returns_is_looked_at(rse, returned, error, message):
    defense, data = rse
    with pytest.raises(error, match=message):
        pd.checks.protocol.run(lambda f, x, y: returned(x), defense, *data, eps=0.1)
