"""Runtime masking and cleansing, and the attacks that simulate it."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.adaptation.cleansing import Bank
from probdefense.attacks.adaptive import Members, fpa, gmsa, least_over
from probdefense.logits.losses import expected_cross_entropy
from probdefense.objectives import elbo
from probdefense.types import AdaptiveLogitsFn
from tests.worlds import tiny_batch, tiny_net

FGSM = partial(pd.attacks.fgsm, eps=0.1)


def base(kind="deterministic"):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = tiny_net()
    return {
        "deterministic": pd.deterministic,
        "bayesian": lambda n: pd.defenses.bayesian(n, num_data=40, layout="per_tensor"),
        "rse": pd.defenses.rse,
    }[kind](net).eval()


def adaptive(kind="deterministic", **options):
    options = {"num_neighbors": 16, "max_epochs": 3, "learning_rate": 0.01, **options}
    return pd.rmc(base(kind), tiny_batch(40), attack=FGSM, **options)


def same(a, b):
    """Whether two states are equal bit for bit, optimizer included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("kind", ["deterministic", "bayesian", "rse"])
def test_only_respond_moves_it_and_restore_is_exact(kind):
    defense, (x, y) = adaptive(kind), tiny_batch(4, seed=9)
    assert isinstance(defense, AdaptiveLogitsFn)
    found = defense.state()
    defense(x)
    defense.freeze(2)(x)
    pd.attacks.pgd(defense, x, y, eps=0.1, num_steps=40)
    simulated = defense.simulate(x, seed=3)
    assert same(found, defense.state()), "a query changed the defender"
    first = defense.respond(x, seed=3)
    assert not same(found, defense.state())
    defense.restore(found)
    assert same(found, defense.state())
    assert torch.equal(first, defense.respond(x, seed=3)), "the same state and seed answer the same"
    assert simulated(x).shape[1:] == (4, 3)


def test_simulation_is_what_will_answer():
    defense, (x, _) = adaptive(group=4), tiny_batch(4, seed=9)
    from probdefense.rng import derive

    expected = defense.simulate(x, seed=derive(5, 0))(x)
    torch.testing.assert_close(defense.respond(x, seed=5), expected)


def test_the_seed_is_a_secret_that_matters():
    defense, (x, _) = adaptive(), tiny_batch(4, seed=9)
    found = defense.state()
    answers = []
    for seed in (0, 1):
        defense.restore(found)
        answers.append(defense.respond(x, seed=seed))
    assert not torch.equal(*answers)


def test_neighbors_by_hand():
    net = nn.Sequential(nn.Identity(), nn.Linear(1, 2))
    x = torch.tensor([[0.0], [0.9], [0.5], [0.55], [0.2]])
    bank = Bank(pd.deterministic(net), x, torch.zeros(5).long())
    assert bank.nearest(torch.tensor([[0.52], [0.0]]), 3).tolist() == [[2, 3, 4], [0, 4, 2]]


def test_the_bank_holds_clean_and_attacked_examples_with_true_labels():
    x, y = tiny_batch(40)
    defense = adaptive(num_copies=2)
    assert torch.equal(defense.bank.x[:40], x) and torch.equal(defense.bank.y, y.repeat(3))
    moved = (defense.bank.x[40:80] - x).abs().amax((1, 2, 3))
    assert float(moved.max()) == pytest.approx(0.1, abs=1e-6) and float(moved.min()) > 0.05


def test_the_best_weights_are_kept_not_the_last():
    defense = adaptive(learning_rate=3.0, max_epochs=8, calibrate=False)
    rows = torch.arange(10, 20)
    before = defense._loss(rows)
    defense._train(torch.arange(10), rows)
    assert defense._loss(rows) <= before + 1e-6


def test_refining_fits_the_neighbors():
    defense, (x, _) = adaptive(max_epochs=30, learning_rate=0.03, calibrate=False), tiny_batch(1, seed=9)
    rows = defense.bank.nearest(x, 15)[0]
    before = defense._loss(rows)
    defense.respond(x, seed=0)
    assert defense._loss(rows) < before - 0.02


