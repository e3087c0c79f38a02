"""Objectives against tiny cases worked by hand, and what each is known to do."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.objectives import (
    adversarial,
    distilled,
    elbo,
    gaussian_augmented,
    mixed,
    multi_sample,
    trades,
    warm_up,
)
from probdefense.objectives.trades import divergence_from
from tests.contract import defended
from tests.worlds import LinearWorld, monte_carlo_tolerance, tiny_batch, tiny_net


def fixed_logits(logits: list[list[float]]) -> nn.Module:
    """A network that answers with these logits, whatever the input, and has a parameter to train."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, x):
            return self.logits + 0 * x.sum(1, keepdim=True)

    return Constant()


def two_members(first: list[float], second: list[float]) -> pd.Defense:
    return pd.defenses.ensemble([fixed_logits([first]), fixed_logits([second])], num_data=4)


POINT = torch.full((1, 2), 0.5)


def test_multi_sample_is_the_log_of_the_mean_probability():
    """Draws of a two-member ensemble: p(y) is 3/4 or 1/4 with chance 1/2 each."""
    defense, y = two_members([math.log(3.0), 0.0], [0.0, math.log(3.0)]), torch.tensor([0])
    values = {round(float(multi_sample(2)(defense, POINT, y).detach()), 5) for _ in range(40)}
    exact = {-math.log((a + b) / 2) for a in (0.75, 0.25) for b in (0.75, 0.25)}
    assert values == {round(value, 5) for value in exact}


def test_multi_sample_of_one_is_the_elbo(float64):
    defense, (x, y) = defended("bayesian on rse").double().eval(), tiny_batch()
    x = x.double()
    torch.manual_seed(0)
    one = multi_sample(1)(defense, x, y, kl_weight=0.3)
    torch.manual_seed(0)
    torch.testing.assert_close(one, elbo(defense, x, y, kl_weight=0.3))


def test_multi_sample_bounds_are_ordered_and_tend_to_the_ensemble():
    """Linear world with Gaussian noise on the input: -log E p is known by quadrature."""
    world = LinearWorld(sigma=1.5, slope=2.0)
    defense, (x, y) = world.noisy(), world.points(4)
    nodes = torch.linspace(-6, 6, 4001)
    density = torch.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)
    spread = world.slope * world.sigma * world.w.norm()
    score = world.slope * world.score(x).unsqueeze(1) + spread * nodes
    p = torch.where(y.unsqueeze(1) == 1, score, -score).sigmoid()
    ensemble = -torch.trapezoid(density * p, nodes).log().mean()
    single = -torch.trapezoid(density * p.log(), nodes).mean()
    with torch.no_grad():
        drawn = {
            k: torch.stack([multi_sample(k)(defense, x, y) for _ in range(600 // k)]) for k in (1, 4, 60)
        }
    tolerance = monte_carlo_tolerance(float(drawn[1].std()), 600)
    assert abs(float(drawn[1].mean() - single)) < tolerance
    assert single > drawn[4].mean() > drawn[60].mean() > ensemble - tolerance
    assert abs(float(drawn[60].mean() - ensemble)) < 0.25 * float(single - ensemble)


def test_multi_sample_counts_the_kl_once_per_data_set():
    defense, (x, y) = defended("bayesian"), tiny_batch()
    kl = float(defense.step(x, y).kl["weights"].detach()) / 50
    torch.manual_seed(0)
    plain = float(multi_sample(3)(defense, x, y, kl_weight=0.0).detach())
    torch.manual_seed(0)
    assert float(multi_sample(3)(defense, x, y).detach()) == pytest.approx(plain + kl, rel=1e-5)


def test_distillation_loss_by_hand():
    """Teacher (2 ln 3, 0) at T = 2 is (3/4, 1/4); a flat student is off by ln 2 minus its entropy."""
    teacher = pd.deterministic(fixed_logits([[2 * math.log(3.0), 0.0]]))
    student = pd.deterministic(fixed_logits([[0.0, 0.0]]))
    loss = distilled(teacher, temperature=2.0)(student, POINT, torch.tensor([1]))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert float(loss.detach()) == pytest.approx(4 * (math.log(2) - entropy), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student.net.logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.5]]))  # T (p_student - p_teacher)


def test_distillation_is_a_mean_over_examples_not_over_classes():
    teacher = pd.deterministic(fixed_logits([[3.0, 0.0, 1.0]]))
    student = pd.deterministic(fixed_logits([[0.0, 0.5, 0.0]]))
    objective = distilled(teacher, temperature=3.0)
    one, four = (objective(student, POINT.repeat(n, 1), torch.zeros(n).long()) for n in (1, 4))
    torch.testing.assert_close(one, four)


def test_distillation_without_a_teacher_learns_labels_at_the_temperature():
    student = pd.deterministic(fixed_logits([[4.0, 0.0]]))
    loss = distilled(None, temperature=4.0)(student, POINT, torch.tensor([1]))
    exact = 16 * cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    torch.testing.assert_close(loss.detach(), exact)


