"""The contract of every attack; formulas of the one-step and iterated ones."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.logits.losses import expected_cross_entropy, margin, predictive_cross_entropy
from probdefense.ops import lp_norm
from tests.contract import BUILDERS, FIXED_BUDGET, MIN_NORM, NORMS_OF, STAY_AT_ERRORS, defended
from tests.worlds import LinearWorld, tiny_batch, tiny_net

ATTACKS = {**FIXED_BUDGET, **MIN_NORM}
every_attack = pytest.mark.parametrize("name", ATTACKS)
budget_attacks = pytest.mark.parametrize("name", FIXED_BUDGET)


def run(name, logits_fn, x, y, eps=0.1, **options):
    if name in FIXED_BUDGET:
        options["eps"] = eps
    if name == "suite" and not logits_fn.stochastic:
        options["budget"] = 170 * getattr(logits_fn, "num_samples", 1)  # near the least that it accepts
    return ATTACKS[name](logits_fn, x, y, **options)


@budget_attacks
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_points_stay_in_ball_and_box(name, norm):
    if norm not in NORMS_OF.get(name, (1, 2, math.inf)):
        pytest.skip(f"{name} has no L{norm} form")
    defense, (x, y) = defended("deterministic"), tiny_batch()
    x = torch.where(torch.rand(x.shape) < 0.3, x.round(), x)
    eps = {1: 2.0, 2: 0.5, math.inf: 0.1}[norm]
    x_adv = run(name, defense, x, y, eps=eps, norm=norm)
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    assert float(lp_norm(x_adv - x, norm).max()) <= eps * (1 + 1e-5)
    if name not in STAY_AT_ERRORS:
        assert float(lp_norm(x_adv - x, norm).min()) > 0.05 * eps


@every_attack
def test_what_comes_back(name):
    defense, (x, y) = defended("rse"), tiny_batch()
    before = x.clone()
    x_adv = run(name, defense.samples(3), x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1
    assert torch.equal(x, before)


@budget_attacks
def test_no_budget_no_change(name):
    for builder in ("deterministic", "rse"):
        defense, (x, y) = defended(builder), tiny_batch()
        torch.testing.assert_close(run(name, defense.samples(3), x, y, eps=0.0), x, rtol=0, atol=1e-7)


@every_attack
def test_nothing_is_left_changed(name):
    defense, (x, y) = defended("bayesian on rse").train(), tiny_batch()
    modes = [module.training for module in defense.modules()]
    values = {n: v.clone() for n, v in defense.state_dict().items()}
    state = torch.get_rng_state()
    run(name, defense.samples(3), x, y, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the global random state moved"
    assert all(p.grad is None for p in defense.parameters())
    assert modes == [module.training for module in defense.modules()]
    assert all(torch.equal(values[n], v) for n, v in defense.state_dict().items())


@every_attack
def test_a_seed_fixes_everything(name):
    defense, (x, y) = defended("bayesian on rse"), tiny_batch(3)
    first, second = (run(name, defense.samples(2), x, y, seed=5) for _ in range(2))
    assert torch.equal(first, second)
    third, fourth = (
        run(name, defense.samples(2), x, y, generator=torch.Generator().manual_seed(2)) for _ in range(2)
    )
    assert torch.equal(third, fourth)


@every_attack
@pytest.mark.parametrize("frozen", [False, True])
def test_examples_do_not_depend_on_each_other(name, frozen):
    defense, (x, y) = defended("rse" if frozen else "deterministic").double(), tiny_batch(7)
    function = defense.freeze(3, torch.Generator().manual_seed(0)) if frozen else defense
    seeds, x = torch.arange(7), x.double()  # in which rounding is too small to flip a sign
    whole = run(name, function, x, y, seed=seeds)
    part = run(name, function, x[2:4], y[2:4], seed=seeds[2:4])
    chunked = run(name, function, x, y, seed=seeds, max_batch=3)
    torch.testing.assert_close(part, whole[2:4], rtol=0, atol=1e-7)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-7)


@every_attack
def test_a_constant_on_the_logits_changes_nothing(name):
    class Shifted(nn.Module):
        def __init__(self, net, shift):
            super().__init__()
            self.net, self.shift = net, shift

        def forward(self, x):
            return self.net(x) + self.shift

    net, (x, y) = tiny_net().eval().double(), tiny_batch()
    defenses = [pd.deterministic(Shifted(net, shift)) for shift in (0.0, -8.0)]
    plain, shifted = (run(name, defense, x.double(), y, seed=3) for defense in defenses)
    torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-6)


@every_attack
def test_log_probabilities_simply_work(name, digits_net):
    class LogProbs(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).log_softmax(-1)

    net, (x, y) = digits_net
    accuracy = [
        float((net(run(name, pd.deterministic(module), x, y, eps=0.3, seed=0)).argmax(1) == y).float().mean())
        for module in (net, LogProbs(net))
    ]
    assert abs(accuracy[0] - accuracy[1]) <= 0.05


@every_attack
def test_attacks_break_an_undefended_net(name, digits_net):
    net, (x, y) = digits_net
    clean = float((net(x).argmax(1) == y).float().mean())
    x_adv = run(name, pd.deterministic(net), x, y, eps=0.3, seed=0)
    accuracy = float((net(x_adv).argmax(1) == y).float().mean())
    assert clean > 0.85 and accuracy < 0.5 * clean, (clean, accuracy)


@every_attack
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x + 1, y), r"expected x in \[0, 1\], got values in"),
        (lambda x, y: (x * torch.nan, y), "expected finite values in x"),
        (lambda x, y: ((255 * x).to(torch.uint8), y), "divide integer images by 255"),
        (lambda x, y: (x[0], y[:1]), "batch|expected"),
        (lambda x, y: (x[:0], y[:0]), "at least one example"),
        (lambda x, y: (x, y[:3]), r"one label per example, got \(3,\)"),
        (lambda x, y: (x, y.float()), "expected y as int64"),
        (lambda x, y: (x, y + 5), "expected y < 3, the number of classes"),
    ],
)
def test_bad_inputs_are_refused(name, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(name, defended("deterministic"), *change(*tiny_batch()))


@budget_attacks
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "expected eps >= 0"),
        ({"eps": math.nan}, "expected eps >= 0 and finite"),
        ({"norm": 3}, "expected norm 1, 2 or math.inf|unexpected"),
        ({"max_batch": 0}, "expected max_batch >= 1"),
    ],
)
def test_bad_settings_are_refused(name, options, message):
    options = {"eps": 0.1, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        ATTACKS[name](defended("deterministic"), *tiny_batch(), **options)


def test_a_plain_network_is_refused_with_the_fix():
    with pytest.raises(TypeError, match=r"wrap it with probdefense.deterministic\(net\)"):
        pd.attacks.fgsm(tiny_net(), *tiny_batch(), eps=0.1)


def test_probabilities_warn_once():
    net, (x, y) = tiny_net().eval(), tiny_batch()
    probabilities = pd.deterministic(nn.Sequential(net, nn.Softmax(-1)))
    with pytest.warns(UserWarning, match="look like probabilities") as caught:
        pd.attacks.pgd(probabilities, x, y, eps=0.1, num_steps=5)
    assert len(caught) == 1


def test_targets_equal_to_labels_are_refused():
    x, y = tiny_batch()
    with pytest.raises(ValueError, match="expected target labels other than y"):
        pd.attacks.pgd(defended("deterministic"), x, y, eps=0.1, target=y)


def test_nan_gradients_name_attack_step_and_examples():
    class RootOfZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head((x - x.detach()).sqrt() + x)

    with pytest.raises(FloatingPointError, match=r"gradient in pgd, step 0 for examples \[0, 1\]"):
        pd.attacks.pgd(pd.deterministic(RootOfZero()), torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1)


def test_logits_detached_from_the_input_are_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    detached = pd.deterministic(net)
    with pytest.raises(ValueError, match="do not depend on x differentiably"):
        pd.attacks.fgsm(lambda x: detached(x.detach()).detach(), *tiny_batch(), eps=0.1)


def test_an_active_set_on_a_random_defense_is_refused():
    with pytest.raises(ValueError, match="freeze the defense first"):
        pd.attacks.pgd(defended("rse"), *tiny_batch(), eps=0.1, active_set=True)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize(
    "attack", [pd.attacks.fgsm, partial(pd.attacks.pgd, random_start=False, num_steps=30)]
)
def test_linear_world_moves_along_the_weights(attack, norm):
    world = LinearWorld(dims=40)
    x, y = world.points(8)
    x = 0.45 + 0.1 * (x - x.min()) / (x.max() - x.min())
    y = (world.score(x) > 0).long()
    x_adv = attack(world.plain(), x, y, eps=0.2, norm=norm)
    gained = (world.score(x) - world.score(x_adv)) * (2 * y - 1)
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    best = 0.2 * torch.linalg.vector_norm(world.w, ord=dual)
    assert float((gained / best).min()) > (0.8 if norm == 1 else 0.999)
    assert float((gained / best).max()) < 1.0001


def test_the_gradient_of_the_expected_margin_is_the_weight_vector():
    world = LinearWorld()
    x, y = world.points(4)
    found = input_gradient(world.noisy().samples(64), x, climb(margin, y))
    exact = -world.w * (2 * y - 1).unsqueeze(1)
    torch.testing.assert_close(found.gradient, exact.to(found.gradient.dtype))


def test_the_eot_gradient_reaches_the_exact_expectation_as_draws_grow():
    """The exact gradient of the expected loss by quadrature over the one-dimensional noise w.eps."""
    world = LinearWorld(sigma=0.5, slope=3.0)
    x, y = world.points(6)
    sign = (2 * y - 1).unsqueeze(1)
    t = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    noisy_score = 3.0 * (world.score(x).double().unsqueeze(1) + 0.5 * world.w.double().norm() * t)
    slope = (torch.sigmoid(-sign * noisy_score) * weight).sum(1, keepdim=True)
    exact = -sign * slope * 3.0 * world.w
    cosines, lengths = [], []
    for draws in (4, 4096):
        found = input_gradient(world.noisy().samples(draws), x, climb(expected_cross_entropy, y)).gradient
        cosines.append(float(torch.cosine_similarity(found.double(), exact, dim=1).min()))
        lengths.append(float((found.norm(dim=1) / exact.norm(dim=1) - 1).abs().max()))
    assert cosines[1] > 0.99 and lengths[1] < 0.1
    assert lengths[0] > 2 * lengths[1], "more draws must help"


def test_repeats_average_the_gradient():
    defense, (x, y) = defended("rse"), tiny_batch()
    climbed = climb(predictive_cross_entropy, y)
    torch.manual_seed(0)
    by_hand = sum(input_gradient(defense.samples(2), x, climbed).gradient for _ in range(3)) / 3
    torch.manual_seed(0)
    torch.testing.assert_close(input_gradient(defense.samples(2), x, climbed, repeats=3).gradient, by_hand)


def test_pgd_beats_fgsm_and_bigger_budgets_are_never_weaker(digits_net):
    net, (x, y) = digits_net
    defense = pd.deterministic(net)

    def accuracy(attack, eps):
        return float((net(attack(defense, x, y, eps=eps, seed=0)).argmax(1) == y).float().mean())

    pgd = [
        accuracy(partial(pd.attacks.pgd, num_steps=20, random_start=False), eps) for eps in (0.05, 0.1, 0.2)
    ]
    assert pgd == sorted(pgd, reverse=True)
    assert pgd[1] <= accuracy(pd.attacks.fgsm, 0.1)
    assert accuracy(partial(pd.attacks.pgd, num_steps=40), 1.0) == 0


def test_the_active_set_reaches_the_same_verdict_for_less(digits_net):
    net, (x, y) = digits_net
    results = []
    for active_set in (False, True):
        cost = pd.counted(pd.deterministic(net))
        x_adv = pd.attacks.pgd(cost, x, y, eps=0.2, num_steps=20, active_set=active_set, seed=0)
        results.append(((net(x_adv).argmax(1) == y), cost.gradients))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1] < 0.5 * results[0][1]


def test_restarts_never_hurt_on_a_deterministic_net(digits_net):
    net, (x, y) = digits_net
    defense = pd.deterministic(net)
    left = [
        float(
            (net(pd.attacks.pgd(defense, x, y, eps=0.08, num_steps=5, num_restarts=n, seed=0)).argmax(1) == y)
            .float()
            .mean()
        )
        for n in (1, 8)
    ]
    assert left[1] <= left[0]


def test_targeted_pgd_reaches_the_target(digits_net):
    net, (x, y) = digits_net
    target = (y + 1) % 10
    x_adv = pd.attacks.pgd(pd.deterministic(net), x, y, eps=0.6, target=target, num_steps=40, seed=0)
    assert float((net(x_adv).argmax(1) == target).float().mean()) > 0.9


def test_counting():
    defense, (x, y) = BUILDERS["rse"](tiny_net()), tiny_batch()
    cost = pd.counted(defense)
    pd.attacks.pgd(cost.samples(3), x, y, eps=0.1, num_steps=4)
    assert cost.gradients == cost.queries == 4 * 3 * 6
    cost.freeze(5)(x)
    cost.mean()(x)
    assert cost.queries == 4 * 3 * 6 + 5 * 6 + 6


def test_attacks_declare_their_first_arguments_and_the_common_ones():
    import inspect

    made = {"transfer": pd.attacks.transfer(pd.attacks.pgd, pd.deterministic(tiny_net()))}
    made["worst_of"] = pd.attacks.worst_of([pd.attacks.pgd])
    for name in sorted({*pd.attacks.__all__} - {"bpda"}):
        function = made.get(name, getattr(pd.attacks, name))
        assert function.is_attack, name
        parameters = inspect.signature(function).parameters
        first = "adaptive" if name in ("fpa", "gmsa") else "logits_fn"
        assert list(parameters)[:3] == [first, "x", "y"], name
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:]), name
        assert {"seed", "max_batch"} <= set(parameters), name
