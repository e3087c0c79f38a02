"""ArviZ containers, under 0.23 and 1.x alike: this file must not need numpyro."""

import math

import arviz
import matplotlib
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import probdefense as pd
from probdefense import analysis
from probdefense.analysis import fits, to_arviz
from probdefense.analysis.fits import noise_scales
from tests.contract import BUILDERS, defended
from tests.core.test_own_programs import autoguided, make
from tests.worlds import FAILURE_RATE, tiny_batch, tiny_net

matplotlib.use("Agg")

pytestmark = [
    # a constant in two chains has no variance within them
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered in:RuntimeWarning"),
    # ArviZ 0.23 calls pandas in a way that pandas 4 will refuse
    pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The inplace keyword:FutureWarning"),
    # ArviZ 0.23 calls matplotlib in a way that 3.13 will refuse
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
]


def linear_defense(scale=0.3):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return pd.defenses.bayesian(nn.Linear(4, 3), num_data=50, init_scale=scale)


def flat_batch(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def values(tree, group, name):
    return np.asarray(tree[group][name])


def groups(tree):
    return set(tree.children) if hasattr(tree, "children") else set(tree.groups())


# What the numbers are


def test_noise_scales_are_those_of_the_layers():
    defense = pd.defenses.rse(tiny_net(), sigma_init=0.25, sigma_inner=0.125)
    scale = to_arviz(defense, tiny_batch(), num_samples=3)["constant_data"]["noise_scale"]
    assert scale.dims == ("noise_layer",) and np.asarray(scale).tolist() == [0.25, 0.125]
    assert list(scale["noise_layer"].values) == list(defense.sites)
    two = to_arviz([defense, defense], tiny_batch(), num_samples=3)["constant_data"]["noise_scale"]
    assert two.dims == ("chain", "noise_layer") and np.asarray(two).tolist() == [[0.25, 0.125]] * 2


def test_scales_of_a_layer_with_several_are_kept_one_by_one_beside_their_mean_square():
    defense = pd.defenses.rse(tiny_net(), scale="learned", scale_shape="channel")
    layer = defense.net.get_submodule("4.noise")
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([0.1, 0.2, 0.3]).log().view(3, 1, 1))
    tree = to_arviz(defense, tiny_batch(), num_samples=2)
    assert values(tree, "constant_data", "noise_scale.4.noise") == pytest.approx([0.1, 0.2, 0.3])
    mean_square = math.sqrt((0.01 + 0.04 + 0.09) / 3)
    assert values(tree, "constant_data", "noise_scale")[1] == pytest.approx(mean_square)


def test_a_variational_scale_is_the_layers_times_the_posteriors():
    defense = pd.defenses.rse(tiny_net(), scale="variational", sigma_inner=0.2, num_data=50)
    with torch.no_grad():
        for posterior in defense.guide.posteriors.values():
            posterior.log_scale.fill_(math.log(0.5))
    assert float(noise_scales(defense)["4.noise"]) == pytest.approx(0.1)


@pytest.mark.parametrize("random", [False, True])
def test_the_scale_of_weight_noise_is_its_coefficient_times_the_spread_of_the_weights(random):
    net = tiny_net()
    spread = float(net[7].weight.detach().std(correction=0))
    defense = pd.defenses.pni(pd.defenses.bayesian(net) if random else net, alpha_init=0.25)
    scale = noise_scales(defense)["7.weight"]
    assert scale.shape == (3, 16) and float(scale.std()) < 1e-6
    assert float(scale.mean()) == pytest.approx(0.25 * spread, rel=1e-5)


def test_weight_scale_signal_and_prior_are_those_of_the_guide_and_the_model():
    defense = pd.defenses.bayesian(tiny_net(), prior=dist.Normal(0.0, 2.0), init_scale=0.05)
    tree = to_arviz(defense, tiny_batch(), num_samples=2)
    assert list(tree["constant_data"]["parameter"].values) == [
        "1.weight",
        "4.weight",
        "4.bias",
        "7.weight",
        "7.bias",
    ]
    assert values(tree, "constant_data", "weight_scale") == pytest.approx(np.full(5, 0.05))
    assert values(tree, "constant_data", "prior_scale") == pytest.approx(np.full(5, 2.0))
    (site,) = defense.sites.values()
    ratio = site.views(defense.guide.posteriors["weights"].loc.detach())["4.weight"].abs().median() / 0.05
    assert values(tree, "constant_data", "signal_to_noise")[1] == pytest.approx(float(ratio), rel=1e-4)