def test_a_random_teacher_is_averaged_by_probability():
    teacher = two_members([0.0, 200.0], [200.0, 0.0]).samples(2)
    student = pd.deterministic(fixed_logits([[0.0, 0.0]]))
    loss = distilled(teacher, temperature=2.0)(student, POINT, torch.tensor([0]))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)


def digits_accuracy(net, objective, epochs=10):
    train, test = pd.data.digits()
    loader = DataLoader(train, batch_size=64, shuffle=True)
    defense = pd.deterministic(net)
    optimizer = torch.optim.SGD(defense.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    pd.fit(
        *(defense, loader),
        epochs=epochs,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        progress=False,
    )
    x, y = test.tensors
    return defense, float((defense(x)[0].argmax(1) == y).float().mean())


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("temperature", [40.0, 100.0])
def test_the_student_learns_at_high_temperature(temperature):
    teacher, teacher_accuracy = digits_accuracy(mlp(), distilled(None, temperature))
    objective = distilled(teacher, temperature)
    student, accuracy = digits_accuracy(mlp(), objective)
    assert teacher_accuracy > 0.93 and accuracy > teacher_accuracy - 0.02

    def averaged_over_classes(defense, x, y):  # and without T squared, as in RSE's baseline
        return objective(defense, x, y) / (10 * temperature**2)

    _, failed = digits_accuracy(mlp(), averaged_over_classes, epochs=3)
    assert failed < 0.5, "the test has no power"

    x, y = (t[:64] for t in pd.data.digits().test.tensors)
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(cross_entropy(student(x)[0], y, reduction="none").sum(), x)
    assert float((gradient.flatten(1).norm(dim=1) < 1e-6).float().mean()) > 0.5, "T = 1 should mask"


def test_gaussian_augmentation_adds_noise_of_its_size():
    seen = []

    def spy(defense, x, y):
        seen.append(x)
        return x.sum()

    x, count = torch.full((1, 50), 0.5), 400
    for _ in range(count):
        gaussian_augmented(spy, sigma=0.3)(None, x, None)
    noise = torch.cat(seen).double() - 0.5
    assert abs(float(noise.mean())) < monte_carlo_tolerance(0.3, noise.numel())
    assert abs(float(noise.std()) / 0.3 - 1) < monte_carlo_tolerance(2**-0.5, noise.numel())


def push(delta):
    """An attack that adds a constant."""
    return lambda logits_fn, x, y, **options: (x + delta).clamp(0, 1)


def linear(value=0.0):
    """Logits (value + w x, 0) with w = 1: a network whose loss is known at every x."""
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [0.0]]))
        net.bias.copy_(torch.tensor([value, 0.0]))
    return pd.deterministic(net)


def test_mixed_by_weight_is_the_weighted_sum():
    x, y, defense = torch.tensor([[0.2]]), torch.tensor([0]), linear()
    loss = mixed(elbo, push(0.5), weight=0.25)(defense, x, y).detach()
    clean, attacked = (math.log1p(math.exp(-p)) for p in (0.2, 0.7))
    assert float(loss) == pytest.approx(0.75 * clean + 0.25 * attacked, rel=1e-5)


def test_mixed_by_chance_tosses_a_coin_for_each_batch():
    x, y, defense, count = torch.tensor([[0.2], [0.4]]), torch.tensor([0, 0]), linear(), 400
    objective = mixed(elbo, push(0.5), probability=0.3)
    losses = torch.stack([objective(defense, x, y).detach() for _ in range(count)])
    attacked = torch.tensor([[0.7], [0.9]])
    high, low = (elbo(defense, points, y).detach() for points in (x, attacked))
    assert set(losses.tolist()) == {float(high), float(low)}
    share = float((losses == low).double().mean())
    assert abs(share - 0.3) < monte_carlo_tolerance(math.sqrt(0.21), count)


def test_options_reach_the_elbo_inside_every_objective():
    defense, (x, y) = defended("bayesian").eval(), tiny_batch()
    attack = partial(pd.attacks.fgsm, eps=0.1)
    kl = float(defense.step(x, y).kl["weights"].detach()) / 50
    for objective in (
        adversarial(elbo, attack),
        mixed(elbo, attack, weight=0.5),
        mixed(elbo, attack, probability=0.5),
        multi_sample(2),
        distilled(pd.deterministic(tiny_net()), 10.0),
        gaussian_augmented(elbo, 0.1),
        trades(attack, 2.0),
        adversarial(gaussian_augmented(multi_sample(2), 0.1), attack),
    ):
        values = []
        for weight in (0.0, 2.0):
            torch.manual_seed(0)
            values.append(float(objective(defense, x, y, kl_weight=weight).detach()))
        assert values[1] - values[0] == pytest.approx(2 * kl, rel=1e-4)


