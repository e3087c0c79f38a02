"""One tolerance for "inside": what an attack that knows its own radius is worth, counted by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import probdefense as pd
from probdefense.evaluation.points import configuration
from probdefense.ops import Ball, lp_norm, reach
from tests.worlds import LinearWorld

EPS = 0.1


@pytest.fixture
def attackable():
    """A linear net on points of which about half lie within the radius of the plane."""
    world = LinearWorld()
    x, y = world.points(60)
    return world.plain(), (x, y)


def by_hand(net, points, y):
    return float((net(points)[0].argmax(-1) == y).double().mean())


def fixed_in_a_partial(inner):
    return partial(inner, eps=EPS)


def fixed_in_a_function(inner):
    return lambda f, x, y: inner(f, x, y, eps=EPS)


def fixed_inside_worst_of(inner):
    return pd.attacks.worst_of([partial(inner, eps=EPS)])


def fixed_inside_transfer(inner):
    net = LinearWorld().plain()
    return pd.attacks.transfer(partial(inner, eps=EPS), net)


def with_draws_of_a_partial(inner):
    return pd.with_draws(partial(inner, eps=EPS), 2)


def partial_of_with_draws(inner):
    return partial(pd.with_draws(inner, 2), eps=EPS)


FIXED = [
    fixed_in_a_partial,
    fixed_in_a_function,
    fixed_inside_worst_of,
    fixed_inside_transfer,
    with_draws_of_a_partial,
    partial_of_with_draws,
]


@pytest.mark.parametrize("wrap", FIXED)
@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_an_attack_that_fixes_its_radius_is_counted_as_by_hand(attackable, wrap, norm):
    net, (x, y) = attackable
    inner = partial(pd.attacks.fgsm, norm=norm)
    report = pd.evaluate(net, (x, y), {"mine": wrap(inner), "free": inner}, norm=norm, eps=EPS)
    counted = by_hand(net, inner(net, x, y, eps=EPS), y)
    clean = report.row(attack="clean", rule="mean_prob")["accuracy"]
    for attack in ("mine", "free", "worst"):
        assert report.row(attack=attack, rule="mean_prob")["accuracy"] == counted < clean
    curve = report.curve("mine", "mean_prob")
    assert min(row["accuracy"] for row in curve) == counted


def test_points_of_eight_bit_images_count(attackable):
    net, (x, y) = attackable
    images = (x * 255).round() / 255

    def eight_bit(f, x, y):
        return ((x * 255).round() + 8 * (pd.attacks.fgsm(f, x, y, eps=8 / 255) - x).sign()).clamp(
            0, 255
        ) / 255

    report = pd.evaluate(net, (images, y), {"8 bit": eight_bit, "pgd": pd.attacks.fgsm}, eps=8 / 255)
    counted = by_hand(net, eight_bit(net, images, y), y)
    assert report.row(attack="8 bit", rule="mean_prob")["accuracy"] == counted
    assert report.row(attack="pgd", rule="mean_prob")["accuracy"] == counted
    measured = report.curve("8 bit", "mean_prob", radii=[8 / 255])[0]["accuracy"]
    assert measured == counted


def test_a_smaller_radius_of_its_own_is_named_by_the_row(attackable):
    net, data = attackable
    attacks = {"small": partial(pd.attacks.fgsm, eps=0.05), "full": pd.attacks.fgsm}
    report = pd.evaluate(net, data, attacks, eps=[0.02, 0.1])
    rows = [row for row in report.rows if row["attack"] == "small"]
    assert [row["eps"] for row in rows] == [0.05, 0.05]
    assert rows[0]["accuracy"] == by_hand(net, pd.attacks.fgsm(net, *data, eps=0.05), data[1])
    worst = {row["eps"]: row["accuracy"] for row in report.rows if row["attack"] == "worst"}
    assert worst[0.1] == report.row(attack="full", eps=0.1, rule="mean_prob")["accuracy"]


def test_a_larger_radius_or_another_norm_is_refused_before_any_work(attackable):
    net, (x, y) = attackable

    def never(f, x, y, *, eps, norm=math.inf):
        raise AssertionError("the attack ran")

    for attack, message in (
        (partial(never, eps=0.2), "fixes eps=0.2, beyond eps=0.1"),
        (pd.with_draws(partial(never, eps=torch.tensor(0.2)), 1), "beyond eps=0.1"),
        (partial(never, norm=2), "fixes norm=2"),
        (partial(pd.with_draws(never, 1), norm=2), "fixes norm=2"),
    ):
        with pytest.raises(ValueError, match=message):
            pd.evaluate(net, (x, y), {"first": never, "mine": attack}, eps=0.1)
    with pytest.raises(TypeError, match="attack 'mine' as a function"):
        pd.evaluate(net, (x, y), {"mine": 3}, eps=0.1)


@pytest.mark.parametrize("wrap", [fixed_in_a_function, fixed_inside_worst_of, fixed_inside_transfer])
def test_a_hidden_larger_radius_is_noticed_by_its_points(attackable, wrap):
    net, data = attackable
    with pytest.raises(ValueError, match="it seems to fix a larger radius|fixes eps=0.1, beyond eps=0.05"):
        pd.evaluate(net, data, {"mine": wrap(pd.attacks.fgsm)}, eps=0.05)
    report = pd.evaluate(net, data, {"min": pd.attacks.ddn}, norm=2, eps=0.01)  # far points are no fault
    assert report.row(attack="min", rule="mean_prob")["accuracy"] > 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("size", [3, 3072])
def test_the_tolerance_takes_rounding_and_little_more(dtype, norm, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, size, generator=generator).to(dtype)
    step = torch.randn(200, size, generator=generator).to(dtype)
    for eps in (8 / 255, 0.5):
        ball = Ball(x, eps, norm)
        points = ball.project(x + 10 * step)
        if dtype.itemsize == 2 and norm != math.inf:  # a projection in half precision is itself too coarse
            points = Ball(x.float(), eps, norm).project(x.float() + 10 * step.float()).to(dtype)
        distance = lp_norm(points.double() - x.double(), norm)
        assert bool((distance <= reach(eps, norm, size, dtype)).all())
    unit = torch.finfo(dtype).eps
    assert reach(8 / 255, math.inf, size, dtype) < (9 / 255 if unit < 1e-2 / 4 else 11 / 255)


def test_settings_are_read_through_partials_and_draws():
    inner = pd.with_draws(partial(pd.attacks.pgd, num_steps=3, eps=0.3), 4)
    free, fixed = configuration(partial(inner, eps=0.2))
    assert fixed == {"num_steps": 3, "eps": 0.2} and "seed" in free and "eps" not in free


def test_an_attack_cannot_move_the_examples_under_the_verdict(attackable):
    net, (x, y) = attackable

    def overwriting(f, x, y):
        x.zero_()
        return x.fill_(0.5)

    kept = x.clone()
    report = pd.evaluate(net, (x, y), {"mine": overwriting, "fgsm": pd.attacks.fgsm}, eps=0.1)
    assert bool((x == kept).all())
    alone = pd.evaluate(net, (x, y), {"fgsm": pd.attacks.fgsm}, eps=0.1)
    rows = (r.row(attack="fgsm", rule="mean_prob")["accuracy"] for r in (report, alone))
    assert len(set(rows)) == 1


def test_radii_that_agree_to_six_digits_keep_their_own_verdicts(attackable):
    net, data = attackable
    radii = [0.1, 0.10000004]

    def stronger_beyond(f, x, y, *, eps):
        return pd.attacks.fgsm(f, x, y, eps=eps) if eps > 0.1 else x

    report = pd.evaluate(net, data, {"a": stronger_beyond}, eps=radii)
    accuracies = [report.row(attack="a", eps=r, rule="mean_prob")["accuracy"] for r in radii]
    assert accuracies[0] > accuracies[1]
    for radius, accuracy in zip(radii, accuracies, strict=True):
        array = report.arrays.at("correct", "defense", "a", radius, "mean_prob")
        assert np.isclose(array.mean(), accuracy)


@pytest.mark.parametrize("eps", [torch.tensor([0.05, 0.1]), np.array([0.05, 0.1]), (0.05, 0.1)])
def test_radii_may_be_tensors_and_arrays(attackable, eps):
    net, data = attackable
    report = pd.evaluate(net, data, {"fgsm": pd.attacks.fgsm}, eps=eps)
    assert [round(r["eps"], 6) for r in report.rows if r["rule"] == "vote" or r["attack"] == "fgsm"][::2] == [
        0.05,
        0.1,
    ]


def test_what_the_parts_of_an_attack_fix_is_known(attackable):
    """A larger radius or another norm inside `worst_of` or `transfer` is refused, a smaller one named."""
    net, data = attackable
    far, other = partial(pd.attacks.pgd, eps=0.3), partial(pd.attacks.pgd, eps=0.05, norm=2)
    for wrap in (lambda a: pd.attacks.worst_of([a]), lambda a: pd.attacks.transfer(a, net)):
        with pytest.raises(ValueError, match="fixes eps=0.3, beyond eps=0.1"):
            pd.evaluate(net, data, {"mine": wrap(far)}, eps=0.1, chunk_size=3)
        with pytest.raises(ValueError, match="fixes norm=2"):
            pd.evaluate(net, data, {"mine": wrap(other)}, eps=0.1)
        near = wrap(partial(pd.attacks.fgsm, eps=0.05))
        rows = pd.evaluate(net, data, {"mine": near}, eps=[0.01, 0.1], rules=[pd.rules.vote]).rows
        assert [row["eps"] for row in rows if row["attack"] == "mine"] == [0.05]


def test_of_several_settings_of_draws_the_innermost_is_reported():
    attack = partial(pd.with_draws(pd.with_draws(partial(pd.attacks.pgd, num_steps=2), 3), 8))
    defense = pd.defenses.rse(torch.nn.Linear(4, 3), before_linear=True)
    data = torch.rand(5, 4), torch.zeros(5).long()
    row = pd.evaluate(defense, data, {"pgd": attack}, eps=0.1, num_samples=2).rows[-1]
    assert row["attack_samples"] == 3 and row["gradients"] == 5 * 2 * 3