def test_log_likelihood_and_predictive_by_hand_from_the_draws_of_the_weights():
    defense, (x, y) = linear_defense(), flat_batch()
    tree = to_arviz(defense, (x, y), num_samples=7)
    weight, bias = (torch.tensor(values(tree, "posterior", name)[0]) for name in ("weight", "bias"))
    assert weight.shape == (7, 3, 4) and float(weight.std(0).min()) > 0.05
    log_probs = (x @ weight.transpose(1, 2) + bias.unsqueeze(1)).log_softmax(-1)
    by_hand = log_probs[:, torch.arange(len(y)), y]
    assert values(tree, "log_likelihood", "y")[0] == pytest.approx(by_hand.numpy(), abs=1e-5)
    assert values(tree, "posterior_predictive", "probs")[0] == pytest.approx(
        log_probs.exp().numpy(), abs=1e-5
    )


def test_log_likelihood_does_not_underflow():
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[200.0] * 4, [0.0] * 4]))
        net.bias.zero_()
    tree = to_arviz(pd.deterministic(net), (torch.ones(1, 4), torch.tensor([1])))
    assert values(tree, "log_likelihood", "y").item() == pytest.approx(-800.0)
    confident = to_arviz(pd.deterministic(net), (torch.full((1, 4), 0.03), torch.tensor([0])))
    assert values(confident, "log_likelihood", "y").item() == pytest.approx(-math.exp(-24), rel=1e-4)


def test_the_sampled_labels_follow_the_probabilities():
    tree = to_arviz(linear_defense(0.01), flat_batch(1), num_samples=4000)
    probs = values(tree, "posterior_predictive", "probs")[0, :, 0].mean(0, dtype=np.float64)
    counts = np.bincount(values(tree, "posterior_predictive", "y")[0, :, 0], minlength=3)
    assert stats.chisquare(counts, 4000 * probs / probs.sum()).pvalue > FAILURE_RATE
    assert stats.chisquare(counts, 4000 * np.roll(probs, 1) / probs.sum()).pvalue < FAILURE_RATE


# How they are arranged


def test_axes_have_names_and_coordinates():
    x, y = flat_batch(5)
    tree = to_arviz(linear_defense(), (x, y), num_samples=2, adversarial={0.1: x, 0.2: 1 - x})
    probs, attacked = tree["posterior_predictive"]["probs"], tree["predictions"]["probs"]
    assert probs.dims == ("chain", "draw", "example", "class")
    assert attacked.dims == ("chain", "draw", "eps", "example", "class")
    assert attacked["eps"].values.tolist() == [0.1, 0.2]
    assert np.array_equal(np.asarray(attacked.sel(eps=0.1)), np.asarray(probs))  # the same draws
    assert not np.allclose(np.asarray(attacked.sel(eps=0.2)), np.asarray(probs))
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "example")
    assert values(tree, "observed_data", "y").tolist() == y.tolist()
    assert np.array_equal(values(tree, "constant_data", "x"), x.numpy())


def test_chains_are_independent_fits():
    data = flat_batch()
    one, two, other = linear_defense(), linear_defense(), linear_defense()
    with torch.no_grad():
        other.guide.posteriors["weights"].loc.add_(torch.randn(15))
    alone = to_arviz(one, data, num_samples=50)
    assert "R-hat and ESS say nothing" in alone["posterior_predictive"].attrs["chains"]
    for second, agree in ((two, True), (other, False)):
        tree = to_arviz([one, second], data, num_samples=200)
        assert values(tree, "posterior", "weight").shape == (2, 200, 3, 4)
        assert "2 independent fits" in tree["posterior_predictive"].attrs["chains"]
        r_hat = arviz.rhat(tree["log_likelihood"]["y"])
        worst = float(np.max(np.asarray(r_hat["y"] if hasattr(r_hat, "data_vars") else r_hat)))
        assert (worst < 1.1) == agree


