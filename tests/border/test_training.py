"""Bad inputs to fit, objectives and adaptation."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.objectives import (
    adversarial,
    distilled,
    elbo,
    gaussian_augmented,
    harmonic,
    mixed,
    multi_sample,
    rewarded,
    trades,
    warm_up,
)
from tests.border.table import Case, World, named, refused

fit = partial(pd.fit, epochs=1, progress=False)
bayesian = pd.defenses.bayesian


FITS = {
    "a network": (lambda w: fit(w.net, w.loader), TypeError, "deterministic"),
    "a pair": (lambda w: fit(w.bayes, w.data), TypeError, r"batches \(x, y\)"),
    "a tensor": (lambda w: fit(w.bayes, w.x), TypeError, "TensorDataset"),
    "an array": (lambda w: fit(w.bayes, w.x.numpy()), TypeError, "TensorDataset"),
    "a dictionary": (lambda w: fit(w.bayes, {"x": w.x, "y": w.y}), TypeError, "dict of x, y"),
    "triples": (lambda w: fit(w.bayes, [(w.x, w.y, w.y)]), TypeError, "tuple of 3"),
    "batches of dictionaries": (lambda w: fit(w.bayes, [{"x": w.x}]), TypeError, "collate_fn"),
    "batches of lists": (
        lambda w: fit(w.bayes, [(w.x.tolist(), w.y.tolist())]),
        TypeError,
        "x as a torch.Tensor",
    ),
    "batches of arrays": (
        lambda w: fit(w.bayes, [(w.x.numpy(), w.y.numpy())]),
        TypeError,
        "x as a torch.Tensor",
    ),
    "labels of floats": (lambda w: fit(w.bayes, [(w.x, w.y.float())]), TypeError, "regression"),
    "labels beyond": (lambda w: fit(w.bayes, [(w.x, w.y + 1)], seed=0), ValueError, "y < 3"),
    "labels one-hot": (lambda w: fit(w.bayes, [(w.x, w.x[:, :3])]), TypeError, "argmax"),
    "tokens": (lambda w: fit(w.bayes, [(w.x.long(), w.y)]), TypeError, "out of scope"),
    "no batches": (lambda w: fit(w.bayes, []), ValueError, "no examples"),
    "None": (lambda w: fit(w.bayes, None), TypeError, "NoneType"),
    "no epochs": (lambda w: pd.fit(w.bayes, w.loader, epochs=0), ValueError, "epochs >= 1"),
    "half an epoch": (lambda w: pd.fit(w.bayes, w.loader, epochs=0.5), TypeError, "epochs as an integer"),
    "an objective by name": (
        lambda w: fit(w.bayes, w.loader, objective="elbo"),
        TypeError,
        "objective as a function",
    ),
    "an objective of torch": (
        lambda w: fit(w.bayes, w.loader, objective=nn.CrossEntropyLoss()),
        TypeError,
        "objective as a function",
    ),
    "an objective that gives a number": (
        lambda w: fit(w.bayes, w.loader, objective=lambda d, x, y: 1.0),
        TypeError,
        "loss|objective",
    ),
    "an optimizer by name": (lambda w: fit(w.bayes, w.loader, optimizer="adam"), TypeError, "optimizer"),
    "an optimizer of the network": (
        lambda w: fit(w.bayes, w.loader, optimizer=torch.optim.SGD(w.net.parameters(), 0.1)),
        ValueError,
        "param_groups",
    ),
    "a schedule by name": (lambda w: fit(w.bayes, w.loader, schedule="cosine"), TypeError, "schedule"),
    "a callback by name": (lambda w: fit(w.bayes, w.loader, callbacks=["print"]), TypeError, "callback"),
    "a callback bare": (lambda w: fit(w.bayes, w.loader, callbacks=print), TypeError, "callbacks"),
    "a callback of no arguments": (
        lambda w: fit(w.bayes, w.loader, callbacks=[lambda: 0]),
        TypeError,
        "callback",
    ),
    "a validation by name": (lambda w: fit(w.bayes, w.loader, validation="loss"), TypeError, "validation"),
    "a kl_schedule of a number": (
        lambda w: fit(w.bayes, w.loader, kl_schedule=0.1),
        TypeError,
        "kl_schedule",
    ),
    "a negative norm": (
        lambda w: fit(w.bayes, w.loader, max_grad_norm=-1.0),
        ValueError,
        "max_grad_norm > 0",
    ),
    "a loss of NaN": (
        lambda w: fit(
            w.bayes, w.loader, objective=lambda d, x, y: d.step(x, y).log_lik.sum() * math.nan, seed=0
        ),
        FloatingPointError,
        "nan",
    ),
    "recalibrate without statistics": (
        lambda w: pd.recalibrate(w.plain, w.loader),
        ValueError,
        "normalization layer",
    ),
    "recalibrate by a tensor": (lambda w: pd.recalibrate(normal(), w.x), TypeError, "TensorDataset"),
}

OBJECTIVES = {
    "no particles": (lambda w: elbo(w.bayes, *w.data, num_particles=0), ValueError, "num_particles >= 1"),
    "a negative KL": (
        lambda w: elbo(w.bayes, *w.data, kl_weight=-1.0),
        ValueError,
        "kl_weight >= 0",
    ),
    "a KL by text": (lambda w: elbo(w.bayes, *w.data, kl_weight="1"), TypeError, "kl_weight"),
    "a KL of NaN": (
        lambda w: elbo(w.bayes, *w.data, kl_weight=math.nan),
        ValueError,
        "kl_weight >= 0",
    ),
    "a KL of no site": (
        lambda w: aside(lambda: elbo(w.bayes, *w.data, kl_weight={"biases": 1.0})),
        ValueError,
        "kl_weight .*known",
    ),
    "a negative reward": (lambda w: rewarded(elbo, -1.0), ValueError, "weight >= 0"),
    "a reward by name": (lambda w: rewarded(elbo, 1.0, reward="entropy"), TypeError, "reward as a function"),
    "a reward that wants labels": (
        lambda w: rewarded(elbo, 1.0, reward=lambda defense, x, y: 0.0),
        TypeError,
        "reward as a function",
    ),
    "a rewarded text": (lambda w: rewarded("elbo", 1.0), TypeError, "objective as a function"),
    "nothing to reward": (lambda w: rewarded(elbo, 1.0)(w.plain, *w.data), ValueError, "none to reward"),
    "epochs of no steps": (lambda w: harmonic(1.0, 0), ValueError, "num_steps >= 1"),
    "multi_sample of none": (lambda w: multi_sample(0), ValueError, "num_samples >= 1"),
    "adversarial without an attack": (lambda w: adversarial(elbo, "pgd"), TypeError, "attack as a function"),
    "adversarial without an objective": (
        lambda w: adversarial("elbo", w.pgd),
        TypeError,
        "objective as a function",
    ),
    "adversarial with other statistics": (
        lambda w: adversarial(elbo, w.pgd, bn_stats="all"),
        ValueError,
        "bn_stats 'all'; known",
    ),
    "adversarial of two draws at once": (
        lambda w: adversarial(elbo, w.pgd, num_samples=2, same_draw=True),
        ValueError,
        "num_samples=1",
    ),
    "mixed both ways": (lambda w: mixed(elbo, w.pgd, probability=0.5, weight=0.5), ValueError, "one of them"),
    "mixed beyond 1": (lambda w: mixed(elbo, w.pgd, weight=1.5), ValueError, "weight"),
    "mixed by text": (lambda w: mixed(elbo, w.pgd, weight="half"), TypeError, "weight as a number"),
    "mixed without an attack": (lambda w: mixed(elbo, None, weight=0.5), TypeError, "attack as a function"),
    "warm_up of a name": (lambda w: warm_up("pgd", eps=0.1, num_steps=3), TypeError, "attack as a function"),
    "warm_up to a negative radius": (lambda w: warm_up(w.pgd, eps=-0.1, num_steps=3), ValueError, "eps >= 0"),
    "warm_up in no steps": (lambda w: warm_up(w.pgd, eps=0.1, num_steps=0), ValueError, "num_steps >= 1"),
    "trades of a name": (lambda w: trades("pgd", 1.0), TypeError, "attack as a function"),
    "trades of a negative beta": (lambda w: trades(w.pgd, -1.0), ValueError, "beta >= 0"),
    "distilled from a network": (lambda w: distilled(w.net, 2.0), TypeError, "deterministic"),
    "distilled at no temperature": (lambda w: distilled(w.plain, 0.0), ValueError, "temperature > 0"),
    "augmented by nothing": (lambda w: gaussian_augmented(elbo, 0.0), ValueError, "sigma > 0"),
    "augmented without an objective": (
        lambda w: gaussian_augmented("elbo", 0.1),
        TypeError,
        "objective as a function",
    ),
    "LossModule of a network": (lambda w: pd.LossModule(w.net), TypeError, "Defense"),
    "LossModule without an objective": (
        lambda w: pd.LossModule(w.plain, "elbo"),
        TypeError,
        "objective as a function",
    ),
}


def aside(call):
    """Draws that stay apart: what is wrong shows in the first step."""
    with torch.random.fork_rng():
        return call()


def rmc(w, **options):
    return pd.rmc(w.plain, options.pop("data", w.data), **({"attack": w.pgd, "num_neighbors": 8} | options))


ADAPTATION = {
    "a network": (lambda w: pd.rmc(w.net, w.data, attack=w.pgd, num_neighbors=8), TypeError, "deterministic"),
    "an attack by name": (lambda w: rmc(w, attack="pgd"), TypeError, "attack as a function"),
    "too many neighbors": (lambda w: rmc(w, num_neighbors=100), ValueError, "num_neighbors <= 8"),
    "no neighbors": (lambda w: rmc(w, num_neighbors=0), ValueError, "num_neighbors >= 1"),
    "an unknown policy": (lambda w: rmc(w, policy="forget"), ValueError, "policy 'forget'; known"),
    "an unknown part": (lambda w: rmc(w, adapt="first"), ValueError, "adapt 'first'; known"),
    "a decay beyond 1": (lambda w: rmc(w, decay=2.0), ValueError, r"decay in \[0, 1\]"),
    "no learning rate": (lambda w: rmc(w, learning_rate=0.0), ValueError, "learning_rate > 0"),
    "an objective by name": (lambda w: rmc(w, objective="elbo"), TypeError, "objective as a function"),
    "data as a tensor": (lambda w: rmc(w, data=w.x), TypeError, r"\(x, y\)"),
    "data of unequal lengths": (lambda w: rmc(w, data=(w.x, w.y[:2])), ValueError, "one label per example"),
    "labels beyond": (lambda w: rmc(w, data=(w.x, w.y + 1)), ValueError, "y < 3"),
    "a group of none": (lambda w: rmc(w, group=0), ValueError, "group >= 1"),
    "a stream of another width": (
        lambda w: rmc(w).respond(w.x[:, :5], seed=0),
        ValueError,
        "inputs .batch, 6",
    ),
    "a stream as a list": (lambda w: rmc(w).respond(w.x.tolist(), seed=0), TypeError, "x as a torch.Tensor"),
    "another state": (lambda w: rmc(w).restore({}), TypeError, "state"),
}


def normal():
    return pd.deterministic(nn.Sequential(nn.BatchNorm1d(6)))


CASES = [
    *(Case(f"fit: {name}", *row) for name, row in FITS.items()),
    *(Case(f"objectives: {name}", *row) for name, row in OBJECTIVES.items()),
    *(Case(f"rmc: {name}", *row) for name, row in ADAPTATION.items()),
]


@pytest.mark.parametrize(**named(CASES))
def test_bad_inputs_of_training_are_refused(case):
    refused(case)


def test_settings_of_numpy_build_and_fit():
    world = World()
    defense = bayesian(world.net, num_data=np.int64(4), init_scale=np.float32(0.1))
    history = pd.fit(defense, world.loader, epochs=np.int64(2), seed=np.int64(1), progress=False)
    again = bayesian(world.net, num_data=4, init_scale=float(np.float32(0.1)))
    assert history.loss == pd.fit(again, world.loader, epochs=2, seed=1, progress=False).loss
