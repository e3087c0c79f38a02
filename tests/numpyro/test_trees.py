"""Draws of any pytree, grouped by chain or not, and their ArviZ container."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import probdefense as pd
from probdefense.analysis import loo
from probdefense.numpyro import bridge

RNG = np.random.default_rng(0)
W, B = RNG.normal(size=(6, 4, 3)), RNG.normal(size=(6, 3))


class Position(NamedTuple):
    w: object
    b: object


def points(count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def exact(x):
    """In torch, for all six draws."""
    return x @ torch.tensor(W).float() + torch.tensor(B).float().unsqueeze(1)


class Frozen(dict):
    """A mapping that JAX does not know."""


TREES = {
    "a dict": (lambda w, b: {"w": w, "b": b}, lambda p: (p["w"], p["b"])),
    "a list": (lambda w, b: [w, b], lambda p: (p[0], p[1])),
    "a tuple": (lambda w, b: (w, b), lambda p: p),
    "a NamedTuple": (lambda w, b: Position(w, b), lambda p: (p.w, p.b)),
    "parameters of flax": (
        lambda w, b: Frozen({"params": Frozen({"Dense_0": {"kernel": w, "bias": b}})}),
        lambda p: (p["params"]["Dense_0"]["kernel"], p["params"]["Dense_0"]["bias"]),
    ),
    "tensors of torch": (lambda w, b: [torch.tensor(w), torch.tensor(b)], lambda p: (p[0], p[1])),
}


@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("name", TREES)
def test_any_tree_of_draws_gives_its_answers(name, chains):
    make, read = TREES[name]
    w, b = (W, B) if chains == 1 else (W.reshape(2, 3, 4, 3), B.reshape(2, 3, 3))

    def apply_fn(params, x):
        weight, bias = read(params)
        return x @ weight + bias

    posterior, (x, _) = bridge(apply_fn, make(w, b)), points()
    frozen = posterior.freeze(6)
    torch.testing.assert_close(frozen(x), exact(x)[frozen.members], rtol=1e-5, atol=1e-5)
    assert sorted(frozen.members.tolist()) == list(range(6))
    assert (posterior.num_draws, posterior.num_chains) == (6, chains)
    torch.testing.assert_close(posterior.mean()(x)[0], exact(x).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chains", [1, 2])
def test_one_array_of_draws_is_a_tree_too(chains):
    flat = np.concatenate([W.reshape(6, 12), B], axis=1)
    draws = flat if chains == 1 else flat.reshape(2, 3, 15)
    posterior = bridge(lambda theta, x: x @ theta[:12].reshape(4, 3) + theta[12:], jnp.asarray(draws))
    x, _ = points()
    frozen = posterior.freeze(6)
    torch.testing.assert_close(frozen(x), exact(x)[frozen.members], rtol=1e-5, atol=1e-5)
    assert posterior.num_chains == chains


def test_grouping_may_be_said():
    draws = {"k": np.arange(6.0).reshape(2, 3)}
    scalar = bridge(lambda p, x: p["k"] * jnp.ones((len(x), 2)), draws, group_by_chain=True)
    assert (scalar.num_draws, scalar.num_chains) == (6, 2)
    vector = bridge(lambda p, x: p["k"].sum() * jnp.ones((len(x), 2)), draws, group_by_chain=False)
    assert (vector.num_draws, vector.num_chains) == (2, 1)
    with pytest.raises(ValueError, match="whose axes are known"):
        bridge(lambda p, x: p["k"] * jnp.ones((len(x), 2)), draws).mean()
    with pytest.raises(ValueError, match="share a leading axis of draws"):
        bridge(lambda p, x: x, {"k": np.ones(3)}, group_by_chain=True)


@pytest.mark.parametrize("draws", [{"w": "text"}, ["a", "b"], {"w": object()}, [1.0]])
def test_what_is_no_array_is_refused(draws):
    with pytest.raises(TypeError, match="expected draws as Mapping, or another pytree, of arrays"):
        bridge(lambda params, x: x, draws)


@pytest.mark.parametrize("draws", [{}, [], ()])
def test_no_draws_are_refused(draws):
    with pytest.raises(ValueError, match="share a leading axis of draws"):
        bridge(lambda params, x: x, draws)


def test_arviz_sees_chains_draws_and_likelihoods():
    draws = {"layer": {"w": W.reshape(2, 3, 4, 3)}, "b": B.reshape(2, 3, 3)}
    posterior = bridge(lambda p, x: x @ p["layer"]["w"] + p["b"], draws)
    x, y = points()
    tree = pd.to_arviz(posterior, (x, y), adversarial={0.1: (x + 0.1).clamp(0, 1)})
    log_probs = exact(x).double().log_softmax(-1).unflatten(0, (2, 3))
    np.testing.assert_allclose(tree["posterior_predictive"]["probs"], log_probs.exp(), atol=1e-5)
    wanted = log_probs.gather(-1, y.expand(2, 3, 6).unsqueeze(-1)).squeeze(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], wanted, atol=1e-5)
    np.testing.assert_allclose(tree["posterior"]["layer.w"], W.reshape(2, 3, 4, 3), atol=1e-6)
    assert tree["predictions"]["probs"].shape == (2, 3, 1, 6, 3)
    assert pd.to_arviz(posterior, (x, y), num_samples=2)["posterior"]["b"].shape == (2, 2, 3)
    with pytest.raises(TypeError, match="needs data"):
        pd.to_arviz(posterior)


def test_arviz_gets_names_what_made_it_and_no_constants():
    draws = {"w": W, "x": B, "scale": np.full(6, 2.0)}
    posterior = bridge(lambda p, x: x @ p["w"] * p["scale"] + p["x"], draws)
    classes, files = ["cat", "dog", "owl"], [f"{k}.png" for k in range(6)]
    tree = pd.to_arviz(
        posterior,
        points(),
        seed=3,
        class_names=classes,
        coords={"example": files},
        dims={"w": ["pixel", "class"]},
    )
    for place in (tree, tree["posterior"]):
        assert [place.attrs[name] for name in ("library", "seed", "rule")] == ["probdefense", 3, "mean_prob"]
    assert tree["posterior"]["w"].dims == ("chain", "draw", "pixel", "class")
    assert list(tree["posterior_predictive"]["probs"]["class"].values) == classes
    assert list(tree["log_likelihood"]["y"]["example"].values) == files
    assert set(tree["posterior"].data_vars) == {"w", "x", "weight_rms"}
    assert np.asarray(tree["constant_data"]["scale"]).item() == 2.0
    rms = np.sqrt(np.square(W).mean((1, 2)))
    np.testing.assert_allclose(tree["posterior"]["weight_rms"].sel(parameter="w")[0], rms, rtol=1e-5)
    assert "w" in pd.to_arviz(bridge(lambda p, x: x @ p["w"], {"w": W[:1]}), points())["posterior"]
    with pytest.raises(ValueError, match="known: weight_rms, w"):
        pd.to_arviz(bridge(lambda p, x: x @ p["w"], {"w": W}), points(), dims={"b": ["class"]})


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_takes_it():
    w = RNG.normal(size=(2, 30, 4, 3))
    tree = pd.to_arviz(bridge(lambda p, x: x @ p, w), points())
    assert np.isfinite(loo(tree).elpd)