def test_the_same_seed_gives_the_same_container():
    defense, data = linear_defense(), flat_batch()
    first, second, other = (to_arviz(defense, data, num_samples=3, seed=seed) for seed in (4, 4, 5))
    for group, name in (("posterior", "weight"), ("posterior_predictive", "y"), ("log_likelihood", "y")):
        assert np.array_equal(values(first, group, name), values(second, group, name))
    assert not np.array_equal(values(first, "posterior", "weight"), values(other, "posterior", "weight"))


def test_only_the_last_layer_unless_all_weights_are_asked_for(monkeypatch):
    defense, data = pd.defenses.bayesian(tiny_net()), tiny_batch()
    names = set(to_arviz(defense, data, num_samples=2)["posterior"].data_vars)
    assert {"7.weight", "7.bias"} < names and "4.weight" not in names
    names = set(to_arviz(defense, data, num_samples=2, weights=True)["posterior"].data_vars)
    assert {"1.weight", "4.weight", "7.weight"} < names
    monkeypatch.setattr(fits, "LAST_LAYER", 10)
    assert "7.weight" not in to_arviz(defense, data, num_samples=2)["posterior"].data_vars
    monkeypatch.setattr(fits, "MAX_VALUES", 100)
    with pytest.raises(ValueError, match="380 numbers, more than 100; lower num_samples"):
        to_arviz(defense, data, num_samples=2, weights=True)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder(name):
    defense, data = defended(name), tiny_batch(4)
    tree = to_arviz(defense, data, num_samples=6)
    draws = 6 if defense.stochastic else 1
    assert values(tree, "posterior_predictive", "probs").shape == (1, draws, 4, 3)
    scales = noise_scales(defense)
    if scales:
        assert list(tree["constant_data"]["noise_layer"].values) == list(scales)
        assert values(tree, "constant_data", "noise_scale").min() >= 0
    assert not defense.stochastic or len(arviz.summary(tree, kind="stats")) > 0
    for name in tree["posterior"].data_vars:
        varies = values(tree, "posterior", name).std(1, dtype=np.float64) > 0
        assert varies.all() if defense.stochastic else not varies.any(), name


@pytest.mark.parametrize("make_defense", [make, autoguided])
def test_a_users_own_model_and_guide(make_defense):
    data = flat_batch()
    tree = to_arviz(make_defense(), data, num_samples=5)
    weight = values(tree, "posterior", "linear.weight")
    assert weight.shape == (1, 5, 3, 4) and weight.std(1).min() > 0
    assert "eps" not in tree["posterior"].data_vars  # drawn for every example
    assert values(tree, "constant_data", "weight_scale")[0] == pytest.approx(
        math.sqrt(weight[0].var(0).mean()), rel=1e-4
    )


def test_the_package_finds_it_when_asked():
    assert pd.to_arviz is to_arviz and pd.analysis is analysis
    assert {"analysis", "numpyro", "to_arviz"} <= set(dir(pd)) & set(pd.__all__)
    with pytest.raises(AttributeError, match="module 'probdefense' has no attribute 'nothing'"):
        _ = pd.nothing


def test_what_is_refused():
    x, y = flat_batch()
    with pytest.raises(
        TypeError, match="expected a Defense, a list of them, a Report or a Prediction, got Linear"
    ):
        to_arviz(nn.Linear(4, 3), (x, y))
    with pytest.raises(TypeError, match=r"a defense needs data=\(x, y\)"):
        to_arviz(linear_defense())
    with pytest.raises(ValueError, match="fits of one kind of defense"):
        to_arviz([linear_defense(), pd.defenses.rse(nn.Linear(4, 3), before_linear=True)], (x, y))


# Reports and predictions


