"""Bad inputs to builders, layers, priors, objectives, fit and adaptation."""

import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

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
from tests.border.table import Case, World, named, refused

fit = partial(pd.fit, epochs=1, progress=False)
bayesian, rse, pni = pd.defenses.bayesian, pd.defenses.rse, pd.defenses.pni
jump_relu, brelu, mc_dropout = pd.defenses.jump_relu, pd.defenses.brelu, pd.defenses.mc_dropout

BUILDERS = {
    "bayesian": bayesian,
    "rse": partial(rse, before_linear=True),
    "pni": pni,
    "jump_relu": partial(jump_relu, kappa=0.1),
    "brelu": brelu,
    "mc_dropout": partial(mc_dropout, rate=0.1),
    "deterministic": pd.deterministic,
}

NETS = {
    "a function": (lambda w: lambda x: x, TypeError, "expected a.* nn.Module"),
    "None": (lambda w: None, TypeError, "expected a.* nn.Module"),
    "a class": (lambda w: nn.Linear, TypeError, "expected a.* nn.Module"),
    "a state": (lambda w: w.net.state_dict(), TypeError, "expected a.* nn.Module"),
    "a replica": (lambda w: nn.Sequential(nn.DataParallel(w.net)), TypeError, "DataParallel.*module"),
    "num_data 0": (lambda w: (w.net, {"num_data": 0}), ValueError, "num_data >= 1"),
    "num_data a fraction": (lambda w: (w.net, {"num_data": 1.5}), TypeError, "num_data as an integer"),
    "num_data the data": (lambda w: (w.net, {"num_data": w.x}), TypeError, "num_data as an integer"),
}


def build(builder, given):
    net, options = given if isinstance(given, tuple) else (given, {})
    return builder(net, **options)


