"""Bad inputs to evaluate, certify, predict, compare and reports; what must work, works."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from tests.border.table import Case, World, named, refused, report

evaluate = partial(pd.evaluate, num_samples=2)


def on(make, kind, match):
    """An evaluation of other data."""
    return lambda w: evaluate(w.plain, make(w)), kind, match


DATA = {
    "a tensor": on(lambda w: w.x, TypeError, r"expected \(x, y\)"),
    "None": on(lambda w: None, TypeError, r"expected \(x, y\)"),
    "a text": on(lambda w: "digits", TypeError, r"expected \(x, y\)"),
    "a dictionary": on(lambda w: {"x": w.x, "y": w.y}, TypeError, r"expected \(x, y\).*dict"),
    "a function": on(lambda w: lambda: w.data, TypeError, r"expected \(x, y\)"),
    "a triple": on(lambda w: (w.x, w.y, w.y), (TypeError, ValueError), r"\(x, y\)"),
    "arrays": on(lambda w: (w.x.numpy(), w.y.numpy()), TypeError, "x as a torch.Tensor.*torch.as_tensor"),
    "lists": on(lambda w: (w.x.tolist(), w.y.tolist()), ValueError, r"batches \(x, y\), got 4 parts"),
    "labels as a list": on(lambda w: (w.x, [0, 1, 2, 0]), TypeError, "y as int64"),
    "labels of floats": on(lambda w: (w.x, w.y.float()), TypeError, "regression"),
    "labels one-hot": on(lambda w: (w.x, nn.functional.one_hot(w.y).float()), TypeError, "argmax"),
    "labels beyond": on(lambda w: (w.x, w.y + 1), ValueError, "y < 3"),
    "unequal lengths": on(lambda w: (w.x, w.y[:3]), ValueError, "one label per example"),
    "nothing": on(lambda w: (w.x[:0], w.y[:0]), ValueError, "at least one"),
    "no batches": on(lambda w: [], ValueError, "at least one"),
    "batches of triples": on(lambda w: [(w.x, w.y, w.y)], ValueError, "3 parts"),
    "batches of dictionaries": on(lambda w: [{"x": w.x}], ValueError, "dict"),
    "batches of tensors": on(lambda w: [w.x, w.y], ValueError, "Tensor"),
    "batches of lists": on(lambda w: [(w.x.tolist(), w.y)], TypeError, "x as a torch.Tensor"),
    "a shuffling loader": on(
        lambda w: DataLoader(TensorDataset(w.x, w.y), shuffle=True, generator=torch.Generator()),
        ValueError,
        "shuffle=False",
    ),
    "a data set of triples": on(lambda w: TensorDataset(w.x, w.y, w.y), ValueError, "3 parts"),
    "an empty data set": on(lambda w: TensorDataset(w.x[:0], w.y[:0]), ValueError, "at least one"),
    "integer images": on(lambda w: ((w.x * 255).byte(), w.y), TypeError, "divide integer images"),
    "NaN pixels": on(lambda w: (w.x * math.nan, w.y), ValueError, "NaN"),
}

SETTINGS = {
    "eps negative": ({"eps": -0.1}, ValueError, "eps >= 0"),
    "eps NaN": ({"eps": math.nan}, ValueError, "finite"),
    "eps a text": ({"eps": "0.1"}, TypeError, "eps"),
    "eps of texts": ({"eps": ["0.1"]}, TypeError, "eps"),
    "eps of nothing": ({"eps": []}, ValueError, "at least one eps"),
    "eps true": ({"eps": True}, TypeError, "eps"),
    "eps None": ({"eps": None}, TypeError, "eps"),
    "eps of two axes": ({"eps": torch.full((2, 2), 0.1)}, TypeError, "eps"),
    "eps a dictionary": ({"eps": {"a": 0.1}}, TypeError, "eps"),
    "norm 3": ({"norm": 3}, ValueError, "norm 1, 2 or"),
    "norm a text": ({"norm": "inf"}, ValueError, "norm 1, 2 or"),
    "num_samples 0": ({"num_samples": 0}, ValueError, "num_samples >= 1"),
    "num_samples a fraction": ({"num_samples": 2.0}, TypeError, "num_samples as an integer"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size >= 1"),
    "draw_chunk 0": ({"draw_chunk": 0}, ValueError, "draw_chunk >= 1"),
    "draw_chunk a text": ({"draw_chunk": "8"}, TypeError, "draw_chunk as an integer"),
    "estimand unknown": ({"estimand": "everyone"}, ValueError, "estimand 'everyone'; known: "),
    "estimand a number": ({"estimand": 1}, TypeError, "estimand as a text"),
    "rules of nothing": ({"rules": []}, ValueError, "at least one"),
    "rules twice": ({"rules": [pd.rules.vote, pd.rules.vote]}, ValueError, "different names"),
    "rules by name": ({"rules": ["vote"]}, TypeError, "rule as a function"),
    "rules bare": ({"rules": pd.rules.vote}, TypeError, "rules as list"),
    "a rule that decides": ({"rules": [lambda z: z.mean(0).argmax(-1)]}, ValueError, "rule to give"),
    "a name with a slash": ({"name": "a/b"}, ValueError, "without '/'"),
    "a name that is taken": ({"name": "worst"}, ValueError, "'worst'"),
    "no name": ({"name": ""}, ValueError, "names"),
    "a number for a name": ({"name": 3}, TypeError, "names .*text"),
    "attacks as a list": ({"attacks": [pd.attacks.fgsm]}, TypeError, "attacks as .*name"),
    "attacks bare": ({"attacks": pd.attacks.fgsm}, TypeError, "attacks as .*name"),
    "an attack by name": ({"attacks": {"pgd": "pgd"}}, TypeError, "attack 'pgd' as a function"),
    "an attack of no arguments": ({"attacks": {"mine": lambda: 0}}, TypeError, "attack 'mine' as a function"),
    "an attack called clean": ({"attacks": {"clean": pd.attacks.fgsm}}, ValueError, "'clean'"),
    "an attack of another norm": (
        {"attacks": {"fgsm": partial(pd.attacks.fgsm, norm=2)}},
        ValueError,
        "fixes norm=2",
    ),
    "an attack of a larger radius": (
        {"attacks": {"fgsm": partial(pd.attacks.fgsm, eps=0.3)}, "eps": 0.1},
        ValueError,
        "fixes eps=0.3",
    ),
    "an attack that gives nothing": (
        {"attacks": {"mine": lambda f, x, y: None}},
        TypeError,
        "'mine' .*NoneType",
    ),
    "an attack that gives labels": ({"attacks": {"mine": lambda f, x, y: y}}, ValueError, "'mine' .*shape"),
    "an attack that leaves the box": (
        {"attacks": {"mine": lambda f, x, y, *, eps: x + 2}},
        ValueError,
        "box",
    ),
    "an attack that leaves the ball": (
        {"attacks": {"mine": lambda f, x, y, *, eps: 1 - x}, "eps": 0.01},
        ValueError,
        "ball",
    ),
    "an attack that gives NaN": (
        {"attacks": {"mine": lambda f, x, y, *, eps: x * math.nan}},
        ValueError,
        "NaN|box",
    ),
    "a journal of a number": ({"journal": 3}, TypeError, "journal as str or PathLike"),
}

CALLS = {
    "evaluate a network": (lambda w: evaluate(w.net, w.data), TypeError, "deterministic"),
    "evaluate nothing": (lambda w: evaluate(None, w.data), TypeError, "LogitsFn"),
    "predict of a network": (lambda w: pd.predict(w.net, w.x), TypeError, "deterministic"),
    "predict of a list": (lambda w: pd.predict(w.plain, w.x.tolist()), TypeError, "x as a torch.Tensor"),
    "predict of bytes": (lambda w: pd.predict(w.plain, w.x.byte()), TypeError, "divide integer"),
    "predict of nothing": (lambda w: pd.predict(w.plain, w.x[:0]), ValueError, "at least one"),
    "predict of a vector": (lambda w: pd.predict(w.plain, w.x[0]), ValueError, "unsqueeze"),
    "predict of NaN": (lambda w: pd.predict(w.plain, w.x * math.nan), ValueError, "NaN"),
    "predict on the meta device": (lambda w: pd.predict(w.plain, w.x.to("meta")), ValueError, "meta device"),
    "predict of another width": (lambda w: pd.predict(w.plain, w.x[:, :5]), ValueError, "fit the network"),
    "predict of a vector by a convolution": (
        lambda w: pd.predict(w.conv, w.x),
        ValueError,
        "fit the network",
    ),
    "predict no draws": (lambda w: pd.predict(w.noisy, w.x, 0), ValueError, "num_samples >= 1"),
    "predict half a draw": (lambda w: pd.predict(w.noisy, w.x, 0.5), TypeError, "num_samples as an integer"),
    "predict at alpha 0": (lambda w: pd.predict(w.noisy, w.x, alpha=0.0), ValueError, "alpha > 0"),
    "predict at alpha 1": (lambda w: pd.predict(w.noisy, w.x, alpha=1.0), ValueError, "0 < alpha < 1"),
    "predict at a text": (lambda w: pd.predict(w.noisy, w.x, alpha="5%"), TypeError, "alpha as a number"),
    "predict of NaN logits": (
        lambda w: pd.predict(w.answering(lambda z: z * math.nan), w.x),
        FloatingPointError,
        "4 of 4",
    ),
    "predict of a tuple": (
        lambda w: pd.predict(w.answering(lambda z: (z,)), w.x),
        TypeError,
        r"net\(x\)\[0\]",
    ),
    "predict of one logit": (
        lambda w: pd.predict(w.answering(lambda z: z[:, :1]), w.x),
        ValueError,
        "TwoLogits",
    ),
    "predict of four axes": (
        lambda w: pd.predict(w.answering(lambda z: z[..., None, None]), w.x),
        ValueError,
        "flatten",
    ),
    "evaluate a dictionary": (
        lambda w: evaluate(w.answering(lambda z: {"logits": z}), w.data),
        TypeError,
        r"net\(x\)\['logits'\]",
    ),
    "certify a plain defense": (lambda w: pd.certify(w.plain, w.x, n0=1, n=1), ValueError, "no certificate"),
    "certify a network": (lambda w: pd.certify(w.net, w.x), TypeError, "Defense"),
    "certify a function": (lambda w: pd.certify(lambda x: x, w.x), TypeError, "Defense"),
    "certify a list": (
        lambda w: pd.certify(w.noisy, w.x.tolist(), seed=0),
        (TypeError, ValueError),
        r"expected .*\(x, y\)|x as",
    ),
    "certify nothing": (lambda w: pd.certify(w.noisy, w.x[:0], seed=0), ValueError, "at least one"),
    "certify without votes": (lambda w: pd.certify(w.noisy, w.x, n=0), ValueError, "n >= 1"),
    "certify without a choice": (lambda w: pd.certify(w.noisy, w.x, n0=0), ValueError, "n0 >= 1"),
    "certify at alpha 1": (lambda w: pd.certify(w.noisy, w.x, alpha=1.0), ValueError, "0 < alpha < 1"),
    "certify a negative radius": (
        lambda w: pd.certify(w.noisy, w.x, target_radius=-1.0),
        ValueError,
        "target_radius > 0",
    ),
    "certify a text of a radius": (
        lambda w: pd.certify(w.noisy, w.x, target_radius="1"),
        TypeError,
        "target_radius as a number",
    ),
    "a curve of other labels": (
        lambda w: certificate(w).curve(w.y[:2], [0.1]),
        ValueError,
        "one label per example",
    ),
    "a curve of text": (lambda w: certificate(w).curve(w.y, "0.1"), TypeError, "radius"),
    "a curve of negative radii": (lambda w: certificate(w).curve(w.y, [-0.1]), ValueError, "radi"),
    "compare other examples": (
        lambda w: pd.compare(evaluate(w.plain, w.data), evaluate(w.plain, (w.x, 2 - w.y))),
        ValueError,
        "on the same examples, got",
    ),
    "compare other norms": (
        lambda w: pd.compare(evaluate(w.plain, w.data), evaluate(w.plain, w.data, norm=2)),
        ValueError,
        "norm differ",
    ),
    "compare a text": (lambda w: pd.compare("a", report()), TypeError, "Report"),
    "compare defenses": (lambda w: pd.compare(w.plain, w.noisy), TypeError, "Report"),
    "compare nothing": (lambda w: pd.compare([], []), ValueError, "one report per seed"),
    "compare unequal numbers": (
        lambda w: pd.compare([report()], [report()] * 2),
        ValueError,
        "one report per seed",
    ),
    "compare empty reports": (lambda w: pd.compare(pd.Report([]), pd.Report([])), ValueError, "rows"),
    "compare_all of one": (lambda w: pd.compare_all(report()), ValueError, "two defenses"),
    "compare_all of nothing": (lambda w: pd.compare_all([]), ValueError, "two defenses"),
    "compare_all of text": (lambda w: pd.compare_all("report"), TypeError, "Report"),
    "compare_all by an unknown rule": (
        lambda w: pd.compare_all(two(w), rule="median"),
        ValueError,
        "rule 'median'; known",
    ),
    "a row that is not there": (lambda w: report().row(attack="cw"), ValueError, "expected one row"),
    "a defense that is not there": (lambda w: report().only("other"), ValueError, "expected one of defense"),
    "a curve that is not there": (lambda w: report().curve("cw", "mean_prob"), ValueError, "known: clean"),
    "radii of a fixed budget": (
        lambda w: report().curve("fgsm", "mean_prob", radii=[0.1]),
        ValueError,
        "fixed budget",
    ),
    "report plus a text": (lambda w: report() + "more", TypeError, "expected a Report"),
    "report plus itself": (lambda w: report() + report(), ValueError, "row in common"),
    "a report from nowhere": (lambda w: pd.Report.load("/nowhere/at/all"), OSError, "No such file|expected"),
    "checks of a network": (lambda w: checks(w, w.net), TypeError, "deterministic"),
    "checks of other labels": (lambda w: checks(w, w.plain, y=w.y + 1), ValueError, "y < 3"),
    "checks of lists": (lambda w: checks(w, w.plain, x=w.x.tolist()), TypeError, "x as a torch.Tensor"),
    "checks of listed labels": (lambda w: checks(w, w.plain, y=[0, 1, 2, 0]), TypeError, "y as int64"),
    "checks at no radius": (lambda w: checks(w, w.plain, eps=0.0), ValueError, "eps > 0"),
    "checks at a text": (lambda w: checks(w, w.plain, eps="0.1"), TypeError, "eps as a number"),
    "checks at several radii": (
        lambda w: checks(w, w.plain, eps=torch.full((4,), 0.1)),
        TypeError,
        "eps as a number",
    ),
    "checks in norm 3": (lambda w: checks(w, w.plain, norm=3), ValueError, "norm 1, 2"),
    "checks without gradients": (
        lambda w: checks(w, w.plain, num_gradients=0),
        ValueError,
        "num_gradients >= 1",
    ),
    "checks of noise with few gradients": (
        lambda w: checks(w, w.noisy, num_gradients=4),
        ValueError,
        "num_gradients >= 10, got 4",
    ),
    "checks without verdicts": (lambda w: checks(w, w.plain, num_verdict=0), ValueError, "num_verdict >= 1"),
    "checks without samples": (lambda w: checks(w, w.plain, num_samples=0), ValueError, "num_samples >= 1"),
    "checks by a rule's name": (lambda w: checks(w, w.plain, rule="vote"), TypeError, "rule as a function"),
    "checks by a loss's name": (lambda w: checks(w, w.plain, loss="ce"), TypeError, "loss as a function"),
    "checks by an attack's name": (
        lambda w: checks(w, w.plain, gradient_free="square"),
        TypeError,
        "gradient_free as a function",
    ),
    "checks by an attack without radius": (
        lambda w: checks(w, w.plain, gradient_free=lambda f, x, y: x),
        TypeError,
        "gradient_free as a function",
    ),
    "checks of NaN": (lambda w: checks(w, w.answering(lambda z: z * math.nan)), FloatingPointError, "4 of 4"),
    "checks of one logit": (lambda w: checks(w, w.answering(lambda z: z[:, :1])), ValueError, "TwoLogits"),
    "checks of a tuple": (lambda w: checks(w, w.answering(lambda z: (z, z))), TypeError, r"net\(x\)\[0\]"),
    "a check that is not there": (
        lambda w: pd.checks.Checks((pd.checks.Check("logits", "ok", ""),))["luck"],
        ValueError,
        "check 'luck'; known: logits",
    ),
}


def certificate(w):
    return pd.certify(w.noisy, w.x, n0=2, n=4, seed=0)


def two(w):
    return evaluate(w.plain, w.data, name="a") + evaluate(w.plain, w.data, name="b")


def checks(w, function, **options):
    data = {"x": w.x, "y": w.y, "eps": 0.1, "num_gradients": 2, "num_verdict": 2, "num_samples": 2} | options
    return pd.checks.run(function, data.pop("x"), data.pop("y"), **data)


CASES = [
    *(Case(f"data: {name}", *row) for name, row in DATA.items()),
    *(
        Case(name, lambda w, o=options: evaluate(w.plain, w.data, **o), kind, match)
        for name, (options, kind, match) in SETTINGS.items()
    ),
    *(Case(name, *row) for name, row in CALLS.items()),
]


@pytest.mark.parametrize(**named(CASES))
def test_bad_inputs_of_evaluations_are_refused(case):
    refused(case)


def test_examples_in_every_form_are_the_same_examples():
    world = World()
    wanted = evaluate(world.plain, world.data).rows
    whole = TensorDataset(*world.data)
    pairs = [(world.x[:3], world.y[:3]), [world.x[3:], world.y[3:]]]
    for data in (whole, DataLoader(whole, batch_size=3), pairs, iter(pairs), [world.data]):
        assert evaluate(world.plain, data).rows == wanted


@pytest.mark.parametrize(
    "eps", [torch.tensor([0.1, 0.2]), np.array([0.1, 0.2]), (0.1, np.float64(0.2)), [torch.tensor(0.1), 0.2]]
)
def test_radii_in_every_form_are_the_same_radii(eps):
    world, attacks = World(), {"fgsm": pd.attacks.fgsm}
    found = evaluate(world.plain, world.data, attacks, eps=eps)
    wanted = evaluate(world.plain, world.data, attacks, eps=[0.1, 0.2])
    assert [row["accuracy"] for row in found.rows] == [row["accuracy"] for row in wanted.rows]
    assert [row["eps"] for row in found.rows] == pytest.approx([row["eps"] for row in wanted.rows], rel=1e-6)


def test_settings_of_numpy_are_saved(tmp_path):
    world = World()
    options = {
        "num_samples": np.int64(2),
        "seed": np.int32(3),
        "eps": np.float32(0.25),
        "norm": np.float64(2),
    }
    found = pd.evaluate(world.plain, world.data, {"fgsm": pd.attacks.fgsm}, chunk_size=np.int64(3), **options)
    assert pd.Report.load(found.save(tmp_path)).rows == found.rows


def test_pixels_that_rounding_carried_out_count_as_on_the_edge():
    world = World()
    edge = torch.ones(4, 6)
    out = edge + 1.2e-7
    assert evaluate(world.plain, (out, world.y)).rows == evaluate(world.plain, (edge, world.y)).rows
    found, wanted = (pd.predict(world.plain, x).log_probs for x in (out, edge))
    assert torch.equal(found, wanted)
    assert float(out.max()) > 1, "the caller's own tensor stays as it is"