def report_of(correct):
    rows = [
        {
            "defense": "net",
            "attack": attack,
            "eps": eps,
            "rule": "mean_prob",
            "gradients": 0,
            "attack_samples": None,
        }
        for attack, eps in (("clean", 0.0), ("pgd", 0.1))
    ]
    arrays = dict(
        zip(("correct/net/clean/0/mean_prob", "correct/net/pgd/0.1/mean_prob"), correct, strict=True)
    )
    return pd.Report(rows, {"norm": "inf"}, arrays)


def test_accuracies_of_a_report_have_jeffreys_posterior():
    correct = np.arange(20) < 17
    tree = to_arviz(report_of([correct[None], np.ones((1, 20), bool)]), num_samples=2000)
    accuracy = values(tree, "posterior", "accuracy")[0]
    assert accuracy.shape == (2000, 2)
    assert stats.kstest(accuracy[:, 0], stats.beta(17.5, 3.5).cdf).pvalue > FAILURE_RATE
    assert stats.kstest(accuracy[:, 1], stats.beta(20.5, 0.5).cdf).pvalue > FAILURE_RATE  # never degenerate
    assert stats.kstest(accuracy[:, 0], stats.beta(18.5, 2.5).cdf).pvalue < FAILURE_RATE
    assert tree["posterior"]["row"].values.tolist() == ["net/clean/0/mean_prob", "net/pgd/0.1/mean_prob"]
    assert values(tree, "observed_data", "correct").shape == (2, 20)
    assert len(arviz.summary(tree)) == 2


def test_rows_of_a_report_are_paired():
    correct = np.random.default_rng(0).random((9, 40)) < 0.7
    accuracy = values(to_arviz(report_of([correct, correct])), "posterior", "accuracy")[0]
    assert np.array_equal(accuracy[:, 0], accuracy[:, 1]) and accuracy[:, 0].std() > 0.02


def test_rows_on_different_examples_are_refused():
    with pytest.raises(ValueError, match=r"rows on the same examples, got \[20, 21\]"):
        to_arviz(report_of([np.ones((1, 20), bool), np.ones((1, 21), bool)]))


def test_a_real_report_and_a_prediction():
    defense, (x, y) = linear_defense(), flat_batch()
    report = pd.evaluate(defense, (x, y), {"fgsm": pd.attacks.fgsm}, eps=0.1, num_samples=10)
    assert values(to_arviz(report), "posterior", "accuracy").shape == (1, 100, len(report.rows))
    prediction = pd.predict(defense, x, 10)
    tree = to_arviz(prediction, (x, y), num_samples=8)
    assert values(tree, "posterior_predictive", "y").shape == (1, 8, 12)
    assert values(tree, "constant_data", "predictive_entropy") == pytest.approx(
        prediction.predictive_entropy.numpy()
    )
    assert values(tree, "constant_data", "num_samples").tolist() == [10] * 12
    assert "observed_data" not in groups(to_arviz(prediction))


# What ArviZ does with it


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")  # few draws, an honest doubt
def test_arviz_works_on_it(tmp_path):
    data = tiny_batch(12)
    noisy = pd.defenses.rse(tiny_net(), scale="learned")
    first = to_arviz([pd.defenses.bayesian(noisy), pd.defenses.bayesian(noisy)], data, num_samples=60)
    second = to_arviz(pd.defenses.bayesian(noisy, init_scale=0.1), data, num_samples=60)
    assert "noise_rms[input_noise]" in arviz.summary(first).index
    assert np.isfinite(arviz.summary(first).to_numpy(dtype=float)).all()
    assert np.isfinite(arviz.loo(first).se)
    table = arviz.compare({"narrow": first, "wide": second})
    assert set(table.index) == {"narrow", "wide"} and sorted(table["rank"]) == [0, 1]
    arviz.plot_forest(first, var_names=["noise_rms"])
    matplotlib.pyplot.close("all")
    first.to_netcdf(str(tmp_path / "posterior.nc"))
    read = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    for group, name in (
        ("posterior", "noise_rms"),
        ("constant_data", "noise_scale"),
        ("prior", "weight_rms"),
    ):
        assert np.array_equal(values(read, group, name), values(first, group, name))
    assert read.attrs["defense"] == "bayesian of rse of Sequential" and int(read.attrs["seed"]) == 0
    assert "2 independent fits" in read["posterior_predictive"].attrs["chains"]