OPTIONS = {
    "init_scale 0": (lambda w: bayesian(w.net, init_scale=0.0), ValueError, "init_scale > 0"),
    "init_scale a text": (lambda w: bayesian(w.net, init_scale="small"), TypeError, "init_scale as a number"),
    "init_scale below the floor": (
        lambda w: bayesian(w.net, floor=0.1),
        ValueError,
        "init_scale above the floor",
    ),
    "floor negative": (lambda w: bayesian(w.net, floor=-0.1), ValueError, "floor >= 0"),
    "layout unknown": (
        lambda w: bayesian(w.net, layout="wide"),
        ValueError,
        "'flat' or 'per_tensor', got 'wide'",
    ),
    "where a text": (lambda w: bayesian(w.net, where="0.weight"), TypeError, "where as a function"),
    "where accepts nothing": (lambda w: bayesian(w.net, where=lambda n, p: False), ValueError, "where"),
    "family a text": (lambda w: bayesian(w.net, family="Normal"), TypeError, "family"),
    "family an instance": (lambda w: bayesian(w.net, family=dist.Normal(0.0, 1.0)), TypeError, "family"),
    "family without loc": (lambda w: bayesian(w.net, family=dist.Gamma), ValueError, "loc, scale"),
    "prior a text": (lambda w: bayesian(w.net, prior="normal"), TypeError, "prior"),
    "prior a number": (lambda w: bayesian(w.net, prior=1.0), TypeError, "prior"),
    "prior a class": (lambda w: bayesian(w.net, prior=dist.Normal), TypeError, "prior"),
    "prior gives a number": (lambda w: bayesian(w.net, prior=lambda n, p: 1.0), TypeError, "prior"),
    "prior on the positive": (lambda w: bayesian(w.net, prior=dist.HalfNormal(1.0)), ValueError, "support"),
    "prior on an interval": (lambda w: bayesian(w.net, prior=dist.Uniform(-1.0, 1.0)), ValueError, "support"),
    "prior of gamma": (lambda w: bayesian(w.net, prior=dist.Gamma(1.0, 1.0)), ValueError, "support"),
    "prior of counts": (lambda w: bayesian(w.net, prior=dist.Poisson(1.0)), ValueError, "support"),
    "prior transformed to the positive": (
        lambda w: bayesian(w.net, prior=dist.LogNormal(0.0, 1.0)),
        ValueError,
        "support",
    ),
    "prior of another shape": (
        lambda w: bayesian(w.net, prior=dist.Normal(torch.zeros(7), 1.0)),
        ValueError,
        "prior of .*shape",
    ),
    "prior of another event": (
        lambda w: bayesian(w.net, prior=dist.MultivariateNormal(torch.zeros(7), torch.eye(7))),
        ValueError,
        "prior of .*shape",
    ),
    "sigma_init negative": (lambda w: rse(w.net, sigma_init=-1.0), ValueError, "sigma_init >= 0"),
    "sigma_init a text": (lambda w: rse(w.net, sigma_init="0.1"), TypeError, "sigma_init as a number"),
    "scale unknown": (lambda w: rse(w.net, scale="free"), ValueError, "scale 'free'; known"),
    "scale_shape unknown": (lambda w: rse(w.net, scale_shape="row"), ValueError, "scale_shape 'row'; known"),
    "init_at unknown": (lambda w: rse(w.net, init_at="end"), ValueError, "init_at 'end'; known"),
    "when unknown": (lambda w: rse(w.net, when="often", before_linear=True), ValueError, "when"),
    "family of noise a class": (
        lambda w: rse(w.net, family=dist.Normal, before_linear=True),
        TypeError,
        "family",
    ),
    "nothing to put noise before": (lambda w: rse(nn.Sequential(nn.Flatten())), ValueError, "noise before"),
    "rse example a list": (
        lambda w: rse(w.net, before_linear=True, example=[1.0]),
        (TypeError, ValueError),
        "example",
    ),
    "rse example of another width": (
        lambda w: rse(w.net, before_linear=True, example=torch.zeros(1, 9)),
        ValueError,
        r"example=? of shape \(1, 9\)",
    ),
    "alpha_init 0": (lambda w: pni(w.net, alpha_init=0.0), ValueError, "alpha_init > 0"),
    "place unknown": (lambda w: pni(w.net, place="bias"), ValueError, "place 'bias'; known"),
    "pni elements of activations": (
        lambda w: pni(w.net, place="input", scale_shape="element"),
        ValueError,
        "scale_shape",
    ),
    "kappa negative": (lambda w: jump_relu(w.net, kappa=-1.0), ValueError, "kappa >= 0"),
    "kappa a text": (lambda w: jump_relu(w.net, kappa="0.1"), TypeError, "kappa as a number"),
    "kappa at no path": (lambda w: jump_relu(w.net, kappa={"9": 0.1}), ValueError, "9"),
    "kappa learned from a number": (
        lambda w: jump_relu(w.net, kappa=0.1, learned=True),
        ValueError,
        "learned",
    ),
    "no relu": (lambda w: jump_relu(nn.Sequential(w.net[0]), kappa=0.1), ValueError, "no ReLU"),
    "ceiling 0": (lambda w: brelu(w.net, ceiling=0.0), ValueError, "ceiling > 0"),
    "rate 0": (lambda w: mc_dropout(w.net, rate=0.0), ValueError, r"rate"),
    "rate 1": (lambda w: mc_dropout(w.net, rate=1.0), ValueError, r"rate"),
    "rate a text": (lambda w: mc_dropout(w.net, rate="half"), TypeError, "rate as a number"),
    "ensemble of nothing": (lambda w: pd.defenses.ensemble([]), ValueError, "at least one network"),
    "ensemble of one network bare": (lambda w: pd.defenses.ensemble(w.net[0]), TypeError, "list of networks"),
    "ensemble of functions": (lambda w: pd.defenses.ensemble([lambda x: x]), TypeError, "plain networks"),
    "quantiles of text": (
        lambda w: pd.defenses.quantiles(w.net, w.x, "half"),
        TypeError,
        "share as a number",
    ),
    "quantiles of all": (
        lambda w: pd.defenses.quantiles(w.net, w.x, 1.0),
        ValueError,
        r"a share in \[0, 1\)",
    ),
    "quantiles of a list": (
        lambda w: pd.defenses.quantiles(w.net, w.x.tolist(), 0.5),
        TypeError,
        "x as a torch",
    ),
    "tune_kappa with a negative drop": (
        lambda w: pd.defenses.tune_kappa(w.net, w.data, max_drop=-0.1),
        ValueError,
        "max_drop >= 0",
    ),
    "tune_kappa of a tensor": (
        lambda w: pd.defenses.tune_kappa(w.net, w.x, max_drop=0.1),
        TypeError,
        r"\(x, y\)",
    ),
    "signal of noise": (
        lambda w: pd.defenses.signal_to_noise(w.noisy),
        ValueError,
        "found no random weights",
    ),
    "signal of a network": (lambda w: pd.defenses.signal_to_noise(w.net), TypeError, "defense as Defense"),
    "surrogates of no JumpReLU": (lambda w: pd.defenses.surrogates(w.plain), ValueError, "JumpReLU"),
    "Normalize by nothing": (lambda w: pd.nn.Normalize([0.5], [0.0]), ValueError, "positive std"),
    "Normalize unequally": (lambda w: pd.nn.Normalize([0.5], [0.5, 0.5]), ValueError, "one mean"),
    "Normalize by text": (lambda w: pd.nn.Normalize("a", "b"), TypeError, "mean"),
    "Noise of a negative scale": (lambda w: pd.nn.Noise(-0.1), ValueError, "scale >= 0"),
    "Noise at no time": (lambda w: pd.nn.Noise(0.1, when="often"), ValueError, "when"),
    "TwoLogits of a function": (lambda w: pd.nn.TwoLogits(lambda x: x), TypeError, "nn.Module|net as Module"),
    "TwoLogits of three": (lambda w: pd.nn.TwoLogits(w.net)(w.x), ValueError, "one logit per example"),
    "smoothed_jump of no width": (lambda w: pd.nn.smoothed_jump(0.1, 0.0), ValueError, "width > 0"),
    "Defense of functions": (
        lambda w: pd.Defense(lambda x: x, lambda x: x),
        TypeError,
        "model as an nn.Module",
    ),
    "deterministic of a Defense": (lambda w: pd.deterministic(w.plain), TypeError, "plain nn.Module"),
    "draws by text": (lambda w: w.noisy(w.x, "3"), TypeError, "num_samples as an integer"),
    "no draws": (lambda w: w.noisy(w.x, 0), ValueError, "num_samples >= 1"),
    "an unknown backend": (lambda w: w.noisy(w.x, 2, backend="gpu"), ValueError, "backend 'gpu'; known"),
    "freeze nothing": (lambda w: w.noisy.freeze(0), ValueError, "num_samples >= 1"),
    "freeze by a number": (lambda w: w.noisy.freeze(1, generator=3), TypeError, "generator as Generator"),
    "samples of a fraction": (lambda w: w.noisy.samples(1.5), TypeError, "num_samples as an integer"),
    "as_module of no rule": (lambda w: w.noisy.as_module("median"), ValueError, "rule 'median'; known"),
    "step of other labels": (lambda w: w.plain.step(w.x, w.y + 1), ValueError, "y < 3"),
    "step of listed labels": (lambda w: w.plain.step(w.x, [0, 1, 2, 0]), TypeError, "y as int64"),
    "step of more than there is": (
        lambda w: w.bayes.step(w.x.repeat(2, 1), w.y.repeat(2)),
        ValueError,
        "at most num_data=4",
    ),
    "a batch of vectors into a convolution": (lambda w: w.conv(w.x), ValueError, "fit the network"),
    "a list into a defense": (lambda w: w.plain(w.x.tolist()), TypeError, "x as Tensor"),
    "weight decay by text": (lambda w: w.plain.param_groups("a"), TypeError, "weight_decay as a number"),
    "weight decay negative": (lambda w: w.plain.param_groups(-1.0), ValueError, "weight_decay >= 0"),
}

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
    *(
        Case(f"{label} of {name}", lambda w, b=builder, m=make: build(b, m(w)), kind, match)
        for label, builder in BUILDERS.items()
        for name, (make, kind, match) in NETS.items()
        if (label, name) != ("deterministic", "a replica")
    ),
    *(Case(f"builders: {name}", *row) for name, row in OPTIONS.items()),
    *(Case(f"fit: {name}", *row) for name, row in FITS.items()),
    *(Case(f"objectives: {name}", *row) for name, row in OBJECTIVES.items()),
    *(Case(f"rmc: {name}", *row) for name, row in ADAPTATION.items()),
]


@pytest.mark.parametrize(**named(CASES))
def test_bad_inputs_of_builders_and_training_are_refused(case):
    refused(case)


def test_settings_of_numpy_build_and_fit():
    world = World()
    defense = bayesian(world.net, num_data=np.int64(4), init_scale=np.float32(0.1))
    history = pd.fit(defense, world.loader, epochs=np.int64(2), seed=np.int64(1), progress=False)
    again = bayesian(world.net, num_data=4, init_scale=float(np.float32(0.1)))
    assert history.loss == pd.fit(again, world.loader, epochs=2, seed=1, progress=False).loss
