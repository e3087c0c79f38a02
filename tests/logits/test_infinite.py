"""Classes ruled out by -inf, logits that are no numbers, and logits so tiny that probabilities round to a tie."""

import math

import pytest
import torch

from probdefense import losses, rules
from probdefense.logits.rules import leads, margins, score_margin, spread, verdicts
from probdefense.ops import log_mean_exp, log_sum_exp
from probdefense.validation import check_finite_logits

OUT = -torch.inf
RULES = [rules.mean_prob, rules.vote, rules.single_draw, rules.worst_of_draws(1)]
LOSSES = [
    losses.expected_cross_entropy,
    losses.predictive_cross_entropy,
    losses.predictive_log_odds,
    losses.probability_margin,
    losses.margin,
    losses.predictive_margin,
    losses.dlr,
    losses.vote_margin,
]
THREE = torch.tensor([[[2.0, 1.0, OUT], [2.0, OUT, OUT], [OUT, 1.0, 0.0]]])
ZEROS = torch.zeros(3).long()


@pytest.mark.parametrize("rule", RULES)
def test_verdicts_where_classes_are_ruled_out(rule):
    assert verdicts(rule, THREE, ZEROS).tolist() == [[True, True, False]]
    assert not bool(margins(rule, THREE, ZEROS).isnan().any())


def test_margins_where_classes_are_ruled_out():
    assert score_margin(THREE, ZEROS).tolist() == [[1.0, math.inf, -math.inf]]
    assert leads(THREE)[0].tolist() == [[1.0, -1.0, OUT], [math.inf, OUT, OUT], [OUT, 1.0, -1.0]]
    assert losses.margin(THREE, ZEROS).tolist() == [-1.0, -math.inf, math.inf]
    torch.testing.assert_close(
        losses.predictive_margin(THREE, ZEROS), torch.tensor([-1.0, -math.inf, math.inf])
    )


def test_a_class_ruled_out_in_one_draw_of_two_keeps_half_of_its_probability():
    logits = torch.tensor([[[0.0, OUT]], [[0.0, 0.0]]])
    assert rules.mean_prob(logits).exp().tolist() == [[0.75, 0.25]]
    assert losses.predictive_margin(logits, ZEROS[:1]).item() == pytest.approx(-math.log(3))


def test_draws_that_are_infinite_to_both_sides_cancel():
    logits = torch.tensor([[[0.0, OUT]], [[OUT, 0.0]]])
    assert losses.margin(logits, ZEROS[:1]).tolist() == [0.0]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_through_classes_that_are_ruled_out(loss):
    """They are those of the same logits without the class, and zero at it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0])
    slopes = []
    for wide in (False, True):
        z = logits.clone().requires_grad_(True)
        seen = torch.cat([z, torch.full_like(z[..., :2], OUT)], -1) if wide else z
        value = loss(seen, y)
        (slope,) = torch.autograd.grad(value.sum(), z)
        slopes.append((value.detach(), slope))
    torch.testing.assert_close(slopes[1], slopes[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_numbers_whatever_is_ruled_out(loss):
    base = torch.randn(2, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for out in ([0], [1], [1, 2], [0, 1], [0, 2]):
        z = base.clone().requires_grad_(True)
        value = loss(z.index_fill(-1, torch.tensor(out), OUT), ZEROS[:1])
        (slope,) = torch.autograd.grad(value.sum(), z)
        assert bool(torch.isfinite(slope).all()) and not bool(value.isnan().any()), out


def test_the_targeted_ratio_with_classes_ruled_out():
    z, one = torch.tensor([[[3.0, 1.0, 0.0, OUT]]]), torch.tensor([1])
    assert losses.targeted_dlr(z, ZEROS[:1], one).item() == pytest.approx(-2 / 3)
    assert losses.targeted_dlr(z, ZEROS[:1], torch.tensor([3])).item() == -math.inf


def test_sums_of_nothing_have_no_slope():
    z = torch.full((3, 2), OUT, requires_grad=True)
    for total in (log_sum_exp(z, 0), log_mean_exp(z)):
        assert total.tolist() == [OUT, OUT]
        assert torch.autograd.grad(total.sum(), z)[0].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-14, 1e-12, 1e-8, 1.0, 1e8, 1e30])
@pytest.mark.parametrize("rule", RULES)
def test_verdicts_do_not_depend_on_the_scale_of_one_draw(scale, rule):
    logits = torch.randn(1, 200, 5, generator=torch.Generator().manual_seed(2))
    y = torch.randint(5, (200,), generator=torch.Generator().manual_seed(3))
    expected = logits[0].argmax(-1) == y
    assert torch.equal(verdicts(rule, scale * logits, y)[0], expected)


@pytest.mark.parametrize("scale", [1e-12, 1e-6])
def test_the_mean_probability_of_tiny_logits_decides_as_their_mean(scale):
    logits = torch.randn(5, 200, 4, generator=torch.Generator().manual_seed(4))
    y = torch.randint(4, (200,), generator=torch.Generator().manual_seed(5))
    clear = logits.mean(0).topk(2).values.diff().abs().squeeze(-1) > 0.01
    right = verdicts(rules.mean_prob, scale * logits, y)[0]
    assert torch.equal(right[clear], (logits.mean(0).argmax(-1) == y)[clear])


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1.0, 1e20])
def test_the_ratios_of_dlr_do_not_depend_on_scale(scale):
    z = torch.tensor([[[4.0, 1.0, 0.0, -2.0]]])
    assert losses.dlr(scale * z, ZEROS[:1]).item() == pytest.approx(-3 / 4)
    assert losses.targeted_dlr(scale * z, ZEROS[:1], torch.tensor([1])).item() == pytest.approx(-3 / 5)


def test_the_spread_by_hand():
    scores = torch.tensor([[3.0, 1.0, -2.0], [0.0, OUT, -4.0], [1.0, 1.0, 1.0], [7.0, OUT, OUT]])
    assert spread(scores).tolist() == [5.0, 4.0, 0.0, 0.0]


def test_what_is_refused_as_logits():
    good = torch.tensor([[[0.0, OUT], [1.0, 2.0], [OUT, 3.0]]]).expand(2, 3, 2)
    check_finite_logits(good, "here")
    for value, row in ((torch.nan, 1), (torch.inf, 2)):
        bad = good.clone()
        bad[1, row, 0] = value
        with pytest.raises(FloatingPointError, match=rf"logits in here for 1 of 3 examples, \[{row}\]"):
            check_finite_logits(bad, "here")
    none = good.clone()
    none[0, 0] = OUT
    with pytest.raises(FloatingPointError, match=r"for 1 of 3 examples, \[0\].*though not for all"):
        check_finite_logits(none, "here")
