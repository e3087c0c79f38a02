"""Any value in any place of the public API: an answer, or a refusal of ours that leaves all as it was."""

import math
import warnings
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from matplotlib import pyplot
from torch import nn

import probdefense as pd
from probdefense import detection, losses, objectives
from tests.border.table import ALLOWED, World, prediction, raised_by_us, report, unchanged

log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(4, 1)
scores = torch.tensor([0.1, 0.2, 0.3])


def tensors():
    shapes = st.sampled_from([(), (1,), (4,), (3,), (0,), (4, 6), (4, 3), (2, 4, 3), (4, 1, 6), (1, 4, 6, 1)])
    kinds = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.bool,
        torch.complex64,
    ]
    values = st.sampled_from([0, 1, 2, -1, 0.5, math.nan, math.inf])

    def made(shape, kind, value):
        whole = not kind.is_floating_point and not kind.is_complex
        return torch.full(
            shape, int(value) if whole and math.isfinite(value) else 0 if whole else value, dtype=kind
        )

    return st.builds(made, shapes, st.sampled_from(kinds), values)


def junk():
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 12),
        st.just(2**70),
        st.floats(),
        st.sampled_from(["", "x", "inf", "mean_prob"]),
    )
    others = [
        b"",
        object(),
        int,
        nn.Linear,
        nn.ReLU(),
        len,
        lambda: 0,
        lambda *a, **k: None,
    ]
    nested = st.one_of(
        st.lists(plain, max_size=3), st.dictionaries(st.sampled_from(["a", "b"]), plain, max_size=2)
    )
    arrays = tensors().map(lambda t: t.numpy())
    numbers = st.sampled_from(
        [np.int64(1), np.float32(0.5), np.float64(math.nan), np.bool_(True), np.str_("a")]
    )
    return st.one_of(plain, nested, tensors(), arrays, numbers, st.sampled_from(others))


def attack(one, **options):
    return lambda w: (one, {"logits_fn": w.plain, "x": w.x, "y": w.y, "seed": 0, **options})


ATTACKS = {
    "fgsm": attack(pd.attacks.fgsm, eps=0.1, norm=2, step_size=0.1, random_start=True, repeats=1),
    "pgd": attack(
        pd.attacks.pgd,
        eps=0.1,
        norm=math.inf,
        num_steps=1,
        num_restarts=1,
        rule=pd.rules.vote,
        loss=losses.dlr,
    ),
    "apgd": attack(pd.attacks.apgd, eps=0.1, num_steps=2, target=torch.tensor([1, 2, 0, 1]), max_batch=3),
    "cw": attack(pd.attacks.cw, num_steps=1, num_searches=1, step_size=0.1, init_c=0.1, confidence=0.0),
    "fmn": attack(pd.attacks.fmn, norm=2, num_steps=1, gamma=0.1, step_size=1.0),
    "ddn": attack(pd.attacks.ddn, num_steps=1, init_eps=0.1, gamma=0.1),
    "deepfool": attack(pd.attacks.deepfool, num_steps=1, num_candidates=2, overshoot=0.02),
    "square": attack(pd.attacks.square, eps=0.1, max_queries=4, area=0.5, frozen=False),
    "spsa": attack(pd.attacks.spsa, eps=0.1, max_queries=20, num_directions=2, h=0.01, learning_rate=0.01),
}