def test_trades_by_hand():
    """One weight, points 0.2 and 0.7: cross-entropy at the first plus beta times KL between both."""
    x, y, defense = torch.tensor([[0.2]]), torch.tensor([0]), linear()
    loss = trades(push(0.5), beta=3.0)(defense, x, y).detach()
    p, q = (1 / (1 + math.exp(-z)) for z in (0.2, 0.7))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(loss) == pytest.approx(-math.log(p) + 3 * kl, rel=1e-4)


def test_trades_climbs_the_divergence_and_not_the_label():
    """Both ends of the interval are equally wrong for the label's loss only on one side."""
    x, y, defense = torch.tensor([[0.5]]), torch.tensor([0]), linear()
    seen = []

    def attack(logits_fn, x, y, *, loss):
        for point in (x, x + 0.1, x - 0.1):
            seen.append(float(loss(logits_fn(point), y).detach()))
        return x

    trades(attack, beta=1.0)(defense, x, y)
    assert seen[0] == pytest.approx(0.0, abs=1e-7) and min(seen[1:]) > 1e-4


def test_trades_answers_both_points_with_one_draw():
    defense, (x, y) = defended("rse"), tiny_batch()
    still = trades(lambda logits_fn, x, y, loss: x, beta=100.0)
    for _ in range(3):
        torch.manual_seed(1)
        loss = still(defense.eval(), x, y)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, elbo(defense, x, y))


def test_trades_refuses_an_attack_that_splits_the_batch():
    loss = divergence_from(torch.zeros(1, 4, 3))
    with pytest.raises(
        ValueError, match=r"expected the whole batch at once, logits \(1, 4, 3\), got \(1, 2, 3\)"
    ):
        loss(torch.zeros(1, 2, 3), torch.zeros(2).long())


def test_warm_up_grows_linearly_and_stays():
    radii = []

    def attack(logits_fn, x, y, *, eps):
        radii.append(eps)
        return x

    warming = warm_up(attack, eps=0.4, num_steps=4)
    for _ in range(6):
        warming(None, POINT, None)
    assert radii == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_fast_adversarial_training_is_a_recipe():
    """One random FGSM step per batch (Wong et al., 2020) buys robustness on digits."""
    x, y = (t[:200] for t in pd.data.digits().test.tensors)
    fast = adversarial(elbo, partial(pd.attacks.fgsm, random_start=True, eps=0.2))
    robust = {}
    for name, objective in {"plain": elbo, "fast": fast}.items():
        torch.manual_seed(0)
        defense, _ = digits_accuracy(mlp(), objective, epochs=5)
        x_adv = pd.attacks.pgd(defense, x, y, eps=0.2, num_steps=10, seed=0)
        robust[name] = float((defense(x_adv)[0].argmax(1) == y).float().mean())
    assert robust["fast"] > robust["plain"] + 0.15


def test_fgsm_retraining_starts_from_a_trained_network():
    """Half the batches are attacked; a few epochs keep clean accuracy and gain robustness to FGSM."""
    net = mlp()
    _, before = digits_accuracy(net, elbo, epochs=5)
    x, y = (t[:200] for t in pd.data.digits().test.tensors)
    fgsm = partial(pd.attacks.fgsm, eps=0.2)
    attacked = {}
    for name, objective in {"trained": None, "retrained": mixed(elbo, fgsm, probability=0.5)}.items():
        if objective is not None:
            _, after = digits_accuracy(net, objective, epochs=5)
        defense = pd.deterministic(net)
        attacked[name] = float((defense(fgsm(defense, x, y))[0].argmax(1) == y).float().mean())
    assert after > before - 0.03 and attacked["retrained"] > attacked["trained"] + 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_sample(0), "expected num_samples >= 1"),
        (lambda: distilled(None, 0.0), "expected temperature > 0"),
        (lambda: distilled(None, -1.0), "expected temperature > 0"),
        (lambda: distilled(nn.Linear(2, 2), 2.0), r"wrap it with probdefense.deterministic\(net\)"),
        (
            lambda: distilled(pd.deterministic(nn.Linear(2, 3)), 2.0)(
                pd.deterministic(nn.Linear(2, 4)), POINT, torch.tensor([0])
            ),
            "expected a student with the teacher's 3 classes, got 4",
        ),
        (lambda: gaussian_augmented(elbo, 0.0), "expected sigma > 0"),
        (lambda: trades(push(0.1), -1.0), "expected beta >= 0"),
        (lambda: mixed(elbo, push(0.1)), "expected probability or weight, one of them, got None and None"),
        (lambda: mixed(elbo, push(0.1), weight=0.5, probability=0.5), "one of them, got 0.5 and 0.5"),
        (lambda: mixed(elbo, push(0.1), weight=1.5), r"weight in \[0, 1\], got 1.5"),
        (lambda: warm_up(push(0.1), eps=-0.1, num_steps=3), "expected eps >= 0"),
        (lambda: warm_up(push(0.1), eps=0.1, num_steps=0), "expected num_steps >= 1"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
