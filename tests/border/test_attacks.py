"""Bad inputs to attacks: examples, functions, radii and other settings."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from tests.border.table import Case, named, refused

pgd, square = partial(pd.attacks.pgd, num_steps=1, seed=0), partial(pd.attacks.square, max_queries=4, seed=0)
fmn, suite = partial(pd.attacks.fmn, num_steps=1, seed=0), partial(pd.attacks.suite, budget=210, seed=0)


def of_inputs(change, kind, match):
    """The call with other inputs."""
    return lambda w: pgd(w.plain, change(w), w.y, eps=0.1), kind, match


INPUTS = {
    "x as a list": of_inputs(lambda w: w.x.tolist(), TypeError, "expected x as a torch.Tensor .*list"),
    "x as an array": of_inputs(lambda w: w.x.numpy(), TypeError, "torch.as_tensor"),
    "x is None": of_inputs(lambda w: None, TypeError, "NoneType"),
    "x of bytes": of_inputs(lambda w: (w.x * 255).byte(), TypeError, "divide integer images by 255"),
    "x of tokens": of_inputs(lambda w: w.x.long(), TypeError, "tokens are out of scope"),
    "x complex": of_inputs(lambda w: w.x.to(torch.complex64), TypeError, "complex64"),
    "x without a batch": of_inputs(lambda w: w.x[0], ValueError, r"x.unsqueeze\(0\)"),
    "x of one number": of_inputs(lambda w: torch.tensor(0.5), ValueError, "batch axis"),
    "x empty": of_inputs(lambda w: w.x[:0], ValueError, "at least one example"),
    "x with NaN": of_inputs(lambda w: w.x * math.nan, ValueError, "NaN or infinity; clean"),
    "x infinite": of_inputs(lambda w: w.x + math.inf, ValueError, "NaN or infinity; clean"),
    "x normalized": of_inputs(lambda w: w.x * 4 - 2, ValueError, "normalize inside the network"),
    "x beyond rounding": of_inputs(lambda w: w.x.clone().fill_(1 + 1e-5), ValueError, r"in \[0, 1\]"),
    "x below rounding": of_inputs(lambda w: w.x.clone().fill_(-1e-5), ValueError, r"in \[0, 1\]"),
    "x on the meta device": of_inputs(lambda w: w.x.to("meta"), ValueError, "meta device; move"),
    "x sparse": of_inputs(lambda w: w.x.to_sparse(), ValueError, "to_dense"),
    "x of another width": of_inputs(
        lambda w: w.x.new_zeros(4, 7), ValueError, r"fit the network, got \(4, 7\) float32"
    ),
    "x in double": of_inputs(lambda w: w.x.double(), ValueError, "float64; check .*dtype"),
}


def of_labels(change, kind, match):
    """The call with other labels."""
    return lambda w: pgd(w.plain, w.x, change(w), eps=0.1), kind, match


LABELS = {
    "y as a list": of_labels(lambda w: [0, 1, 2, 0], TypeError, "torch.as_tensor"),
    "y as an array": of_labels(lambda w: w.y.numpy(), TypeError, "torch.as_tensor"),
    "y is None": of_labels(lambda w: None, TypeError, "NoneType"),
    "y of int32": of_labels(lambda w: w.y.int(), TypeError, r"y.long\(\)"),
    "y of booleans": of_labels(lambda w: w.y > 0, TypeError, r"y.long\(\)"),
    "y of floats": of_labels(lambda w: w.y.float(), TypeError, "regression is out of scope: .*SVI"),
    "y one-hot": of_labels(lambda w: nn.functional.one_hot(w.y).float(), TypeError, r"y.argmax\(1\)"),
    "y of one column": of_labels(lambda w: w.y[:, None], ValueError, "one label per example"),
    "y of one number": of_labels(lambda w: w.y[0], ValueError, "one label per example"),
    "y too short": of_labels(lambda w: w.y[:3], ValueError, r"\(4,\)"),
    "y negative": of_labels(lambda w: w.y - 1, ValueError, "y >= 0, got -1"),
    "y beyond the classes": of_labels(lambda w: w.y + 1, ValueError, "y < 3.*got 3"),
    "y on the meta device": of_labels(lambda w: w.y.to("meta"), ValueError, "meta device"),
}

FUNCTIONS = {
    "a plain network": (lambda w: w.net, TypeError, r"probdefense.deterministic\(net\)"),
    "a number": (lambda w: 3, TypeError, "expected a LogitsFn"),
    "None": (lambda w: None, TypeError, "expected a LogitsFn"),
    "a class": (lambda w: nn.Linear, TypeError, "expected a LogitsFn.*type"),
    "a function without a sample axis": (lambda w: lambda x: w.net(x), ValueError, "samples, 4, classes"),
    "a function of another batch": (
        lambda w: lambda x: w.net(x)[None, :2],
        ValueError,
        "samples, 4, classes",
    ),
    "a function that gives a list": (lambda w: lambda x: [1], TypeError, "list"),
    "a function of one class": (lambda w: lambda x: w.net(x)[None, :, :1], ValueError, "TwoLogits"),
    "a detached function": (
        lambda w: lambda x: w.net(x.detach()).detach()[None],
        ValueError,
        "differentiably",
    ),
    "an answer in a tuple": (lambda w: w.answering(lambda z: (z, z)), TypeError, r"net\(x\)\[0\]"),
    "an answer in a dict": (
        lambda w: w.answering(lambda z: {"logits": z}),
        TypeError,
        r"net\(x\)\['logits'\]",
    ),
    "an answer in an object": (
        lambda w: w.answering(lambda z: SimpleNamespace(logits=z)),
        TypeError,
        r"net\(x\).logits",
    ),
    "an answer of None": (lambda w: w.answering(lambda z: None), TypeError, "NoneType"),
    "an answer of labels": (lambda w: w.answering(lambda z: z.argmax(1)), TypeError, "int64"),
    "logits of one axis": (lambda w: w.answering(lambda z: z[:, 0]), ValueError, r"got \(4,\)"),
    "logits of three axes": (lambda w: w.answering(lambda z: z[:, None]), ValueError, r"got \(4, 1, 3\)"),
    "logits of four axes": (
        lambda w: w.answering(lambda z: z[:, :, None, None]),
        ValueError,
        r"got \(4, 3, 1, 1\).*average",
    ),
    "one logit": (lambda w: w.answering(lambda z: z[:, :1]), ValueError, "TwoLogits"),
    "no logit": (lambda w: w.answering(lambda z: z[:, :0]), ValueError, "two classes"),
    "logits of another batch": (lambda w: w.answering(lambda z: z[:2]), ValueError, r"got \(2, 3\)"),
    "NaN logits": (lambda w: w.answering(lambda z: z * math.nan), FloatingPointError, "4 of 4 examples"),
    "infinite logits": (lambda w: w.answering(lambda z: z + math.inf), FloatingPointError, "overflow"),
}

SETTINGS = {
    "eps negative": (pgd, {"eps": -0.1}, ValueError, "eps >= 0"),
    "eps NaN": (pgd, {"eps": math.nan}, ValueError, "finite"),
    "eps infinite": (pgd, {"eps": math.inf}, ValueError, "finite"),
    "eps as a text": (pgd, {"eps": "8/255"}, TypeError, "eps as a number"),
    "eps is None": (pgd, {"eps": None}, TypeError, "eps as a number"),
    "eps is true": (pgd, {"eps": True}, TypeError, "eps as a number"),
    "eps as a list": (pgd, {"eps": [0.1, 0.2]}, TypeError, "eps as a number"),
    "eps of another length": (pgd, {"eps": torch.full((3,), 0.1)}, ValueError, r"one per example \(4,\)"),
    "eps of two axes": (pgd, {"eps": torch.full((4, 1), 0.1)}, ValueError, "flat tensor"),
    "eps with one negative": (pgd, {"eps": torch.tensor([0.1, 0.1, -0.1, 0.1])}, ValueError, "negative"),
    "eps with one NaN": (pgd, {"eps": np.array([0.1, 0.1, np.nan, 0.1])}, ValueError, "non-finite"),
    "eps of booleans": (pgd, {"eps": torch.ones(4, dtype=torch.bool)}, TypeError, "radii in pixels"),
    "norm 3": (pgd, {"eps": 0.1, "norm": 3}, ValueError, "norm 1, 2 or math.inf"),
    "norm 0": (pgd, {"eps": 0.1, "norm": 0}, ValueError, "norm 1, 2 or math.inf"),
    "norm as a text": (pgd, {"eps": 0.1, "norm": "linf"}, ValueError, "norm 1, 2 or math.inf"),
    "norm None": (pgd, {"eps": 0.1, "norm": None}, ValueError, "norm 1, 2 or math.inf"),
    "norm true": (pgd, {"eps": 0.1, "norm": True}, ValueError, "norm 1, 2 or math.inf"),
    "norm of several": (pgd, {"eps": 0.1, "norm": torch.tensor([1.0, 2.0])}, ValueError, "norm 1, 2 or"),
    "num_steps 0": (pgd, {"eps": 0.1, "num_steps": 0}, ValueError, "num_steps >= 1"),
    "num_steps a fraction": (pgd, {"eps": 0.1, "num_steps": 2.5}, TypeError, "num_steps as an integer"),
    "num_steps a text": (pgd, {"eps": 0.1, "num_steps": "3"}, TypeError, "num_steps as an integer"),
    "num_restarts 0": (pgd, {"eps": 0.1, "num_restarts": 0}, ValueError, "num_restarts >= 1"),
    "repeats 0": (pgd, {"eps": 0.1, "repeats": 0}, ValueError, "repeats >= 1"),
    "max_batch 0": (pgd, {"eps": 0.1, "max_batch": 0}, ValueError, "max_batch >= 1"),
    "max_batch a fraction": (pgd, {"eps": 0.1, "max_batch": 1.5}, TypeError, "max_batch as an integer"),
    "step_size 0": (pgd, {"eps": 0.1, "step_size": 0.0}, ValueError, "step_size > 0"),
    "step_size a text": (pgd, {"eps": 0.1, "step_size": "big"}, TypeError, "step_size as a number"),
    "step_size NaN": (pgd, {"eps": 0.1, "step_size": math.nan}, ValueError, "step_size > 0 and finite"),
    "loss as a text": (pgd, {"eps": 0.1, "loss": "ce"}, TypeError, r"loss as a function of \(logits, y\)"),
    "loss as a class": (pgd, {"eps": 0.1, "loss": nn.CrossEntropyLoss}, TypeError, "loss as a function"),
    "loss of one argument": (pgd, {"eps": 0.1, "loss": lambda z: z}, TypeError, "wrap it in a lambda"),
    "loss that gives a scalar": (
        pgd,
        {"eps": 0.1, "loss": lambda z, y: z.sum()},
        ValueError,
        r"loss .*\(4,\).*got",
    ),
    "loss of torch, a scalar": (
        pgd,
        {"eps": 0.1, "loss": lambda z, y: nn.functional.cross_entropy(z.mean(0), y)},
        ValueError,
        r"loss .*\(4,\).*got",
    ),
    "loss that gives a list": (pgd, {"eps": 0.1, "loss": lambda z, y: [0.0] * 4}, TypeError, "loss"),
    "loss that is detached": (
        pgd,
        {"eps": 0.1, "loss": lambda z, y: z.detach().sum((0, 2))},
        ValueError,
        "differentiably",
    ),
    "rule as a text": (pgd, {"eps": 0.1, "rule": "vote", "num_restarts": 2}, TypeError, "rule as a function"),
    "rule of two arguments": (pgd, {"eps": 0.1, "rule": lambda z, y: z}, TypeError, "rule as a function"),
    "rule that keeps the draws": (
        pgd,
        {"eps": 0.1, "rule": lambda z: z, "num_restarts": 2},
        ValueError,
        r"rule .*\(4, 3\)",
    ),
    "rule that decides": (
        pgd,
        {"eps": 0.1, "rule": lambda z: z.mean(0).argmax(-1), "num_restarts": 2},
        ValueError,
        r"rule .*\(4, 3\)",
    ),
    "random_start as a number": (pgd, {"eps": 0.1, "random_start": 2}, TypeError, "random_start as bool"),
    "active_set as a text": (pgd, {"eps": 0.1, "active_set": "no"}, TypeError, "active_set as bool"),
    "target is y": (pgd, {"eps": 0.1, "target": torch.tensor([0, 1, 2, 0])}, ValueError, "other than y"),
    "target as a number": (pgd, {"eps": 0.1, "target": 1}, TypeError, "target as int64"),
    "target too short": (pgd, {"eps": 0.1, "target": torch.tensor([1])}, ValueError, "target of shape"),
    "target beyond the classes": (
        pgd,
        {"eps": 0.1, "target": torch.tensor([1, 2, 0, 7])},
        ValueError,
        "got 7",
    ),
    "generator as a number": (
        pgd,
        {"eps": 0.1, "seed": None, "generator": 3},
        TypeError,
        "generator as Generator",
    ),
    "generator and seed": (pgd, {"eps": 0.1, "generator": torch.Generator()}, ValueError, "got both"),
    "gamma 1": (fmn, {"gamma": 1.0}, ValueError, "0 < gamma < 1"),
    "gamma a text": (fmn, {"gamma": "1"}, TypeError, "gamma as a number"),
    "area 0": (square, {"eps": 0.1, "area": 0.0}, ValueError, r"area in \(0, 1\]"),
    "area 2": (square, {"eps": 0.1, "area": 2.0}, ValueError, r"area in \(0, 1\]"),
    "frozen as a text": (square, {"eps": 0.1, "frozen": "yes"}, TypeError, "frozen as bool"),
    "square in L1": (square, {"eps": 0.1, "norm": 1}, ValueError, "norm 2 or math.inf for square"),
    "max_queries 0": (square, {"eps": 0.1, "max_queries": 0}, ValueError, "max_queries >= 1"),
    "budget too small": (suite, {"eps": 0.1, "budget": 3}, ValueError, "budget"),
    "budget None": (suite, {"eps": 0.1, "budget": None}, TypeError, "budget as an integer"),
    "num_steps None": (pgd, {"eps": 0.1, "num_steps": None}, TypeError, "num_steps as an integer"),
    "alpha beyond eps": (partial(pd.attacks.r_fgsm, seed=0), {"eps": 0.1, "alpha": 0.2}, ValueError, "alpha"),
    "momentum negative": (
        partial(pd.attacks.mim, seed=0),
        {"eps": 0.1, "momentum": -1.0},
        ValueError,
        "momentum >= 0",
    ),
    "init_c 0": (pd.attacks.cw, {"init_c": 0.0, "seed": 0}, ValueError, "init_c > 0"),
    "confidence negative": (pd.attacks.cw, {"confidence": -1.0, "seed": 0}, ValueError, "confidence >= 0"),
    "c as a text": (pd.attacks.cw_fixed, {"c": "1", "seed": 0}, TypeError, "c as a number"),
    "init_eps 0": (pd.attacks.ddn, {"init_eps": 0.0, "seed": 0}, ValueError, "init_eps > 0"),
    "start as a list": (
        pd.attacks.hop_skip_jump,
        {"start": [0.1], "seed": 0},
        TypeError,
        "start as a torch.Tensor",
    ),
    "start of another shape": (
        pd.attacks.hop_skip_jump,
        {"start": torch.rand(4, 7), "seed": 0},
        ValueError,
        r"start of shape \(batch, 6\)",
    ),
    "start outside": (
        pd.attacks.hop_skip_jump,
        {"start": torch.full((4, 6), 2.0), "seed": 0},
        ValueError,
        "start in",
    ),
    "hop_skip_jump in L1": (
        pd.attacks.hop_skip_jump,
        {"norm": 1, "seed": 0},
        ValueError,
        "norm 2 or math.inf",
    ),
    "inner as a text": (
        pd.attacks.substitute,
        {"eps": 0.1, "inner": "pgd", "seed": 0},
        TypeError,
        "inner as a function",
    ),
    "net as a module": (
        pd.attacks.substitute,
        {"eps": 0.1, "net": nn.Linear(6, 3), "seed": 0},
        TypeError,
        "net as a function",
    ),
    "known as a list": (
        pd.attacks.substitute,
        {"eps": 0.1, "known": [1.0], "seed": 0},
        TypeError,
        "known as a torch.Tensor",
    ),
}

MADE = {
    "worst_of nothing": (lambda w: pd.attacks.worst_of([]), ValueError, "at least one attack"),
    "worst_of one attack bare": (lambda w: pd.attacks.worst_of(pd.attacks.pgd), TypeError, "list of attacks"),
    "worst_of names": (lambda w: pd.attacks.worst_of(["pgd"]), TypeError, "attack as a function"),
    "worst_of with a rule's name": (
        lambda w: pd.attacks.worst_of([w.pgd], rule="vote"),
        TypeError,
        "rule as a function",
    ),
    "transfer of a name": (lambda w: pd.attacks.transfer("pgd", w.plain), TypeError, "attack as a function"),
    "transfer from a network": (lambda w: pd.attacks.transfer(w.pgd, w.net), TypeError, "deterministic"),
    "bpda of no module": (
        lambda w: enter(pd.attacks.bpda(w.net, {"nine": torch.tanh})),
        ValueError,
        "no module 'nine'",
    ),
    "bpda of no kind": (
        lambda w: enter(pd.attacks.bpda(w.net, {nn.GELU: torch.tanh})),
        ValueError,
        "no module",
    ),
    "bpda of a function": (lambda w: enter(pd.attacks.bpda(lambda x: x, {})), TypeError, "net as Module"),
    "bpda with a text": (lambda w: enter(pd.attacks.bpda(w.net, {"1": "tanh"})), TypeError, "surrogate"),
    "bpda with a list": (lambda w: enter(pd.attacks.bpda(w.net, [nn.ReLU])), TypeError, "surrogates"),
    "fpa of what does not adapt": (
        lambda w: pd.attacks.fpa(w.plain, *w.data, attack=w.pgd, seed=0),
        TypeError,
        "adaptive",
    ),
    "fpa with a name": (
        lambda w: pd.attacks.fpa(w.plain, *w.data, attack="pgd", seed=0),
        TypeError,
        "attack as a function",
    ),
    "gmsa combined otherwise": (
        lambda w: pd.attacks.gmsa(w.plain, *w.data, attack=w.pgd, combine="max", seed=0),
        ValueError,
        "combine 'max'; known: avg, min",
    ),
    "counted of a network": (lambda w: pd.counted(w.net), TypeError, "deterministic"),
    "with_draws of a name": (lambda w: pd.with_draws("pgd", 4), TypeError, "attack"),
    "with_draws of no draws": (lambda w: pd.with_draws(w.pgd, 0), ValueError, "num_samples >= 1"),
    "gradient_signal of a network": (
        lambda w: pd.attacks.diagnostics.gradient_signal(w.net, *w.data, seed=0),
        TypeError,
        "deterministic",
    ),
    "gradient_signal of one sample": (
        lambda w: pd.attacks.diagnostics.gradient_signal(w.plain, *w.data, num_samples=1, seed=0),
        ValueError,
        "num_samples >= 2",
    ),
    "a vector into a convolution": (
        lambda w: pgd(w.conv, *w.data, eps=0.1),
        ValueError,
        r"fit the network, got \(4, 6\)",
    ),
    "an active set on noise": (
        lambda w: pgd(w.noisy, *w.data, eps=0.1, active_set=True),
        ValueError,
        "active_set",
    ),
    "freezing what cannot freeze": (
        lambda w: square(lambda x: w.net(x)[None], *w.data, eps=0.1, frozen=True),
        ValueError,
        "frozen",
    ),
}


def enter(context):
    with context:
        pass


def call_with(attack, options):
    return lambda w: attack(w.plain, *w.data, **options)


CASES = [
    *(Case(name, call, kind, match) for name, (call, kind, match) in {**INPUTS, **LABELS, **MADE}.items()),
    *(
        Case(f"{name} under {label}", lambda w, f=make, a=attack: a(f(w), *w.data), kind, match)
        for name, (make, kind, match) in FUNCTIONS.items()
        for label, attack in {
            "pgd": partial(pgd, eps=0.1),
            "apgd": partial(pd.attacks.apgd, eps=0.1, seed=0),
        }.items()
    ),
    *(
        Case(name, call_with(attack, options), kind, match)
        for name, (attack, options, kind, match) in SETTINGS.items()
    ),
]


@pytest.mark.parametrize(**named(CASES))
def test_bad_inputs_of_attacks_are_refused(case):
    refused(case)
