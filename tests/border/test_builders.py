"""Bad inputs to builders, layers, priors and defenses themselves."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probdefense as pd
from tests.border.table import Case, named, refused

bayesian, rse, pni = pd.defenses.bayesian, pd.defenses.rse, pd.defenses.pni
jump_relu, brelu, mc_dropout = pd.defenses.jump_relu, pd.defenses.brelu, pd.defenses.mc_dropout

BUILDERS = {
    "bayesian": bayesian,
    "rse": partial(rse, before_linear=True),
    "pni": pni,
    "jump_relu": partial(jump_relu, kappa=0.1),
    "brelu": brelu,
    "mc_dropout": partial(mc_dropout, rate=0.1),
    "wca": pd.defenses.wca,
    "conditional_noise": pd.defenses.conditional_noise,
    "random_transforms": pd.defenses.random_transforms,
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
    "a layer by number": (lambda w: pd.defenses.wca(w.net, 0), TypeError, "layer as str"),
    "a layer that is not there": (lambda w: pd.defenses.wca(w.net, "body"), ValueError, "known"),
    "hidden 0": (lambda w: pd.defenses.conditional_noise(w.net, hidden=0), ValueError, "hidden >= 1"),
    "transforms by name": (lambda w: pd.defenses.random_transforms(w.net, "shift"), TypeError, "transforms"),
    "transforms of layers": (
        lambda w: pd.defenses.random_transforms(w.net, [nn.ReLU()]),
        TypeError,
        "every transform as Transform",
    ),
    "no transforms": (lambda w: pd.defenses.random_transforms(w.net, []), ValueError, "got none"),
    "more transforms than there are": (
        lambda w: pd.defenses.random_transforms(w.net, [pd.nn.transforms.Shift(0.1)], count=2),
        ValueError,
        "at most the 1",
    ),
    "a shift by text": (lambda w: pd.nn.transforms.Shift("far"), TypeError, "scale as a number"),
    "a crop of everything": (lambda w: pd.nn.transforms.Crop(1.0), ValueError, "scale in"),
    "a covariance of fixed noise": (
        lambda w: rse(w.net, before_linear=True, covariance="full"),
        ValueError,
        "scale='learned'",
    ),
    "covariance unknown": (
        lambda w: rse(w.net, covariance="banded"),
        ValueError,
        "covariance 'banded'; known",
    ),
    "after unknown": (lambda w: rse(w.net, after="layer"), ValueError, "after 'layer'; known"),
    "after without blocks": (lambda w: rse(w.net, after="block"), ValueError, "residual blocks"),
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
    "Noise of a mask": (
        lambda w: pd.nn.Noise(family=dist.Bernoulli(0.5), multiplicative=True),
        ValueError,
        "MaskedDropout",
    ),
    "Noise of counts": (lambda w: pd.nn.Noise(0.1, family=dist.Poisson(2.0)), ValueError, "continuous"),
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

CASES = [
    *(
        Case(f"{label} of {name}", lambda w, b=builder, m=make: build(b, m(w)), kind, match)
        for label, builder in BUILDERS.items()
        for name, (make, kind, match) in NETS.items()
        if (label, name) != ("deterministic", "a replica")
    ),
    *(Case(f"builders: {name}", *row) for name, row in OPTIONS.items()),
]


@pytest.mark.parametrize(**named(CASES))
def test_bad_inputs_of_builders_are_refused(case):
    refused(case)
