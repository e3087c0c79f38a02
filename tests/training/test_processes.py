"""Several processes train what one trains: gradients of the joined batch, every example once, one history."""

import json
import os
import signal
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense.objectives import adversarial, elbo
from probdefense.training import Checkpoints, Validation, ema
from tests.contract import BUILDERS, defended
from tests.torchrun import launched, torchrun
from tests.worlds import tiny_batch

WORLD = {"rank": 0, "world": 1}


def flat(defense):
    return torch.cat([p.detach().flatten() for p in defense.parameters()]).tolist()


def stepped(name, fabric=None):
    """The parameters after one step on 7 examples with given draws; each process has its rows of them.

    BatchNorm stands still: on the CPU torch has none that is synchronized.
    """
    defense = defended(name).eval()
    defense.model.num_data = 7
    x, y = tiny_batch(7)
    local = [site.name for site in defense.sites.values() if site.local]

    def objective(defense, mine, y):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            draws = defense.draw(x)
        summed = [n for n, site in defense.sites.items() if getattr(site, "enumerated", False)]
        draws = {n: v for n, v in draws.items() if n not in summed}
        rows = slice(WORLD["rank"], None, WORLD["world"])
        given = {n: v[rows] if any(n.startswith(site) for site in local) else v for n, v in draws.items()}
        step = defense.eval().step(mine, y, given)
        return sum(step.kl.values()) / 7 - step.log_lik.mean()

    optimizer = torch.optim.SGD(defense.parameters(), lr=1.0)
    options = {"epochs": 1, "objective": objective, "optimizer": optimizer, "max_grad_norm": None}
    history = pd.fit(defense, [(x, y)], fabric=fabric, progress=False, **options)
    return flat(defense), history.grad_norm


def plain():
    torch.manual_seed(1)
    return pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)))


def trained(fabric=None, folder=None, cut=None, **options):
    """A deterministic network on shuffled data: parameters, history, and the examples each epoch saw."""
    defense, seen = plain(), []

    def objective(defense, x, y):
        seen.append(x[:, 0, 0, 0].tolist())
        if len(seen) == cut:
            raise KeyboardInterrupt
        return elbo(defense, x, y)

    data = TensorDataset(*tiny_batch(50))
    history = pd.fit(
        defense,
        DataLoader(data, 15, shuffle=True),
        epochs=3,
        objective=objective,
        optimizer=torch.optim.SGD(defense.parameters(), lr=0.5),
        validation=Validation(tiny_batch(50)),
        checkpoints=folder and Checkpoints(folder, every=1),
        fabric=fabric,
        **{"seed": 2, "progress": False} | options,
    )
    return flat(defense), {n: v for n, v in vars(history).items() if n != "seconds"}, seen


def drawn(fabric, weight_draws):
    """The draws of two training steps."""
    defense, seen = defended("bayesian on rse"), []
    defense.register_step_hook(
        lambda step, y: seen.append({n: v.detach().flatten()[:5].tolist() for n, v in step.draws.items()})
    )
    attack = partial(pd.attacks.pgd, eps=0.1, num_steps=1)
    pd.fit(
        defense,
        [tiny_batch(50)],
        epochs=2,
        objective=adversarial(elbo, attack, same_draw=True),
        fabric=fabric,
        weight_draws=weight_draws,
        progress=False,
    )
    return seen


SETTINGS = {"plain": {}, "accumulated": {"accumulate": 3}, "averaged": {"average": ema(0.5)}}


def job(out):
    """What every process does."""
    fabric = launched()
    WORLD.update(rank=fabric.global_rank, world=fabric.world_size)
    torch.manual_seed(0)  # the same in both, as it would be by hand
    found = {
        "steps": {name: stepped(name, fabric) for name in BUILDERS},
        "trained": {name: trained(fabric, **options) for name, options in SETTINGS.items()},
        "drawn": {kind: drawn(fabric, kind) for kind in ("shared", "independent")},
        "seedless": trained(fabric, seed=None)[0],
    }
    try:
        pd.fit(plain(), [tiny_batch(1)], epochs=1, fabric=fabric, progress=False)
    except ValueError as error:
        found["refused"] = str(error)
    (out / f"found {fabric.global_rank}").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found, by rank."""
    out = tmp_path_factory.mktemp("two")
    answer = torchrun(job, out)
    assert answer.returncode == 0, answer.stderr
    return [json.loads((out / f"found {rank}").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_the_gradient_is_that_of_the_joined_batch(name, found):
    parameters, norm = stepped(name)
    for each in found:
        torch.testing.assert_close(each["steps"][name], [parameters, norm], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_is_that_of_one_process_and_sees_every_example_once(name, found):
    parameters, history, seen = trained(**SETTINGS[name])
    (mine, numbers, rows), (theirs, others, more) = (each["trained"][name] for each in found)
    assert mine == theirs and numbers == others
    torch.testing.assert_close(mine, parameters, rtol=1e-4, atol=1e-5)
    assert numbers.keys() == history.keys()
    for key in numbers:
        assert numbers[key] == pytest.approx(history[key], rel=1e-4, abs=1e-5), key
    assert [sorted(a + b) for a, b in zip(rows, more, strict=True)] == [sorted(batch) for batch in seen]


@pytest.mark.slow
def test_weight_draws_are_shared_or_not_and_noise_never_is(found):
    for kind in ("shared", "independent"):
        mine, theirs = (each["drawn"][kind] for each in found)
        assert len(mine) == len(theirs) == 2
        for one, other in zip(mine, theirs, strict=True):
            assert (one["weights"] == other["weights"]) is (kind == "shared")
            assert all(one[name] != other[name] for name in one if name != "weights")
        assert mine[0]["weights"] != mine[1]["weights"]


@pytest.mark.slow
def test_without_a_seed_the_processes_agree(found):
    assert found[0]["seedless"] == found[1]["seedless"]


@pytest.mark.slow
def test_a_batch_with_fewer_examples_than_processes_is_refused(found):
    assert "expected at least 2 examples in every batch" in found[0]["refused"]


def cut(out):
    """A training in two processes that Ctrl-C reaches one of, and goes on."""
    fabric = launched()
    whole = trained(fabric)
    steps = 0

    def press(defense, x, y):
        nonlocal steps
        steps += 1
        if steps == 6 and fabric.global_rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return elbo(defense, x, y)

    defense = plain()
    try:
        pd.fit(
            defense,
            DataLoader(TensorDataset(*tiny_batch(50)), 15, shuffle=True),
            epochs=3,
            objective=press,
            optimizer=torch.optim.SGD(defense.parameters(), lr=0.5),
            validation=Validation(tiny_batch(50)),
            checkpoints=Checkpoints(out / "checkpoints", every=100),
            fabric=fabric,
            seed=2,
            progress=False,
        )
        raise AssertionError("nobody stopped")
    except KeyboardInterrupt:
        fabric.barrier()
    resumed = trained(fabric, out / "checkpoints")
    (out / f"done {fabric.global_rank}").write_text(json.dumps([resumed, whole, steps]))


@pytest.mark.slow
def test_an_interrupt_of_one_process_stops_all_after_the_same_step(tmp_path):
    answer = torchrun(cut, tmp_path)
    assert answer.returncode == 0, answer.stderr
    for rank in (0, 1):
        resumed, whole, steps = json.loads((tmp_path / f"done {rank}").read_text())
        assert resumed[:2] == whole[:2] and steps == 6
        assert resumed[2] == whole[2][6:], "no batch is trained twice"