def test_loo_counts_examples_that_do_not_vary_and_leaves_the_rest_to_arviz():
    tree = to_arviz(linear_defense(0.3), flat_batch(20), num_samples=200)
    whole = analysis.loo(tree)
    theirs = arviz.loo(tree, reff=1.0)
    assert whole.elpd == pytest.approx(getattr(theirs, "elpd", None) or theirs.elpd_loo)
    assert whole.num_dropped == 0 and bool(np.isfinite(whole.k_hat).all())
    values(tree, "log_likelihood", "y")[..., 3] = -0.25
    some = analysis.loo(tree)
    assert some.num_dropped == 1 and np.isnan(some.k_hat[3]) and np.isfinite(some.k_hat).sum() == 19
    assert some.pointwise[3] == pytest.approx(-0.25)
    assert some.pointwise[4] == pytest.approx(whole.pointwise[4])
    assert some.elpd == pytest.approx(whole.elpd - whole.pointwise[3] - 0.25)


def test_loo_of_noise_alone_is_the_log_of_the_mean():
    defense, data = pd.defenses.rse(tiny_net(), sigma_init=0.5), tiny_batch()
    tree = to_arviz(defense, data, num_samples=300)
    found = analysis.loo(tree)
    log_mean = np.log(np.exp(values(tree, "log_likelihood", "y")[0]).mean(0))
    assert found.pointwise == pytest.approx(log_mean) and bool(np.isnan(found.k_hat).all())
    assert found.elpd == pytest.approx(log_mean.sum())


def test_loo_does_not_depend_on_which_weights_were_kept(monkeypatch):
    monkeypatch.setattr(fits, "LAST_LAYER", 10)
    defense, data = linear_defense(0.3), flat_batch(20)
    tree = to_arviz(defense, data, num_samples=200)
    assert "weight" not in tree["posterior"].data_vars
    log_lik = values(tree, "log_likelihood", "y")[0]
    by_hand = math.log(200) - np.logaddexp.reduce(-log_lik, axis=0)
    found = analysis.loo(tree)
    assert found.elpd == pytest.approx(by_hand.sum(), rel=0.02) and np.isfinite(found.k_hat).all()
    assert found.elpd == analysis.loo(to_arviz(defense, data, num_samples=200, weights=True)).elpd
    assert found.elpd < np.logaddexp.reduce(log_lik, axis=0).sum() - 20 * math.log(200) - 0.5


def test_loo_knows_noise_on_weights_from_weights_that_were_fitted():
    noise = to_arviz(pd.defenses.pni(nn.Linear(4, 3)), flat_batch(), num_samples=20)
    assert np.isnan(analysis.loo(noise).k_hat).all()
    both = pd.defenses.pni(pd.defenses.bayesian(nn.Linear(4, 3), num_data=50))
    assert np.isfinite(analysis.loo(to_arviz(both, flat_batch(), num_samples=200)).k_hat).all()


def test_loo_of_a_network_without_randomness():
    tree = to_arviz(pd.deterministic(nn.Linear(4, 3)), flat_batch())
    assert analysis.loo(tree).elpd == pytest.approx(values(tree, "log_likelihood", "y").sum())


@pytest.mark.parametrize("scale, expected", [(0.5, 0.75), (0.8, 0.36), (1.5, None)])
def test_k_hat_of_a_guide_whose_posterior_is_the_prior(scale, expected):
    """On zero inputs the posterior is N(0, 1); ratios to N(0, s) have tail shape 1 - s^2, or none."""
    defense = pd.defenses.bayesian(nn.Linear(1, 2, bias=False), init_scale=scale, num_data=3)
    with torch.no_grad():
        defense.guide.posteriors["weights"].loc.zero_()
    data = torch.zeros(3, 1), torch.zeros(3).long()
    found = [analysis.guide_k_hat(defense, data, num_samples=2000, seed=seed) for seed in range(5)]
    if expected is None:
        assert max(found) < 0.2
    else:
        assert np.mean(found) == pytest.approx(expected, abs=0.15)