def test_divergence_is_undone_and_reported():
    def explode(defense, x, y, **_):
        return elbo(defense, x, y) * torch.nan

    defense, (x, _) = adaptive(objective=explode), tiny_batch(2, seed=9)
    found = defense.state()
    with pytest.warns(UserWarning, match="a refinement diverged and was undone"):
        answer = defense.respond(x, seed=0)
    assert defense.diverged == 4 and bool(torch.isfinite(answer).all())
    assert same(found["adapted"], defense.state()["adapted"])


def everything(defense):
    """Weights, optimizer, flags, gradients, sizes and modes of the part that moves."""
    return {
        **defense.state(),
        "flags": [p.requires_grad for p in defense.adapted.parameters()],
        "gradients": [p.grad is None for p in defense.adapted.parameters()],
        "sizes": (defense.adapted.num_data, defense.model.num_data, defense.diverged),
        "modes": [module.training for module in defense.adapted.modules()],
    }


@pytest.mark.parametrize("policy", ["carry", "decay"])
@pytest.mark.parametrize("kind", ["deterministic", "bayesian"])
@pytest.mark.parametrize("ask", ["simulate", "respond"])
def test_an_objective_that_fails_leaves_no_trace(ask, kind, policy):
    calls = []

    def failing(defense, x, y):
        calls.append(len(x))
        if len(calls) == limit:
            defense.train()
            for parameter in defense.parameters():
                parameter.requires_grad_(not parameter.requires_grad)
            raise ZeroDivisionError("the objective failed")
        return elbo(defense, x, y)

    limit = None
    defense, (x, _) = adaptive(kind, objective=failing, policy=policy), tiny_batch(3, seed=9)
    defense.respond(x[:1], seed=0)
    found, first = everything(defense), defense.state()
    for limit in (1, 3) if ask == "simulate" else (1, 3, 8):
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            getattr(defense, ask)(x, seed=1)
        assert same(found, everything(defense)), f"step {limit} left a trace"
    limit = None
    answer = defense.respond(x, seed=1)
    defense.restore(first)
    assert torch.equal(answer, defense.respond(x, seed=1))


def test_a_simulation_that_diverges_is_not_counted():
    defense, (x, _) = adaptive(objective=lambda d, x, y: elbo(d, x, y) * torch.nan), tiny_batch(2, seed=9)
    found = everything(defense)
    with pytest.warns(UserWarning, match="a refinement diverged"):
        defense.simulate(x, seed=0)
    assert same(found, everything(defense))


@pytest.mark.parametrize("policy", ["carry", "reset", "decay"])
def test_policies(policy):
    defense, (x, _) = adaptive(policy=policy, calibrate=False, decay=0.25), tiny_batch(1, seed=9)
    start = [p.detach().clone() for p in defense.parameters]
    refined = adaptive(calibrate=False)
    refined.respond(x, seed=0)
    defense.respond(x, seed=0)
    kept = {"carry": 1.0, "reset": 0.0, "decay": 0.25}[policy]
    for before, goal, now in zip(start, refined.parameters, defense.parameters, strict=True):
        torch.testing.assert_close(now.detach(), before + kept * (goal.detach() - before))


@pytest.mark.parametrize(
    ("kind", "adapt", "names"),
    [
        ("deterministic", "last", {"model.net.7.weight", "model.net.7.bias"}),
        ("deterministic", "norm", {"model.net.2.weight", "model.net.2.bias"}),
        ("bayesian", "guide", None),
        ("bayesian", "last", None),
    ],
)
def test_what_adapts(kind, adapt, names):
    defense, (x, _) = adaptive(kind, adapt=adapt), tiny_batch(2, seed=9)
    before = {n: p.detach().clone() for n, p in defense.adapted.named_parameters()}
    defense.respond(x, seed=0)
    moved = {n for n, p in defense.adapted.named_parameters() if not torch.equal(before[n], p)}
    if names is None:
        inside = "guide.posteriors.7/" if adapt == "last" else "guide.posteriors."
        assert moved and all(name.startswith(inside) for name in moved)
    else:
        assert moved == names


