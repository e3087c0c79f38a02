"""What every attack does with answers that are not finite, other dtypes, gradient modes and in-place networks."""

from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks.tools.diagnostics import gradient_signal
from probdefense.ops import lp_norm
from tests.contract import FIXED_BUDGET, MIN_NORM, defended
from tests.worlds import tiny_batch, tiny_net

ATTACKS = {
    **{name: partial(one, eps=0.1) for name, one in FIXED_BUDGET.items() if name != "suite"},
    **MIN_NORM,
    "suite": partial(pd.attacks.suite, eps=0.1, budget=210),
    "substitute": partial(pd.attacks.substitute, eps=0.1, num_rounds=1, num_epochs=1),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


class Changed(nn.Module):
    """A network whose logits, or their rows, are changed."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net(x))


def changed(change, net=None):
    return pd.deterministic(Changed(tiny_net().eval() if net is None else net, change))


def at(row, column, value):
    """Puts a value at one place of the batch of six, however often it is repeated."""

    def change(logits):
        place = torch.zeros(6, logits.shape[1], dtype=torch.bool)
        place[row, column] = True
        return logits.masked_fill(place.repeat(len(logits) // 6 + 1, 1)[: len(logits)], value)

    return change


@every_attack
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused_with_their_examples(name, value):
    with pytest.raises(FloatingPointError, match=r"NaN or infinite logits in .* for 1 of 6 examples, \[4\]"):
        ATTACKS[name](changed(at(4, 1, value)), *tiny_batch(), seed=0)


@every_attack
def test_an_example_without_any_class_is_refused(name):
    everything = at(2, slice(None), -torch.inf)
    with pytest.raises(FloatingPointError, match=r"for 1 of 6 examples, \[2\].*though not for all"):
        ATTACKS[name](changed(everything), *tiny_batch(), seed=0)


def test_the_examples_are_named_by_their_place_in_the_whole_batch():
    defense, (x, y) = changed(lambda logits: logits), tiny_batch()
    asked = []

    def third_chunk(points):
        asked.append(len(points))
        return defense(points) * (torch.nan if len(asked) == 3 else 1.0)

    with pytest.raises(FloatingPointError, match=r"in fgsm for 2 of 2 examples, \[4, 5\]"):
        pd.attacks.fgsm(third_chunk, x, y, eps=0.1, max_batch=2)


def test_the_signal_of_a_gradient_refuses_them_too():
    with pytest.raises(FloatingPointError, match="in gradient_signal for 6 of 6 examples"):
        gradient_signal(changed(lambda z: z * torch.nan), *tiny_batch())


@every_attack
def test_a_class_that_is_ruled_out_is_a_class_that_is_not_there(name):
    net, (x, y) = tiny_net().eval().double(), tiny_batch()
    x = x.double()

    def widened(logits):
        return torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], dim=1)

    plain = ATTACKS[name](pd.deterministic(net), x, y, seed=1)
    if name == "substitute":
        return  # whose own network has one output more
    torch.testing.assert_close(ATTACKS[name](changed(widened, net), x, y, seed=1), plain, rtol=0, atol=1e-6)


def ruling_out(*classes):
    return changed(lambda logits: logits.index_fill(1, torch.tensor(classes), -torch.inf))


@every_attack
@pytest.mark.parametrize("missing", [[0], [1, 2], [2]], ids=["the true one", "all rivals", "one rival"])
def test_classes_that_are_ruled_out_trouble_no_attack(name, missing):
    (x, _), y = tiny_batch(), torch.zeros(6).long()
    x_adv = ATTACKS[name](ruling_out(*missing), x, y, seed=0)
    assert bool(torch.isfinite(x_adv).all())
    if name in MIN_NORM and missing == [0]:
        assert float(lp_norm(x_adv - x, 2).max()) < 1e-2, "wrong already"
    if name in MIN_NORM and missing == [1, 2]:
        assert torch.equal(x_adv, x), "nothing can be wrong"


@pytest.mark.parametrize("loss", ["expected_cross_entropy", "predictive_log_odds", "dlr", "vote_margin"])
@pytest.mark.parametrize("name", ["pgd", "apgd", "fmn", "nes"])
@pytest.mark.parametrize("target", [None, torch.ones(6).long()], ids=["untargeted", "targeted"])
def test_classes_that_are_ruled_out_trouble_no_loss(name, loss, target):
    (x, _), y = tiny_batch(), torch.zeros(6).long()
    for missing in ([0], [1], [1, 2], [0, 1]):
        options = {"loss": getattr(pd.losses, loss), "target": target, "seed": 0}
        assert bool(torch.isfinite(ATTACKS[name](ruling_out(*missing), x, y, **options)).all())


@every_attack
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_less_precision_are_attacked_in_their_dtype(name, dtype):
    defense, (x, y) = pd.deterministic(tiny_net().eval()), tiny_batch()
    low = pd.deterministic(tiny_net().eval())
    low.load_state_dict(defense.state_dict())
    low.to(dtype)
    x = x.to(dtype)
    x_adv = ATTACKS[name](low, x, y, seed=0)
    assert x_adv.dtype == dtype and bool(torch.isfinite(x_adv).all())
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    if name not in MIN_NORM:
        assert float((x_adv - x).abs().max()) <= 0.1 + torch.finfo(dtype).eps


def test_restarts_and_selection_under_autocast():
    defense, (x, y) = pd.deterministic(tiny_net().eval()), tiny_batch()
    for attack in (partial(pd.attacks.pgd, num_restarts=3), ATTACKS["worst_of"], ATTACKS["suite"]):
        with torch.autocast("cpu", torch.bfloat16):
            x_adv = attack(defense, x, y, eps=0.1, seed=0)
        assert x_adv.dtype == x.dtype


@every_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_around_an_attack_change_nothing(name, mode):
    defense, (x, y) = defended("deterministic"), tiny_batch()
    usual = ATTACKS[name](defense, x, y, seed=3)
    with mode():
        x_adv = ATTACKS[name](defense, x.clone(), y.clone(), seed=torch.tensor(3))
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(x_adv.clone(), usual)


def test_random_defenses_under_inference_mode():
    defense, (x, y) = defended("bayesian on rse"), tiny_batch()
    usual = pd.attacks.ddn(defense, x, y, num_steps=5, seed=3)
    with torch.inference_mode():
        found = pd.attacks.ddn(defense, x.clone(), y.clone(), num_steps=5, seed=3)
    torch.testing.assert_close(found.clone(), usual)


class InPlace(nn.Module):
    """Normalizes where it stands."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.sub_(0.5).mul_(2.0))


@every_attack
def test_networks_that_work_in_place_change_no_inputs(name):
    net, (x, y) = tiny_net().eval(), tiny_batch()
    before = x.clone()
    found = ATTACKS[name](pd.deterministic(InPlace(net)), x, y, seed=2)
    assert torch.equal(x, before)
    plain = ATTACKS[name](pd.deterministic(nn.Sequential(pd.nn.Normalize([0.5], [0.5]), net)), x, y, seed=2)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


def test_a_source_in_half_precision_is_asked_in_half_precision():
    source, (x, y) = defended("deterministic").half(), tiny_batch()
    x_adv = pd.attacks.transfer(pd.attacks.pgd, source)(source, x.half(), y, eps=0.1, seed=0)
    assert x_adv.dtype == torch.float16