def test_leaving_one_out_wants_our_container():
    report = report_of([np.ones((1, 20), bool), np.ones((1, 20), bool)])
    for tree in (to_arviz(report), to_arviz(pd.predict(linear_defense(), flat_batch()[0], 5))):
        with pytest.raises(ValueError, match=r"expected a container that to_arviz\(defense, \(x, y\)\) made"):
            analysis.loo(tree)


def test_k_hat_refuses_noise():
    with pytest.raises(ValueError, match="random weights with a prior and nothing else"):
        analysis.guide_k_hat(pd.defenses.rse(tiny_net()), tiny_batch())


# Priors, names and what made it


def test_draws_of_the_prior_are_those_of_the_model():
    defense = pd.defenses.bayesian(nn.Linear(4, 3), prior=dist.Normal(0.0, 2.0), num_data=50)
    tree = to_arviz(defense, flat_batch(), num_samples=400)
    weight = values(tree, "prior", "weight")
    assert weight.shape == (1, 400, 3, 4) and values(tree, "posterior", "weight").shape == weight.shape
    assert stats.kstest(weight.ravel(), stats.norm(0, 2).cdf).pvalue > FAILURE_RATE
    assert stats.kstest(weight.ravel(), stats.norm(0, 1).cdf).pvalue < FAILURE_RATE
    (x, _), bias = flat_batch(), torch.tensor(values(tree, "prior", "bias")[0])
    by_hand = (x @ torch.tensor(weight[0]).transpose(1, 2) + bias.unsqueeze(1)).softmax(-1)
    assert values(tree, "prior_predictive", "probs")[0] == pytest.approx(by_hand.numpy(), abs=1e-5)
    drawn = torch.cat(
        [torch.tensor(values(tree, "posterior", n)[0]).flatten(1) for n in ("weight", "bias")], 1
    )
    expected = torch.distributions.Normal(0.0, 2.0).log_prob(drawn).sum(1)
    assert values(tree, "log_prior", "weights")[0] == pytest.approx(expected.numpy(), rel=1e-5)


def test_the_prior_of_a_users_own_program():
    tree = to_arviz(autoguided(), flat_batch(), num_samples=200)
    weight, fitted = values(tree, "prior", "linear.weight"), values(tree, "posterior", "linear.weight")
    assert stats.kstest(weight.ravel(), stats.norm(0, 1).cdf).pvalue > FAILURE_RATE
    expected = stats.norm(0, 1).logpdf(fitted[0]).sum((1, 2))
    assert values(tree, "log_prior", "linear.weight")[0] == pytest.approx(expected, rel=1e-4)


def test_noise_has_one_number_per_layer_and_draw():
    defense = pd.defenses.rse(tiny_net(), sigma_init=0.25, sigma_inner=0.125)
    tree = to_arviz(defense, tiny_batch(), num_samples=300)
    rms = tree["posterior"]["noise_rms"]
    assert rms.dims == ("chain", "draw", "noise_layer") and list(tree["posterior"].data_vars) == ["noise_rms"]
    elements = torch.tensor([use.shape.numel() for use in defense.model.uses(tiny_batch()[0])])
    mean_square = np.square(np.asarray(rms)[0]).mean(0)
    tolerance = 5 * math.sqrt(2 / 300) / elements.sqrt().numpy()
    assert (np.abs(mean_square / np.array([0.25, 0.125]) ** 2 - 1) < tolerance).all()


def test_without_a_prior_there_are_no_draws_of_it():
    tree = to_arviz(pd.defenses.bayesian(tiny_net(), prior=None), tiny_batch(), num_samples=3)
    assert not {"prior", "prior_predictive", "log_prior"} & groups(tree)


