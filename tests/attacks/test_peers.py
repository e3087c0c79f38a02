"""Side by side with foolbox and pyautoattack, on models without randomness, at the same number of steps."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

import probdefense as pd
from probdefense.attacks import apgd, cw, ddn, fmn
from probdefense.logits.losses import dlr
from probdefense.ops import lp_norm

foolbox = pytest.importorskip("foolbox")
pyautoattack = pytest.importorskip("pyautoattack")

pytestmark = pytest.mark.slow

STEPS = 60

FOOLBOX: dict[str, Callable] = {
    "ddn": partial(foolbox.attacks.DDNAttack, steps=STEPS),
    "fmn": partial(foolbox.attacks.L2FMNAttack, steps=STEPS),
    "cw": partial(foolbox.attacks.L2CarliniWagnerAttack, steps=STEPS, binary_search_steps=6, stepsize=0.1),
}
OURS = {
    "ddn": partial(ddn, num_steps=STEPS),
    "fmn": partial(fmn, num_steps=STEPS),
    "cw": partial(cw, num_steps=STEPS, num_searches=6),
}


@pytest.fixture(scope="module", params=["plain", "frozen"])
def still(request, digits_net, digits_rse):
    """A function without randomness as we see it and as a plain module, and 150 images it gets right."""
    if request.param == "plain":
        defense = pd.deterministic(digits_net[0])
    else:
        defense = digits_rse[0].freeze(4, torch.Generator().manual_seed(0))
    x, y = pd.data.digits()[1].tensors
    right = (pd.rules.mean_prob(defense(x)).argmax(-1) == y).nonzero().flatten()[:150]

    class Module(torch.nn.Module):
        def forward(self, x):
            return pd.rules.mean_prob(defense(x))

    return defense, Module().eval(), x[right], y[right]


def median_distance(module, x, x_adv, y):
    wrong = module(x_adv).argmax(1) != y
    return float(torch.where(wrong, lp_norm(x_adv - x, 2), math.inf).median())


@pytest.fixture(scope="module")
def peers(still):
    """Median L2 distances of foolbox's attacks on 40 of the images."""
    _, module, x, y = still
    x, y = x[:40], y[:40]
    peer = foolbox.PyTorchModel(module, bounds=(0, 1))
    found = {}
    for name, make in FOOLBOX.items():
        _, clipped, _ = make()(peer, x, y, epsilons=None)
        found[name] = median_distance(module, x, clipped, y)
    return found


@pytest.mark.parametrize("name", OURS)
def test_median_distance_beside_foolbox(name, still, peers):
    """DDN and FMN beside the best of foolbox; C&W, whose objective ends 5 % farther, beside its own kind."""
    defense, module, x, y = still
    x, y = x[:40], y[:40]
    ours = median_distance(module, x, OURS[name](defense, x, y, seed=0), y)
    best = peers["cw"] if name == "cw" else min(peers.values())
    assert ours <= 1.02 * best, (ours, peers)
    assert ours > 0.5 * best, "too good to be true"


def test_l1_distances_where_foolbox_finds_a_point(still):
    """Its box cuts off what its ball has found, so that it misses many; where it does not, ours is as near."""
    defense, module, x, y = still
    x, y = x[:60], y[:60]
    _, theirs, _ = foolbox.attacks.L1FMNAttack(steps=STEPS)(
        foolbox.PyTorchModel(module, bounds=(0, 1)), x, y, epsilons=None
    )
    ours = fmn(defense, x, y, norm=1, num_steps=STEPS, seed=0)
    found = module(theirs).argmax(1) != y
    assert bool((module(ours).argmax(1) != y).all()) and float(found.double().mean()) > 0.3
    ratio = lp_norm(ours - x, 1)[found] / lp_norm(theirs - x, 1)[found]
    assert 0.9 < float(ratio.mean()) <= 1.01


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.08), ("L2", 0.4), ("L1", 1.2)])
def test_apgd_leaves_no_more_than_pyautoattack(loss, norm, eps, still):
    """Both from two random starts."""
    defense, module, x, y = still
    p = {"Linf": math.inf, "L2": 2, "L1": 1}[norm]

    def climbed(logits, y):
        """Their losses see one answer, the mean probability, and so must ours."""
        decided = pd.rules.mean_prob(logits).unsqueeze(0)
        return dlr(decided, y) if loss == "dlr" else pd.losses.expected_cross_entropy(decided, y)

    def theirs(seed):
        peer = pyautoattack.AutoAttack(
            module, norm=norm, eps=eps, version="custom", attacks=[f"apgd-{loss}"], seed=seed
        )
        peer.apgd.n_iter, peer.apgd.n_restarts = STEPS, 1
        return peer.run_standard_evaluation(x, y, batch_size=len(x))[0]

    def left(find):
        points = [find(seed) for seed in range(2)]
        return sum(float((module(one).argmax(1) == y).float().mean()) for one in points) / 2

    ours = left(lambda seed: apgd(defense, x, y, eps=eps, norm=p, num_steps=STEPS, loss=climbed, seed=seed))
    assert 0 < ours <= left(theirs) + 0.01