def test_a_bayesian_base_refines_its_posterior_toward_which_the_kl_pulls():
    defense, (x, y) = adaptive("bayesian"), tiny_batch(8)
    start = defense.adapted.step(x, y).kl
    assert start and all(float(value.detach()) == pytest.approx(0.0, abs=1e-4) for value in start.values())
    assert sum(float(v.detach()) for v in defense.static.step(x, y).kl.values()) > 10
    defense.respond(x[:2], seed=0)
    assert sum(float(v.detach()) for v in defense.adapted.step(x, y).kl.values()) > 0


def test_there_is_no_certificate_for_it():
    assert adaptive("rse").input_noise is None


def test_groups_answer_together_in_stream_order():
    (x, _), found = tiny_batch(6, seed=9), []
    for group in (1, 3, 6):
        found.append(adaptive(group=group).respond(x, seed=0))
        assert found[-1].shape == (1, 6, 3)
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 81}, "expected 8 <= num_neighbors <= 80"),
        ({"num_neighbors": 2}, "expected 8 <= num_neighbors"),
        ({"adapt": "everything"}, "unknown adapt 'everything'"),
        ({"policy": "forget"}, "unknown policy 'forget'"),
        ({"learning_rate": -1.0}, "expected learning_rate > 0"),
        ({"group": 0}, "expected group >= 1"),
        ({"adapt": "guide"}, "nothing to adapt with adapt='guide'"),
        ({"decay": 2.0}, r"expected decay in \[0, 1\]"),
        ({"seed": -1}, "expected seed >= 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive(**options)


X, Y = tiny_batch(40)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:30]), r"expected y of shape \(40,\), one label per example, got \(30,\)"),
        ((X[:30], Y), r"expected y of shape \(30,\)"),
        ((X, Y + 1), "expected y < 3, the number of classes in the logits, got 3"),
        ((X, Y - 1), "labels are class indices from 0"),
        ((X, Y.float()), "regression is out of scope"),
        ((X + 1, Y), r"expected x in \[0, 1\]"),
        ((X[:, :, :3], Y), "expected inputs that fit the network"),
        (None, "expected .*, got NoneType"),
        ((X[:0], Y[:0]), "expected at least one example"),
    ],
)
def test_data_that_do_not_fit(data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pd.rmc(base(), data, attack=FGSM, num_neighbors=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": None}, r"expected attack as a function of \(logits_fn, x, y\), got NoneType"),
        ({"attack": lambda f, x: x}, "expected attack as a function of .*, got one of"),
        ({"attack": lambda f, x, y: None}, "expected attack to return points like x, .*, got NoneType"),
        ({"attack": lambda f, x, y: x[:1]}, r"expected attack to return points .*, got \(1, 1, 6, 6\)"),
        ({"attack": lambda f, x, y: x + 1}, r"expected the points of attack in \[0, 1\]"),
        ({"objective": "elbo"}, r"expected objective as a function of \(defense, x, y\), got str"),
    ],
)
def test_functions_that_are_none(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pd.rmc(base(), (X, Y), **{"attack": FGSM, "num_neighbors": 16, **options})


@pytest.mark.parametrize("ask", ["simulate", "respond"])
def test_questions_of_another_kind(ask):
    defense = adaptive()
    found = defense.state()
    for x, seed, message in (
        (X[:2, :, :5], 0, r"expected inputs \(batch, 1, 6, 6\)"),
        (X[:2] + 1, 0, r"expected x in \[0, 1\]"),
        (X[:2].numpy(), 0, "expected x as a torch.Tensor"),
        (X[:2], 1.5, "expected seed as an integer"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            getattr(defense, ask)(x, seed=seed)
    with pytest.raises(ValueError, match="expected num_samples >= 1"):
        defense.respond(X[:2], seed=0, num_samples=0)
    for state in ({}, None, {"adapted": {}}):
        with pytest.raises(TypeError, match=r"expected what state\(\) gave"):
            defense.restore(state)
    assert same(found, defense.state())


def test_bad_bases():
    with pytest.raises(TypeError, match="expected a Defense made by a builder"):
        pd.rmc(tiny_net(), tiny_batch(40), attack=FGSM)
    with pytest.raises(ValueError, match="found no linear layer in Sequential"):
        net = nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten())
        pd.rmc(pd.deterministic(net), tiny_batch(40), attack=FGSM, num_neighbors=16)


@pytest.mark.parametrize(
    "attack",
    [partial(fpa, num_rounds=1), partial(gmsa, num_rounds=2), partial(gmsa, num_rounds=2, combine="min")],
)
def test_adaptive_attacks_leave_the_defender_as_they_found_it(attack):
    defense, (x, y) = adaptive(), tiny_batch(3, seed=9)
    found, state = defense.state(), torch.get_rng_state()
    inner = partial(pd.attacks.pgd, eps=0.1, num_steps=2)
    x_adv = attack(defense, x, y, attack=inner, seed=1)
    assert same(found, defense.state()) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(x_adv, attack(defense, x, y, attack=inner, seed=1))
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    report = pd.evaluate(defense, (x, y), {"gmsa": partial(attack, attack=inner)}, eps=0.1, num_samples=2)
    assert same(found, defense.state()) and report.row(attack="gmsa", rule="mean_prob")


def test_a_defense_that_never_adapts_is_refused():
    with pytest.raises(TypeError, match="expected an adaptive defense"):
        gmsa(base(), *tiny_batch(3), attack=FGSM)


def test_members_and_their_least_loss():
    first, second = (pd.deterministic(nn.Linear(4, 3)) for _ in range(2))
    x, y = torch.rand(5, 4), torch.randint(3, (5,))
    both = Members([first, second])
    assert torch.equal(both(x), torch.cat([first(x), second(x)])) and not both.stochastic
    by_hand = torch.minimum(expected_cross_entropy(first(x), y), expected_cross_entropy(second(x), y))
    torch.testing.assert_close(least_over(2)(both(x), y), by_hand)
    torch.testing.assert_close(
        expected_cross_entropy(both(x), y),
        (expected_cross_entropy(first(x), y) + expected_cross_entropy(second(x), y)) / 2,
    )


@pytest.mark.slow
def test_gmsa_is_at_least_as_strong_as_static_transfer():
    """50 inputs, three freshly seeded defenders, paired."""
    train, test = pd.data.digits()
    x, y = (part[:50] for part in test.tensors)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    defense = pd.deterministic(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    tx, ty = train.tensors
    for _ in range(60):
        optimizer.zero_grad()
        elbo(defense, tx, ty).backward()
        optimizer.step()
    inner = partial(pd.attacks.pgd, eps=0.1, num_steps=8)
    adaptive = pd.rmc(
        defense, train, attack=inner, num_neighbors=128, max_epochs=4, learning_rate=2e-3, group=10
    )
    found = adaptive.state()
    points = {
        "static": inner(defense, x, y, seed=0),
        "gmsa": gmsa(adaptive, x, y, attack=inner, num_rounds=3, seed=0),
    }
    correct = {name: [] for name in points}
    for seed in (101, 102, 103):
        for name, x_adv in points.items():
            adaptive.restore(found)
            correct[name].append(adaptive.respond(x_adv, seed=seed)[0].argmax(-1) == y)
    static, strong = (torch.stack(correct[name]).double().mean(0) for name in ("static", "gmsa"))
    gain = static - strong
    standard_error = float(gain.std()) / math.sqrt(len(gain))
    assert float(gain.mean()) > -2 * standard_error, "GMSA must not be weaker than transfer"
    base_accuracy = float((defense(points["static"])[0].argmax(-1) == y).double().mean())
    assert float(static.mean()) > base_accuracy + 0.1, "the phenomenon: transfer alone makes RMC look robust"