def test_axes_take_the_names_of_the_caller():
    x, y = flat_batch(5)
    names, files = ["cat", "dog", "owl"], [f"{k}.png" for k in range(5)]
    options = {"class_names": names, "dims": {"weight": ["class", "pixel"]}, "coords": {"example": files}}
    tree = to_arviz(linear_defense(), (x, y), num_samples=2, adversarial={0.1: x}, **options)
    for group, name in (("posterior_predictive", "probs"), ("predictions", "probs"), ("prior", "weight")):
        assert list(tree[group][name]["class"].values) == names
    assert tree["posterior"]["weight"].dims == ("chain", "draw", "class", "pixel")
    assert list(tree["log_likelihood"]["y"]["example"].values) == files
    assert float(tree["posterior"]["weight"].sel({"class": "owl"})[0, 0, 1]) == pytest.approx(
        values(tree, "posterior", "weight")[0, 0, 2, 1]
    )
    for wrong, match in (
        ({"class_names": ["a", "b"]}, "expected 3 coordinates of the axis 'class', got 2"),
        ({"dims": {"weight": ["class"]}}, r"expected 2 names for the axes of 'weight', shape \(3, 4\)"),
        ({"dims": {"wait": ["class"]}}, "got \\['wait'\\]; known: .*weight"),
        ({"coords": {"exampel": files}}, r"axes of the container, got \['exampel'\]; known: .*example"),
    ):
        with pytest.raises(ValueError, match=match):
            to_arviz(linear_defense(), (x, y), num_samples=2, **wrong)


def test_what_made_it_is_written_down():
    tree = to_arviz(pd.defenses.bayesian(nn.Linear(4, 3)), flat_batch(), num_samples=2, seed=7)
    wanted = {"library": "probdefense", "version": pd.__version__, "seed": 7, "rule": "mean_prob"}
    for place in (tree, tree["posterior"], tree["prior_predictive"]):
        assert wanted | {"defense": "bayesian of Linear"} == {
            name: place.attrs[name] for name in (*wanted, "defense")
        }


def test_a_report_and_a_prediction_take_names_and_say_what_made_them():
    defense, (x, y) = linear_defense(), flat_batch(4)
    report, files = pd.evaluate(defense, (x, y), num_samples=4, name="bnn"), [f"{k}.png" for k in range(4)]
    tree = to_arviz(report, seed=5, coords={"example": files})
    assert list(tree["observed_data"]["correct"]["example"].values) == files
    assert (tree.attrs["library"], tree.attrs["seed"], tree.attrs["defense"]) == ("probdefense", 5, "bnn")
    assert tree["posterior"].attrs["rule"] == "mean_prob, single_draw" and tree["posterior"].attrs["settings"]
    tree = to_arviz(pd.predict(defense, x, 4), class_names=["cat", "dog", "owl"])
    assert list(tree["constant_data"]["probs"]["class"].values) == ["cat", "dog", "owl"]
    assert tree.attrs["version"] == pd.__version__ and tree.attrs["rule"] == "mean_prob"
    with pytest.raises(ValueError, match=r"got \['class'\]; known: chain, draw, example, row"):
        to_arviz(report, class_names=["cat"])
    with pytest.raises(ValueError, match="expected dims= for a defense"):
        to_arviz(report, dims={"accuracy": ["row"]})


def test_loo_is_arvizs_own_and_its_plots_and_comparison_take_it():
    data = flat_batch(20)
    first, second = (to_arviz(linear_defense(scale), data, num_samples=300) for scale in (0.2, 0.3))
    found = {name: analysis.loo(tree) for name, tree in (("narrow", first), ("wide", second))}
    assert all(isinstance(each, type(arviz.loo(first, pointwise=True))) for each in found.values())
    assert all(isinstance(each, analysis.Loo) for each in found.values())
    table = arviz.compare(found)
    assert set(table.index) == {"narrow", "wide"}
    best = max(found, key=lambda name: found[name].elpd)
    assert table.index[0] == best
    arviz.plot_khat(found["narrow"])
    matplotlib.pyplot.close("all")
    assert "20" in repr(found["narrow"]) and "<td>examples</td><td>20</td>" in found["narrow"]._repr_html_()


def test_the_prior_can_be_scaled_by_a_power():
    tree = to_arviz(linear_defense(), flat_batch(), num_samples=200)
    if hasattr(arviz, "psens"):
        sensitivity = arviz.psens(tree, component="prior")["weight_rms"]
    else:
        sensitivity = arviz.psense(tree)["weight_rms"]
    assert sensitivity.shape == (2,) and np.isfinite(np.asarray(sensitivity)).all()