CALLS = {
    "predict": lambda w: (
        pd.predict,
        {"logits_fn": w.noisy, "x": w.x, "num_samples": 2, "alpha": None, "seed": 0},
    ),
    "certify": lambda w: (
        pd.certify,
        {"defense": w.noisy, "data": w.x, "n0": 2, "n": 2, "alpha": 0.1, "target_radius": 0.1, "seed": 0},
    ),
    "evaluate": lambda w: (
        pd.evaluate,
        {
            "logits_fn": w.plain,
            "data": w.data,
            "attacks": {"fgsm": pd.attacks.fgsm},
            "norm": math.inf,
            "eps": 0.1,
            "rules": [pd.rules.vote],
            "num_samples": 2,
            "seed": 0,
            "name": "a",
            "estimand": "population",
            "chunk_size": 3,
            "draw_chunk": None,
        },
    ),
    "checks": lambda w: (
        pd.checks.run,
        {"logits_fn": w.plain, "x": w.x, "y": w.y, "eps": 0.1, "norm": 2, "rule": pd.rules.vote, "seed": 0}
        | {"num_gradients": 2, "num_samples": 1, "num_verdict": 2, "loss": losses.margin},
    ),
    "bayesian": lambda w: (
        pd.defenses.bayesian,
        {"net": w.net, "num_data": 4, "prior": None, "init_scale": 0.1, "family": dist.Normal, "floor": 0.0}
        | {"where": None, "layout": "flat"},
    ),
    "rse": lambda w: (
        pd.defenses.rse,
        {
            "net": w.net,
            "num_data": 4,
            "sigma_init": 0.1,
            "sigma_inner": 0.1,
            "scale": "fixed",
            "before_linear": True,
        }
        | {"scale_shape": "scalar", "init_at": "input", "family": None, "floor": 0.0, "when": "always"},
    ),
    "pni": lambda w: (pd.defenses.pni, {"net": w.net, "num_data": 4, "alpha_init": 0.1, "place": "weight"}),
    "jump_relu": lambda w: (
        pd.defenses.jump_relu,
        {"net": w.net, "kappa": 0.1, "where": None, "num_data": 4},
    ),
    "rse of a covariance": lambda w: (
        pd.defenses.rse,
        {"net": w.net, "scale": "learned", "covariance": "full", "before_linear": True, "after": None},
    ),
    "wca": lambda w: (pd.defenses.wca, {"net": w.net, "layer": None, "num_data": 4, "example": w.x}),
    "conditional_noise": lambda w: (
        pd.defenses.conditional_noise,
        {"net": w.net, "layer": None, "hidden": 3, "num_data": 4},
    ),
    "random_transforms": lambda w: (
        pd.defenses.random_transforms,
        {"net": w.net, "transforms": [pd.nn.transforms.Shift(0.1)], "count": 1, "num_data": 4},
    ),
    "shift": lambda w: (pd.nn.transforms.Shift, {"scale": 0.1, "learned": True}),
    "jpeg": lambda w: (pd.nn.transforms.Jpeg, {"scale": 0.1}),
    "rewarded": lambda w: (
        objectives.rewarded,
        {"objective": objectives.elbo, "weight": 0.1, "reward": objectives.entropy},
    ),
    "harmonic": lambda w: (objectives.harmonic, {"weight": 1.0, "num_steps": 3}),
    "mc_dropout": lambda w: (pd.defenses.mc_dropout, {"net": w.net, "rate": 0.1, "num_data": 4}),
    "brelu": lambda w: (pd.defenses.brelu, {"net": w.net, "ceiling": 1.0, "num_data": 4}),
    "ensemble": lambda w: (pd.defenses.ensemble, {"nets": [w.net, w.net], "num_data": 4}),
    "expected_cross_entropy": lambda w: (losses.expected_cross_entropy, {"logits": w.logits, "y": w.y}),
    "dlr": lambda w: (losses.dlr, {"logits": w.logits, "y": w.y}),
    "vote": lambda w: (pd.rules.vote, {"logits": w.logits}),
    "mean_prob": lambda w: (pd.rules.mean_prob, {"logits": w.logits}),
    "calibration": lambda w: (pd.calibration.calibration, {"log_probs": log_probs, "y": w.y, "num_bins": 3}),
    "auroc": lambda w: (detection.auroc, {"familiar": scores, "strange": scores}),
    "threshold": lambda w: (detection.threshold, {"familiar": scores, "keep": 0.5}),
    "select": lambda w: (detection.select, {"score": scores, "correct": scores > 0, "limit": 0.2}),
    "uncertainty": lambda w: (detection.uncertainty, {"report": report(), "keep": 0.5}),
    "evading": lambda w: (
        detection.evading,
        {"score": detection.mutual_information, "loss": None, "weight": 1.0},
    ),
    "adversarial": lambda w: (
        objectives.adversarial,
        {"objective": objectives.elbo, "attack": w.pgd, "num_samples": 1},
    ),
    "mixed": lambda w: (objectives.mixed, {"objective": objectives.elbo, "attack": w.pgd, "weight": 0.5}),
    "trades": lambda w: (objectives.trades, {"attack": w.pgd, "beta": 1.0}),
    "augmented": lambda w: (objectives.gaussian_augmented, {"objective": objectives.elbo, "sigma": 0.1}),
    "distilled": lambda w: (objectives.distilled, {"teacher": w.plain, "temperature": 2.0}),
    "compare": lambda w: (pd.compare, {"reports_a": report(), "reports_b": report()}),
    "accuracy_chart": lambda w: (pd.analysis.accuracy_chart, {"report": report(), "rule": None, "eps": 0.1}),
    "reliability": lambda w: (
        pd.analysis.reliability,
        {"predictions": prediction(), "y": w.y, "num_bins": 3},
    ),
    "loss_traces": lambda w: (pd.analysis.loss_traces, {"losses": {"a": np.zeros((3, 2))}}),
    "image_grid": lambda w: (pd.analysis.image_grid, {"x": w.images, "x_adv": w.images, "amplify": 2.0}),
    **ATTACKS,
}

FITS = {
    "fit": lambda w: (
        partial(pd.fit, progress=False),
        {"defense": w.bayes, "loader": w.loader, "epochs": 1, "objective": objectives.elbo, "seed": 0}
        | {"optimizer": None, "schedule": None, "callbacks": (), "max_grad_norm": 1.0, "kl_schedule": None},
    ),
}
"""What changes a defense when it is right: only its refusals leave it as it was."""


@pytest.mark.slow
@pytest.mark.parametrize("name", {**CALLS, **FITS})
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_anything_anywhere_is_answered_or_refused_in_our_words(name, data):
    world = World()
    function, options = {**CALLS, **FITS}[name](world)
    for place in data.draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=2, unique=True)):
        options[place] = data.draw(junk(), label=place)
    before = world.state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(**options)
        except Exception as error:
            assert isinstance(error, ALLOWED), f"{type(error).__name__}: {error}"
            assert raised_by_us(error), f"raw {type(error).__name__}: {error}"
        else:
            if name in FITS:
                return
        finally:
            pyplot.close("all")
    drawn = {"random": torch.get_rng_state()} if options.get("seed", 0) is None else {}
    unchanged(before | {"figures": []} | drawn, world.state())
