"""Nothing finished is done twice, nothing of another evaluation is taken over."""

import functools
import multiprocessing
import os
import random
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.evaluation.fingerprint import fingerprint
from tests.contract import defended
from tests.worlds import tiny_batch, tiny_net

RUNS: list[int] = []


def noting(f, x, y, *, eps):
    """An attack that says when it runs."""
    RUNS.append(len(x))
    return pd.attacks.fgsm(f, x, y, eps=eps, norm=2)


def evaluated(folder=None, defense=None, data=None, attacks=None, **options):
    attacks = attacks or {"noting": noting, "ddn": partial(pd.attacks.ddn, num_steps=2)}
    options = {"num_samples": 3, "chunk_size": 5, "norm": 2, "eps": 0.5, "journal": folder} | options
    return pd.evaluate(defense or defended("bayesian on rse"), data or tiny_batch(12), attacks, **options)


def files(report, folder):
    report.save(folder)
    return [(folder / name).read_bytes() for name in ("report.json", "arrays.npz")]


def test_a_journal_changes_no_byte_and_saves_the_work(tmp_path):
    defense = defended("bayesian on rse")
    plain = files(evaluated(defense=defense), tmp_path / "plain")
    RUNS.clear()
    first = files(evaluated(tmp_path / "journal", defense), tmp_path / "first")
    assert RUNS == [5, 5, 2]
    again = files(evaluated(tmp_path / "journal", defense), tmp_path / "again")
    assert RUNS == [5, 5, 2] and plain == first == again


def test_a_job_that_ends_anywhere_goes_on_where_it_ended(tmp_path):
    defense = defended("bayesian on rse")
    expected = files(evaluated(defense=defense), tmp_path / "plain")

    class Cut(Exception):
        pass

    def cut_after(count):
        def attack(f, x, y, *, eps):
            if RUNS.pop() == 0:
                raise Cut
            return pd.attacks.fgsm(f, x, y, eps=eps, norm=2)

        attack.fingerprint = "the attack that is cut"
        RUNS[:] = list(range(count + 1))
        return attack

    journal = tmp_path / "journal"
    for count in (1, 1, 5):
        try:
            report = evaluated(journal, defense, attacks={"noting": cut_after(count), "ddn": DDN})
        except Cut:
            assert not list(journal.glob("*.partial"))
    assert files(report, tmp_path / "resumed") == files(
        evaluated(defense=defense, attacks={"noting": noting, "ddn": DDN}), tmp_path / "whole"
    )
    assert expected is not None


DDN = partial(pd.attacks.ddn, num_steps=2)

OTHERS = {
    "defense": lambda d: {"defense": perturbed(d)},
    "seed": lambda d: {"seed": 1},
    "num_samples": lambda d: {"num_samples": 4},
    "chunk_size": lambda d: {"chunk_size": 6},
    "draw_chunk": lambda d: {"draw_chunk": 4},
    "norm": lambda d: {"norm": float("inf")},
    "attack ddn": lambda d: {"attacks": {"noting": noting, "ddn": partial(DDN, num_steps=3)}},
    "attack new": lambda d: {"attacks": {"noting": noting, "ddn": DDN, "new": pd.attacks.fgsm}},
    "data": lambda d: {"data": tiny_batch(12, seed=1)},
}


def perturbed(defense):
    import copy

    twin = copy.deepcopy(defense)
    with torch.no_grad():
        next(twin.parameters()).flatten()[0] += 1e-6
    return twin


