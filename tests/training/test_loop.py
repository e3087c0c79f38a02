"""`fit`: what it records, what it refuses, and what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.objectives import LossModule, adversarial, elbo
from tests.contract import BUILDERS, OBJECTIVES, defended
from tests.worlds import tiny_batch, tiny_net


def loader(count=50, batch_size=16):
    return DataLoader(TensorDataset(*tiny_batch(count)), batch_size=batch_size)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("builder", BUILDERS)
def test_every_objective_trains_every_defense(builder, objective):
    defense = defended(builder)
    before = {n: p.detach().clone() for n, p in defense.named_parameters()}
    history = pd.fit(defense, loader(), epochs=1, objective=OBJECTIVES[objective], progress=False)
    assert torch.isfinite(torch.tensor(history.loss)).all() and len(history.loss) == 1
    still = {n for n, p in defense.named_parameters() if torch.equal(before[n], p)}
    if objective == "elbo without KL":  # a prior is learned through the KL alone
        still = {n for n in still if not n.startswith(("model.priors.", "guide.posteriors.weights_scale."))}
    assert not still


def test_history_is_the_average_over_examples(float64):
    x, y = tiny_batch(50)
    x = x.double()
    defense = pd.deterministic(tiny_net().double()).eval()
    optimizer = torch.optim.SGD(defense.parameters(), lr=1e-12)
    defense.net.get_submodule("2").momentum = 0.0
    data = DataLoader(TensorDataset(x, y), batch_size=50)
    history = pd.fit(defense, data, epochs=2, optimizer=optimizer, progress=False)
    logits = defense.train().step(x, y).logits
    exact = nn.functional.cross_entropy(logits, y).item()
    assert history.loss == pytest.approx([exact, exact], rel=1e-6)
    assert history.log_lik == pytest.approx([-exact, -exact], rel=1e-6)
    assert history.accuracy == pytest.approx([(logits.argmax(1) == y).double().mean().item()] * 2)
    assert history.kl == [0.0, 0.0]


def test_history_weighs_uneven_batches_by_their_size():
    defense = pd.defenses.bayesian(tiny_net(), num_data=50)
    history = pd.fit(defense, loader(batch_size=33), epochs=1, objective=elbo, progress=False)
    assert history.kl[0] > 100 and history.loss[0] == pytest.approx(
        -history.log_lik[0] + history.kl[0] / 50, rel=0.02
    )


def test_training_learns():
    train, test = pd.data.digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    defense = pd.deterministic(net)
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.02)
    history = pd.fit(
        defense,
        DataLoader(train, batch_size=128, shuffle=True),
        epochs=4,
        optimizer=optimizer,
        progress=False,
    )
    assert history.loss == sorted(history.loss, reverse=True) and history.accuracy[-1] > 0.9
    x, y = test.tensors
    assert float((net(x).argmax(1) == y).float().mean()) > 0.9


def test_modes_are_restored_one_by_one():
    defense = defended("rse").eval()
    defense.net.get_submodule("1").train()
    before = [module.training for module in defense.modules()]
    pd.fit(defense, loader(), epochs=1, progress=False)
    assert before == [module.training for module in defense.modules()]
    with pytest.raises(ZeroDivisionError):
        pd.fit(defense, loader(), epochs=1, objective=lambda *_: 1 / 0, progress=False, seed=0)
    assert before == [module.training for module in defense.modules()]


def test_every_epoch_is_trained_in_training_mode():
    net, modes = tiny_net(), []
    defense = pd.deterministic(net)

    def spy(defense, x, y):
        modes.append((defense.training, net[2].training))
        return elbo(defense, x, y)

    def look(epoch, history):
        defense.eval()

    pd.fit(defense, loader(), epochs=3, objective=spy, callbacks=[look], progress=False)
    assert modes == [(True, True)] * 12
    assert all(module.training for module in defense.modules())
    defense.eval()
    pd.fit(defense, loader(), epochs=1, callbacks=[lambda *_: defense.train()], progress=False)
    assert not any(module.training for module in defense.modules())


def test_callbacks_run_in_order_after_the_schedule():
    defense, seen = defended("deterministic"), []
    optimizer = torch.optim.SGD(defense.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    pd.fit(
        defense,
        loader(),
        epochs=2,
        optimizer=optimizer,
        schedule=schedule,
        validation=lambda defense: seen.append("validation") or 0.0,
        callbacks=(
            lambda epoch, history: seen.append((epoch, optimizer.param_groups[0]["lr"])),
            lambda epoch, history: seen.append(len(history.validation)),
        ),
        progress=False,
    )
    assert seen == ["validation", (0, 0.5), 1, "validation", (1, 0.25), 2]


def test_kl_schedule_reaches_the_elbo_inside():
    seen = []

    def spy(defense, x, y, *, kl_weight):
        seen.append(kl_weight)
        return elbo(defense, x, y, kl_weight=kl_weight)

    objective = adversarial(spy, lambda f, x, y: x)
    pd.fit(
        pd.defenses.bayesian(tiny_net(), num_data=50),
        loader(batch_size=25),
        epochs=2,
        objective=objective,
        kl_schedule=lambda progress: progress,
        progress=False,
    )
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_schedule_and_callbacks_run_once_per_epoch():
    defense, epochs = defended("deterministic"), []
    optimizer = torch.optim.SGD(defense.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    pd.fit(
        defense,
        loader(),
        epochs=3,
        optimizer=optimizer,
        schedule=schedule,
        callbacks=[lambda epoch, history: epochs.append((epoch, len(history.loss)))],
        progress=False,
    )
    assert schedule.get_last_lr() == [0.125] and epochs == [(0, 1), (1, 2), (2, 3)]


def test_gradients_are_clipped():
    net = nn.Linear(4, 3)
    x, y = torch.rand(8, 4), torch.zeros(8).long()
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    pd.fit(pd.deterministic(net), [(x, y)], epochs=1, optimizer=optimizer, max_grad_norm=1e-3, progress=False)
    assert float((net.weight - before).norm().detach()) <= 1.001e-3


def test_nan_stops_training_and_says_where():
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match="loss became nan in epoch 0, step 0; lower the learning rate"
    ):
        pd.fit(pd.deterministic(net), [(torch.rand(8, 4), torch.zeros(8).long())], epochs=1, progress=False)


def test_nan_of_a_later_epoch_says_which_and_moves_nothing():
    net, losses = nn.Linear(4, 3), iter([1.0, 1.0, 1.0, torch.inf])
    batches = [(torch.rand(8, 4), torch.zeros(8).long())] * 2
    weights = []

    def objective(defense, x, y):
        weights.append(net.weight.detach().clone())
        return elbo(defense, x, y) * next(losses)

    with pytest.raises(FloatingPointError, match="loss became inf in epoch 1, step 3"):
        pd.fit(pd.deterministic(net), batches, epochs=3, objective=objective, progress=False)
    assert torch.equal(net.weight, weights[-1])


def hollow():
    return pd.deterministic(nn.Flatten())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pd.fit(pd.defenses.bayesian(tiny_net(), num_data=7), loader(), epochs=1),
            "num_data=7 but .* has 50 examples",
        ),
        (
            lambda: pd.fit(pd.defenses.bayesian(tiny_net()), loader(), epochs=1),
            "build the defense with num_data",
        ),
        (lambda: pd.fit(hollow(), loader(), epochs=1), "nothing to fit"),
        (lambda: pd.fit(defended("rse"), loader(), epochs=0), "expected epochs >= 1"),
        (lambda: pd.fit(defended("rse"), [], epochs=1), "the loader has no examples"),
        (
            lambda: pd.fit(
                defended("rse"),
                loader(),
                epochs=1,
                optimizer=torch.optim.SGD(tiny_net().parameters(), lr=0.1),
            ),
            "the optimizer holds none of the defense's parameters",
        ),
        (
            lambda: pd.fit(defended("rse"), [(x + 1, y) for x, y in loader()], epochs=1),
            r"expected x in \[0, 1\]",
        ),
        (
            lambda: pd.fit(defended("rse"), loader(), epochs=1, max_grad_norm=-1.0),
            "expected max_grad_norm > 0",
        ),
        (lambda: pd.fit(tiny_net(), loader(), epochs=1), "expected a Defense, got Sequential; wrap"),
        (lambda: pd.fit(defended("rse"), loader(), epochs=1, seed=-1), "expected seed >= 0"),
        (lambda: pd.fit(defended("rse"), loader(), epochs=1, seed=1.5), "expected seed as an integer"),
        (
            lambda: pd.fit(defended("rse"), loader(), epochs=1, optimizer=torch.optim.Adam),
            "expected optimizer as a torch.optim.Optimizer",
        ),
        (
            lambda: pd.fit(
                (one := defended("rse")), loader(), epochs=1, optimizer=torch.optim.LBFGS(one.parameters())
            ),
            "steps without a closure, got LBFGS",
        ),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def logits_and_labels(logits, y):
    return logits.mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": None}, r"expected objective as a function of \(defense, x, y\), got NoneType None"),
        ({"objective": "elbo"}, "expected objective as a function .*, got str 'elbo'"),
        ({"objective": nn.CrossEntropyLoss()}, r"expected objective as a function .*, got one of \(input"),
        ({"objective": logits_and_labels}, r"expected objective .*, got one of \(logits, y\)"),
        ({"objective": logits_and_labels, "kl_schedule": abs}, r"\(defense, x, y, kl_weight\)"),
        ({"objective": lambda d, x, y: None}, "expected objective.* to return one number .*, got NoneType"),
        ({"objective": lambda d, x, y: 1.0}, "to return one number that has a gradient, got float"),
        ({"objective": lambda d, x, y: d(x)[0]}, r"got shape \(16, 3\); .*average over the batch"),
        ({"objective": lambda d, x, y: d(x).mean().detach()}, "to return one number that has a gradient"),
        ({"kl_schedule": 0.5}, r"expected kl_schedule as a function of \(progress\), got float 0.5"),
        ({"validation": 0.5}, r"expected validation as a function of \(defense\), got float"),
        ({"validation": lambda defense: None}, "to return one number, got NoneType"),
        ({"validation": lambda defense: torch.ones(2)}, "to return one number, got Tensor"),
        ({"callbacks": lambda epoch, history: None}, r"expected callbacks as a list .*pass \[callback\]"),
        ({"callbacks": [print, None]}, r"expected each callback as a function of \(epoch, history\)"),
        ({"callbacks": [lambda epoch: None]}, "expected each callback .*, got one of"),
        ({"callbacks": "print"}, "expected each callback .*, got str 'p'"),
    ],
)
def test_what_cannot_be_called_is_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        pd.fit(defended("deterministic"), loader(), epochs=1, progress=False, **settings)


def test_loss_module_is_the_objective():
    defense, (x, y) = defended("bayesian"), tiny_batch()
    module = LossModule(defense, elbo)
    torch.manual_seed(0)
    expected = elbo(defense, x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x, y), expected)
    assert {id(p) for p in module.parameters()} == {id(p) for p in defense.parameters()}
