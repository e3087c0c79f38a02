"""Numbers that are to rise: the best weights stay, patience ends, callbacks may stop, the history holds it all."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.training import Validation, ema, swa
from tests.contract import defended
from tests.worlds import LinearWorld, tiny_batch, tiny_net


def weights(defense):
    return torch.cat([p.detach().flatten() for p in defense.parameters()])


def fit(numbers, **options):
    """A training whose validation says these numbers: the defense, weights after each epoch, history."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        defense, seen = pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 3))), []
    said = iter(numbers)

    def measure(defense):
        seen.append(weights(defense))
        return next(said)

    options = {"epochs": len(numbers), "validation": Validation(measure)} | options
    if "patience" in options:
        options["validation"] = Validation(measure, patience=options.pop("patience"))
    if options.pop("plain", False):
        options["validation"] = measure
    optimizer = torch.optim.SGD(defense.parameters(), lr=0.1)
    history = pd.fit(defense, [tiny_batch(8)] * 2, optimizer=optimizer, progress=False, **options)
    return defense, seen, history


def test_the_best_weights_stay():
    defense, seen, history = fit([0.1, 0.4, 0.4, 0.2])
    assert history.validation == [0.1, 0.4, 0.4, 0.2]
    assert torch.equal(weights(defense), seen[1]), "the first of the best"
    assert not torch.equal(seen[1], seen[2])


def test_a_plain_function_chooses_nothing():
    defense, seen, history = fit([0.1, 0.4, 0.2], plain=True)
    assert torch.equal(weights(defense), seen[2]) and history.validation == [0.1, 0.4, 0.2]


@pytest.mark.parametrize(
    ("numbers", "patience", "epochs"),
    [
        ([0.5, 0.4, 0.6, 0.6, 0.5, 0.9], 2, 5),
        ([0.5, 0.4, 0.9], 1, 2),
        ([0.1, 0.2, 0.3, 0.4], 1, 4),
        ([0.5, 0.4, 0.3, 0.2], None, 4),
    ],
)
def test_patience_ends(numbers, patience, epochs):
    defense, seen, history = fit(numbers, patience=patience)
    assert len(history.loss) == len(seen) == epochs
    assert torch.equal(weights(defense), seen[numbers.index(max(numbers[:epochs]))])


@pytest.mark.parametrize("average", [ema(0.5), swa(0)])
def test_averages_are_what_is_validated_and_kept(average):
    defense, seen, _ = fit([0.1, 0.4, 0.2], average=average)
    assert torch.equal(weights(defense), seen[1])
    _, plain, _ = fit([0.1, 0.4, 0.2])
    assert not torch.equal(plain[1], seen[1])


def test_a_callback_that_returns_true_stops_and_what_is_merely_true_does_not():
    calls = []
    stop = [
        lambda epoch, history: calls.append(epoch) or epoch == 1,
        lambda epoch, history: calls.append("b"),
    ]
    _, _, history = fit([0.1] * 4, callbacks=stop)
    assert calls == [0, "b", 1, "b"] and len(history.loss) == 2
    assert len(fit([0.1] * 3, callbacks=[lambda epoch, history: "a word"])[2].loss) == 3


def test_accuracy_on_data_is_that_of_the_mean_probability():
    world = LinearWorld()
    x, y = world.points(400)
    defense = world.plain()
    exact = float((defense(x)[0].argmax(-1) == y).float().mean())
    forms = [
        (x, y),
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), 7),
        [(x[:9], y[:9]), (x[9:], y[9:])],
    ]
    assert [Validation(form).number(defense) for form in forms] == [pytest.approx(exact)] * 4
    wrong = Validation((x, 1 - y)).number(defense)
    assert wrong == pytest.approx(1 - exact)


def test_accuracy_under_attack_is_what_the_distance_says():
    world = LinearWorld()
    x, y = world.points(400)
    attack = partial(pd.attacks.pgd, eps=0.05, norm=2, num_steps=10)
    robust = float((world.distance(x) > 0.05).float().mean())
    found = Validation((x, y), attack=attack).number(world.plain())
    assert 0.1 < robust < 0.9 and found == pytest.approx(robust, abs=0.01)


def test_draws_are_the_same_after_every_epoch_and_move_nothing():
    defense, validation = defended("bayesian on rse"), Validation(tiny_batch(40))
    state = torch.get_rng_state()
    numbers = {validation.number(defense) for _ in range(3)}
    assert len(numbers) == 1 and torch.equal(state, torch.get_rng_state())


def test_history_holds_rates_norms_and_seconds():
    x, y = tiny_batch(8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    defense = pd.deterministic(net)
    optimizer = torch.optim.SGD(defense.parameters(), lr=0.5)
    loss = nn.functional.cross_entropy(net(x), y)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]).norm()
    history = pd.fit(
        defense,
        [(x, y)],
        epochs=3,
        optimizer=optimizer,
        schedule=rates.ExponentialLR(optimizer, 0.5),
        max_grad_norm=1e-6,
        progress=False,
    )
    assert history.learning_rate == [0.5, 0.25, 0.125]
    assert history.grad_norm[0] == pytest.approx(float(norm), rel=1e-5), "before it is clipped"
    assert len(history.seconds) == 3 and all(0 < seconds < 5 for seconds in history.seconds)
    free = pd.fit(defense, [(x, y)], epochs=1, max_grad_norm=None, progress=False)
    assert free.grad_norm[0] == pytest.approx(float(norm), rel=1e-2)


x, y = tiny_batch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Validation((x, y), patience=0), "expected patience >= 1"),
        (lambda: Validation((x, y), num_samples=0), "expected num_samples >= 1"),
        (lambda: Validation((x + 1, y)), r"expected x in \[0, 1\]"),
        (lambda: Validation("data"), "expected a loader of batches"),
        (lambda: Validation(lambda x, y: 0.0), r"expected validation as a function of \(defense\)"),
        (lambda: Validation((x, y), attack="pgd"), "expected attack as a function"),
        (lambda: Validation(lambda defense: 0.0, attack=pd.attacks.fgsm), "attack= together with data"),
        (lambda: fit([None]), "return one number, got NoneType"),
    ],
)
def test_what_cannot_be_validated_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_plateau_of_what_rises_is_not_one_of_a_loss():
    defense = pd.deterministic(tiny_net())
    optimizer = torch.optim.SGD(defense.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected ReduceLROnPlateau with mode='max'"):
        pd.fit(
            defense,
            [tiny_batch()],
            epochs=1,
            optimizer=optimizer,
            schedule=rates.ReduceLROnPlateau(optimizer),
            validation=Validation(tiny_batch()),
        )