@pytest.mark.parametrize("name", OTHERS)
def test_another_evaluation_is_refused_by_name(name, tmp_path):
    defense = defended("bayesian on rse")
    evaluated(tmp_path, defense)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{name}.* differ"):
        evaluated(**{"folder": tmp_path, "defense": defense} | OTHERS[name](defense))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_records_and_foreign_files_are_named(tmp_path):
    defense = defended("rse")
    evaluated(tmp_path, defense)
    record = sorted(tmp_path.glob("*.npz"))[0]
    record.write_bytes(record.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{record.name} is damaged; remove it"):
        evaluated(tmp_path, defense)
    (tmp_path / "journal.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="expected the journal of an evaluation"):
        evaluated(tmp_path, defense)


def test_what_has_no_fingerprint_says_how_to_get_one(tmp_path):
    class Opaque:
        __slots__ = ()

        def __call__(self, f, x, y):
            return x

    with pytest.raises(ValueError, match="'mine' cannot be told from others: it holds Opaque.* fingerprint"):
        evaluated(tmp_path, attacks={"mine": Opaque()})
    net = tiny_net()
    bare = lambda x: net(x).unsqueeze(0)  # noqa: E731
    one = fingerprint(bare, "defense")
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    assert fingerprint(bare, "defense") != one


def made(bound):
    def attack(f, x, y):
        return (x + bound).clamp(0, 1)

    return attack


def scaled(f, x, y, scale=2.0):
    return x * scale


def scaled_more(f, x, y, scale=3.0):
    return x * scale


DIFFERENT = [
    partial(pd.attacks.pgd, eps=0.1),
    partial(pd.attacks.pgd, eps=0.2),
    partial(pd.attacks.pgd, eps=0.1, loss=pd.losses.margin),
    partial(pd.attacks.pgd, eps=0.1, rule=pd.rules.vote),
    pd.attacks.pgd,
    pd.attacks.bim,
    pd.with_draws(pd.attacks.pgd, 2),
    pd.with_draws(pd.attacks.pgd, 3),
    pd.attacks.worst_of([pd.attacks.pgd, pd.attacks.fgsm]),
    pd.attacks.worst_of([pd.attacks.fgsm, pd.attacks.pgd]),
    pd.attacks.worst_of([pd.attacks.pgd, partial(pd.attacks.fgsm, eps=0.1)]),
    pd.attacks.transfer(pd.attacks.pgd, pd.deterministic(nn.Linear(4, 3))),
    pd.attacks.transfer(pd.attacks.pgd, pd.deterministic(nn.Linear(4, 3))),
    made(0.1),
    made(0.2),
    scaled,
    scaled_more,
    partial(scaled, scale=torch.tensor([1.0])),
    partial(scaled, scale=np.array([1.0])),
    partial(scaled, scale=torch.tensor([1.0 + 1e-7])),
    lambda f, x, y: x + 0.1,
    lambda f, x, y: x + 0.2,
    pd.defenses.jump_relu(tiny_net(), kappa=0.1),
    pd.deterministic(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1))),
]


def test_fingerprints_tell_what_differs_and_nothing_else():
    prints = [fingerprint(thing, "x") for thing in DIFFERENT]
    assert len(set(prints)) == len(prints)
    assert prints == [fingerprint(thing, "x") for thing in DIFFERENT]
    assert fingerprint(made(0.1), "x") == fingerprint(made(0.1), "x")
    assert fingerprint(functools.partial(functools.partial(scaled, scale=1), x=2), "x") == fingerprint(
        functools.partial(scaled, scale=1, x=2), "x"
    )
    defense = defended("rse")
    before = fingerprint(defense, "x")
    pd.predict(defense, tiny_batch(3)[0], 3)
    defense.train()
    assert fingerprint(defense, "x") == before


def job(journal, out):
    torch.manual_seed(0)
    defense = pd.defenses.bayesian(pd.defenses.rse(tiny_net()), num_data=50)
    attacks = {"pgd": partial(pd.attacks.pgd, num_steps=10), "ddn": partial(pd.attacks.ddn, num_steps=5)}
    report = evaluated(journal, defense, tiny_batch(40), attacks, chunk_size=4, num_samples=5)
    report.save(out)


@pytest.mark.slow
def test_killed_at_twenty_moments_the_bytes_are_the_same(tmp_path):
    processes = multiprocessing.get_context("fork")
    begun = time.monotonic()
    whole = processes.Process(target=job, args=(None, tmp_path / "whole"))
    whole.start()
    whole.join()
    length, moments, kills, done = time.monotonic() - begun, random.Random(0), 0, False
    while not done:
        again = processes.Process(target=job, args=(tmp_path / "journal", tmp_path / "resumed"))
        again.start()
        again.join(moments.uniform(0.01, length / 10) if kills < 20 else None)
        done = again.exitcode == 0
        if again.exitcode is None:
            os.kill(again.pid, signal.SIGKILL)
            again.join()
            kills += 1
    assert kills == 20
    for name in ("report.json", "arrays.npz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


@pytest.mark.parametrize("loss", [pd.losses.dlr, pd.losses.margin, pd.losses.predictive_cross_entropy])
def test_every_loss_of_ours_tells_an_attack_from_others(loss):
    plain, other = (partial(pd.attacks.apgd, **options) for options in ({}, {"loss": loss}))
    assert fingerprint(plain, "apgd") != fingerprint(other, "apgd")


@pytest.mark.parametrize("derive", ["freeze", "counted"])
def test_what_a_function_remembers_of_its_calls_is_not_what_it_is(derive):
    defense = defended("rse")
    f = defense.freeze(2) if derive == "freeze" else pd.counted(defense)
    x, _ = tiny_batch(3)
    before = fingerprint(f, derive)
    f(x, 2)
    assert fingerprint(f, derive) == before
