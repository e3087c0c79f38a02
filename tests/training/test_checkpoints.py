"""A training that is cut anywhere and started again ends with the same bits."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import lr_scheduler as rates
from torch.utils.data import DataLoader, Dataset, RandomSampler

import probdefense as pd
from probdefense.objectives import adversarial, elbo, mixed, warm_up
from probdefense.training import Checkpoints, PerStep, Validation, ema, swa
from probdefense.training.checkpoints import pack, unpack
from tests.contract import BUILDERS, defended
from tests.worlds import tiny_batch, tiny_net


class Cut(Exception):
    """What ends a training from outside."""


class Augmented(Dataset):
    """Images that are moved at random each time they are asked for."""

    def __init__(self, count=50):
        self.x, self.y = tiny_batch(count)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index].roll(int(torch.randint(3, ())), -1), self.y[index]


def trained(
    folder=None, *, builder="bayesian on rse", objective=None, cut=None, epochs=3, every=1, **options
):
    """The defense and the history of a short training; `cut` is the number of the forward that fails."""
    forwards = 0
    inner = objective or elbo

    def counted(defense, x, y):
        nonlocal forwards
        forwards += 1
        if forwards == cut:
            raise Cut
        return inner(defense, x, y)

    defense = defended(builder)
    optimizer = torch.optim.Adam(defense.param_groups(), lr=0.01)
    make = options.pop("schedule", None)
    loader = options.pop("loader", None) or DataLoader(Augmented(), batch_size=15, shuffle=True)
    history = pd.fit(
        defense,
        loader,
        epochs=epochs,
        objective=counted,
        optimizer=optimizer,
        schedule=make and make(optimizer),
        checkpoints=folder and Checkpoints(folder, every=every),
        progress=False,
        **{"seed": 3} | options,
    )
    return defense, history


def bits(result):
    """Everything that a training leaves, except its seconds."""
    defense, history = result
    state = {name: value.flatten().tolist() for name, value in defense.state_dict().items()}
    return state, {name: value for name, value in vars(history).items() if name != "seconds"}


def cut_and_resumed(folder, cut, **options):
    with pytest.raises(Cut):
        trained(folder, cut=cut, **options)
    return trained(folder, **options)


@pytest.mark.parametrize("cut", [1, 2, 4, 5, 7, 12])
def test_cut_at_any_batch_it_ends_with_the_same_bits(cut, tmp_path):
    expected = bits(trained())
    assert bits(cut_and_resumed(tmp_path, cut)) == expected
    assert len(expected[1]["loss"]) == 3


def test_checkpoints_change_no_bit(tmp_path):
    assert bits(trained(tmp_path)) == bits(trained())


SCHEDULES = {
    "one cycle": lambda o: rates.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "by steps": lambda o: PerStep(rates.CosineAnnealingLR(o, 12)),
    "milestones": lambda o: rates.MultiStepLR(o, [1, 1, 2]),
    "plateau": lambda o: rates.ReduceLROnPlateau(o, patience=0),
    "sequence": lambda o: rates.SequentialLR(o, [rates.LinearLR(o), rates.ExponentialLR(o, 0.5)], [1]),
    "function": lambda o: rates.LambdaLR(o, lambda epoch: 0.5**epoch),
}

SETTINGS = {
    **{f"schedule {name}": {"schedule": schedule} for name, schedule in SCHEDULES.items()},
    "ema": {"average": ema(0.9)},
    "swa": {"average": swa(1)},
    "accumulated": {"accumulate": 3},
    "validated": {"validation": Validation(tiny_batch(10), patience=2)},
    "robust": {
        "validation": Validation(
            tiny_batch(10), attack=partial(pd.attacks.pgd, eps=0.1, num_steps=2), num_samples=2
        ),
        "average": ema(0.9),
    },
    "a noisy validation": {"validation": lambda defense: defense(tiny_batch(2)[0]).mean().detach()},
    "bfloat16": {"autocast": torch.bfloat16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_goes_on_where_it_was(name, tmp_path):
    assert bits(cut_and_resumed(tmp_path, 8, **SETTINGS[name])) == bits(trained(**SETTINGS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("builder", BUILDERS)
def test_every_defense_goes_on_where_it_was(builder, tmp_path):
    assert bits(cut_and_resumed(tmp_path, 6, builder=builder, epochs=2)) == bits(
        trained(builder=builder, epochs=2)
    )


def warming():
    return warm_up(pd.attacks.fgsm, eps=0.3, num_steps=9)


COUNTING = {
    "warm up": lambda: adversarial(elbo, warming()),
    "in a partial": lambda: partial(adversarial(partial(elbo, kl_weight=0.5), warming())),
    "deeper": lambda: adversarial(
        mixed(elbo, warming(), weight=0.5), pd.attacks.worst_of([partial(warming())])
    ),
    "by chance": lambda: mixed(elbo, warming(), probability=0.5),
}


@pytest.mark.parametrize("name", COUNTING)
def test_what_an_objective_counts_goes_on(name, tmp_path):
    def train(folder=None, cut=None):
        return trained(folder, cut=cut, objective=COUNTING[name]())

    with pytest.raises(Cut):
        train(tmp_path, cut=7)
    assert bits(train(tmp_path)) == bits(train())


@pytest.mark.parametrize(
    "own",
    [
        lambda data: DataLoader(data, 15, shuffle=True, generator=torch.Generator()),
        lambda data: DataLoader(data, 15, sampler=RandomSampler(data, generator=torch.Generator())),
        lambda data: DataLoader(data, 15, shuffle=True, num_workers=1),
        lambda data: [tuple(part[i : i + 15] for part in tiny_batch(50)) for i in (0, 15, 30, 45)],
    ],
    ids=["its own", "the sampler's own", "a worker", "a list"],
)
def test_loaders_go_on_in_their_order(own, tmp_path):
    data = Augmented()
    assert bits(cut_and_resumed(tmp_path, 7, loader=own(data))) == bits(trained(loader=own(data)))


def test_one_goes_on_from_the_global_state_too(tmp_path):
    def train(folder=None, cut=None):
        torch.manual_seed(8)
        return trained(folder, cut=cut, seed=None)

    with pytest.raises(Cut):
        train(tmp_path, cut=7)
    assert bits(train(tmp_path)) == bits(train())


def test_between_epochs_is_enough_and_few_files_stay(tmp_path):
    assert bits(cut_and_resumed(tmp_path, 11, every=None)) == bits(trained())
    assert [path.name for path in Checkpoints(tmp_path).paths()] == [
        "epoch-00002-batch-00000000.safetensors",
        "epoch-00003-batch-00000000.safetensors",
    ]


def test_what_is_done_is_not_done_again_and_may_go_on(tmp_path):
    seen = []
    defense, history = trained(tmp_path, epochs=2)
    again = trained(tmp_path, epochs=2, cut=1, callbacks=[lambda *_: seen.append(1)])
    assert bits(again) == bits((defense, history)) and not seen
    assert bits(trained(tmp_path, epochs=3)) == bits(trained(epochs=3))


def test_a_cell_that_is_run_again_goes_on(tmp_path):
    """The same defense, optimizer and schedule, which the first run has moved."""

    def parts():
        torch.manual_seed(1)
        defense = pd.defenses.rse(tiny_net())
        optimizer = torch.optim.SGD(defense.param_groups(), lr=0.1, momentum=0.9)
        return defense, optimizer, rates.CosineAnnealingLR(optimizer, 3)

    def train(defense, optimizer, schedule, folder, objective=elbo):
        pd.fit(
            defense,
            [tiny_batch(50)] * 3,
            epochs=3,
            objective=objective,
            optimizer=optimizer,
            schedule=schedule,
            checkpoints=folder and Checkpoints(folder, every=1),
            seed=0,
            progress=False,
        )
        return {name: value.flatten().tolist() for name, value in defense.state_dict().items()}

    calls = iter(range(5))

    def cut(defense, x, y):
        next(calls)
        return elbo(defense, x, y)

    mine = parts()
    with pytest.raises(StopIteration):
        train(*mine, tmp_path, cut)
    assert train(*mine, tmp_path) == train(*parts(), None)


OTHERS = {
    "seed": {"seed": 4},
    "average": {"average": ema(0.5)},
    "accumulate": {"accumulate": 2},
    "max_grad_norm": {"max_grad_norm": None},
    "autocast": {"autocast": torch.bfloat16},
    "schedule": {"schedule": lambda o: rates.StepLR(o, 1)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_training_is_refused_by_name(name, tmp_path):
    trained(tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"of another training: .*{name}.* differ; give this one a folder"):
        trained(tmp_path, **OTHERS[name])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_network_and_another_rate_are_refused(tmp_path):
    trained(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="of another training: .*defense"):
        trained(tmp_path, builder="rse")
    defense = defended("bayesian on rse")
    optimizer = torch.optim.Adam(defense.param_groups(), lr=0.02)
    with pytest.raises(ValueError, match="optimizer differ"):
        pd.fit(
            defense,
            [tiny_batch(50)],
            epochs=1,
            optimizer=optimizer,
            checkpoints=Checkpoints(tmp_path),
            seed=3,
            progress=False,
        )


def test_damaged_foreign_and_newer_files_are_named(tmp_path):
    trained(tmp_path, epochs=2)
    newest = Checkpoints(tmp_path).paths()[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{newest.name} is damaged; remove it"):
        trained(tmp_path, epochs=2)
    newest.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])  # one bit of a tensor
    with pytest.raises(ValueError, match=f"{newest.name} is damaged; remove it"):
        trained(tmp_path, epochs=2)
    save_file({"a": torch.zeros(1)}, newest)
    with pytest.raises(ValueError, match="expected a checkpoint of training .* got something else"):
        trained(tmp_path, epochs=2)
    save_file({}, newest, metadata={"probdefense training": json.dumps({"format": 9})})
    with pytest.raises(ValueError, match="format 1 .*, got 9; use the version"):
        trained(tmp_path, epochs=2)
    newest.unlink()
    assert bits(trained(tmp_path, epochs=2)) == bits(trained(epochs=2))


def test_a_schedule_that_goes_on_between_two_epochs_says_nothing(tmp_path):
    """Torch would warn of a schedule that moves before the optimizer, whose steps were before the restart."""
    options = {"schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), "epochs": 2}

    def cut(epoch, history):
        raise Cut

    with pytest.raises(Cut):
        trained(tmp_path, callbacks=[cut], **options)
    assert bits(trained(tmp_path, callbacks=[lambda *_: None], **options)) == bits(trained(**options))


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        trained(tmp_path / "file", cut=1)


def test_a_file_is_read_without_unpickling_and_says_what_it_holds(tmp_path):
    trained(tmp_path, epochs=1)
    with safe_open(Checkpoints(tmp_path).paths()[-1], "pt") as file:
        names = set(file.keys())
    assert {"optimizer/state/0/exp_avg", "defense/model.net.2.running_mean"} <= names


def test_nested_containers_come_back(tmp_path):
    tree = {
        "a": [1, 2.5, None, True, "x", float("inf")],
        "b": ({1: torch.arange(3)}, torch.tensor(2.0)),
        "c": Counter([1, 1, 2]),
    }
    tensors = {}
    text = json.dumps(pack(tree, tensors))
    back = unpack(json.loads(text), tensors)
    assert back["a"] == tree["a"] and back["c"] == tree["c"] and isinstance(back["c"], Counter)
    assert torch.equal(back["b"][0][1], torch.arange(3)) and float(back["b"][1]) == 2.0
    with pytest.raises(TypeError, match="got object in the state of a.0"):
        pack({"a": [object()]}, {})


def interrupted(folder, when, **options):
    """Trains and presses Ctrl-C in forward number `when`."""
    forwards = 0

    def objective(defense, x, y):
        nonlocal forwards
        forwards += 1
        if forwards == when:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return elbo(defense, x, y)

    return trained(folder, objective=objective, **options)


@pytest.mark.parametrize("when", [1, 5, 8, 12])
def test_an_interrupt_finishes_the_step_and_saves(when, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, when, every=None)
    assert Checkpoints(tmp_path).latest()["place"][3] == when
    assert signal.getsignal(signal.SIGINT) is handler
    assert bits(trained(tmp_path)) == bits(trained())


def test_an_interrupted_validation_starts_again(tmp_path):
    calls = []

    def validation(defense):
        calls.append(float(torch.rand(())))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)
        return calls[-1]

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, validation=validation, every=None)
    assert time.monotonic() - begun < 1.0, "raised at once"
    found = bits(trained(tmp_path, validation=validation))
    calls[:] = [0.0] * 5
    assert found == bits(trained(validation=validation))


def test_a_second_interrupt_does_not_wait(tmp_path):
    def objective(defense, x, y):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)
        raise AssertionError("the second Ctrl-C was held back")

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, objective=objective)
    assert not Checkpoints(tmp_path).paths()


def test_a_thread_trains_without_signals(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path)))
    thread.start()
    thread.join()
    assert bits(found[0]) == bits(trained())


def job(folder, out):
    result = trained(
        folder, epochs=12, average=ema(0.9), validation=Validation(tiny_batch(10), num_samples=2)
    )
    state, history = bits(result)
    (out / "found.json").write_text(json.dumps([state, history]))


@pytest.mark.slow
def test_killed_at_twenty_moments_the_bits_are_the_same(tmp_path):
    processes = multiprocessing.get_context("fork")
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    begun = time.monotonic()
    whole = processes.Process(target=job, args=(None, tmp_path / "whole"))
    whole.start()
    whole.join()
    length, moments, kills, done = time.monotonic() - begun, random.Random(0), 0, False
    while not done:
        again = processes.Process(target=job, args=(tmp_path / "checkpoints", tmp_path / "resumed"))
        again.start()
        again.join(moments.uniform(0.01, length / 10) if kills < 20 else None)
        done = again.exitcode == 0
        if again.exitcode is None:
            os.kill(again.pid, signal.SIGKILL)
            again.join()
            kills += 1
    assert kills == 20
    assert (tmp_path / "whole/found.json").read_bytes() == (tmp_path / "resumed/found.json").read_bytes()
