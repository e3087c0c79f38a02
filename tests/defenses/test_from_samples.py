"""Given states as a posterior: exact means, chains, weights, tables on disk."""

import copy

import numpy as np
import pytest
import torch

import probdefense as pd
from probdefense.analysis import loo
from probdefense.core.sites import samples as table_file
from probdefense.defenses import from_samples
from tests.worlds import tiny_batch, tiny_net


def nets(count=4):
    torch.manual_seed(4)
    made = [tiny_net() for _ in range(count)]
    for net in made:  # each has statistics of its own
        net(2 * torch.rand(30, 1, 6, 6))
    return [net.eval() for net in made]


def states(made):
    return [net.state_dict() for net in made]


def stacked(made):
    return {name: torch.stack([net.state_dict()[name] for net in made]) for name in made[0].state_dict()}


def mean_of(made, x):
    with torch.no_grad():
        return torch.stack([net(x).softmax(-1) for net in made]).mean(0)


FORMS = {
    "a list": states,
    "an iterator": lambda made: iter(states(made)),
    "a dict of stacks": stacked,
    "NumPy arrays": lambda made: {name: value.numpy() for name, value in stacked(made).items()},
    "chains": lambda made: [states(made[:2]), states(made[2:])],
    "a dict of chains": lambda made: {n: v.unflatten(0, (2, 2)) for n, v in stacked(made).items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_predictive_of_all_is_the_mean_over_the_given_networks(form):
    made, (x, _) = nets(), tiny_batch()
    defense = from_samples(tiny_net(), FORMS[form](made)).eval()
    wanted = mean_of(made, x)
    for draws in (defense(x, 4), defense(x, 8), defense.freeze(4)(x), defense(x[:1], 4, backend="vmap")):
        torch.testing.assert_close(draws.softmax(-1).mean(0), wanted[: draws.shape[1]])
    assert list(defense.sites) == ["weights"]


def test_each_draw_is_one_of_the_networks_and_a_subset_has_none_twice():
    made, (x, _) = nets(), tiny_batch()
    defense, answers = from_samples(made[0], states(made)).eval(), torch.stack([net(x) for net in made])
    for _ in range(5):
        for logits in defense(x, 3), defense.freeze(3)(x):
            gaps = (logits.unsqueeze(1) - answers).abs().amax((2, 3))
            chosen = gaps.argmin(1).tolist()
            assert float(gaps.amin(1).max().detach()) < 1e-5 and len(set(chosen)) == 3


def test_weights_are_the_shares_of_the_draws():
    made, (x, _) = nets(), tiny_batch()
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0])
    defense = from_samples(made[0], states(made), weights=weights).eval()
    with torch.no_grad():
        answers = torch.stack([net(x).softmax(-1) for net in made])
    wanted = (answers * (weights / 8).view(-1, 1, 1, 1).squeeze(-1)).sum(0)
    torch.testing.assert_close(defense(x, 8).softmax(-1).mean(0), wanted)
    site = defense.sites["weights"]
    once = torch.cat([site.draw((1, 1)) for _ in range(4000)]).flatten()
    shares = once.bincount(minlength=4) / 4000
    assert float((shares - weights / 8).abs().max()) < 4.3 * (0.25 / 4000) ** 0.5


def test_the_static_base_is_the_mean_state():
    made, (x, _) = nets(), tiny_batch()
    mean = copy.deepcopy(made[0])
    mean.load_state_dict({n: v.float().mean(0).to(v.dtype) for n, v in stacked(made).items()})
    defense = from_samples(made[0], states(made)).eval()
    torch.testing.assert_close(defense.mean()(x)[0], mean(x))


def test_arviz_sees_chains_and_draws_in_their_order():
    made, (x, y) = nets(6), tiny_batch()
    defense = from_samples(made[0], [states(made[:3]), states(made[3:])])
    tree = pd.to_arviz(defense, (x, y), num_samples=100)
    with torch.no_grad():
        wanted = torch.stack([net(x).softmax(-1) for net in made]).unflatten(0, (2, 3))
    np.testing.assert_allclose(tree["posterior_predictive"]["probs"].values, wanted, atol=1e-5)
    weights = tree["posterior"]["7.weight"].values
    np.testing.assert_allclose(weights[1, 0], made[3][7].weight.detach(), atol=1e-6)
    assert "2 chains of given samples" in tree["posterior_predictive"].attrs["chains"]
    thinned = pd.to_arviz(defense, (x, y), num_samples=2)["posterior_predictive"]["probs"].values
    np.testing.assert_allclose(thinned, wanted[:, [0, 2]], atol=1e-5)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_sees_the_chains():
    made, (x, y) = nets(40), tiny_batch()
    tree = pd.to_arviz(from_samples(made[0], [states(made[:20]), states(made[20:])]), (x, y))
    assert tree["log_likelihood"]["y"].shape == (2, 20, 6)
    found = loo(tree)
    assert np.isfinite(found.elpd) and not np.isnan(found.k_hat).any()


def test_parts_of_a_network_may_be_random_and_the_rest_trains():
    made, (x, y) = nets(), tiny_batch()
    heads = [{n: v for n, v in state.items() if n.startswith("7")} for state in states(made)]
    defense = from_samples(made[0], heads)
    assert {n.split(".")[2] for n, _ in defense.named_parameters()} == {"1", "2", "4"}
    before = defense.net[1].weight.detach().clone()
    pd.fit(defense, [(x, y)], epochs=1, progress=False)
    assert not torch.equal(before, defense.net[1].weight)


def test_training_leaves_the_table_as_it_is():
    made, (x, y) = nets(), tiny_batch()
    defense = pd.defenses.rse(from_samples(made[0], states(made)), scale="learned").train()
    before = defense.sites["weights"].rows.clone()
    defense.step(x, y)  # moves running statistics
    assert torch.equal(before, defense.sites["weights"].rows)


def test_a_large_table_stays_on_disk_and_is_shared_by_copies(monkeypatch):
    made, (x, _) = nets(), tiny_batch()
    for module in (table_file, __import__("probdefense.defenses.from_samples", fromlist=["LARGE"])):
        monkeypatch.setattr(module, "LARGE", 100)
    defense = from_samples(made[0], iter(states(made))).eval()
    twin = pd.defenses.rse(defense, sigma_init=0.0, sigma_inner=0.0)
    assert twin.sites["weights"].rows.data_ptr() == defense.sites["weights"].rows.data_ptr()
    torch.testing.assert_close(twin.eval()(x, 4).softmax(-1).mean(0), mean_of(made, x))


def test_files_hold_the_samples(tmp_path):
    made, (x, _) = nets(), tiny_batch()
    defense = from_samples(made[0], iter(states(made)), weights=[1, 1, 1, 2]).eval()
    pd.save(defense, tmp_path / "samples.safetensors")
    again = pd.load(tmp_path / "samples.safetensors", net=tiny_net())
    ours, theirs = (d.freeze(5, torch.Generator().manual_seed(0))(x) for d in (defense, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (lambda s: [], ValueError, "expected at least one sample"),
        (lambda s: 3, TypeError, "expected samples as state dicts, got int"),
        (lambda s: [3], TypeError, "expected state dicts as samples, got int"),
        (lambda s: [s, 3], TypeError, "expected state dicts as samples, got int"),
        (lambda s: [{"7.bias": None}], TypeError, "expected tensors or arrays of numbers, got NoneType"),
        (lambda s: {"7.bias": "a"}, TypeError, "expected tensors or arrays of numbers, got str"),
        (
            lambda s: [{"7.bias": [1.0, 2.0]}],
            ValueError,
            r"7.bias of shape \(3,\) in every sample, got \(2,\)",
        ),
        (
            lambda s: [{"other": torch.ones(2)}],
            ValueError,
            "expected names of the network in the samples, got other",
        ),
        (lambda s: [s[0], {}], ValueError, "in every sample, got none"),
        (
            lambda s: [{**s[0], "7.bias": torch.ones(2)}],
            ValueError,
            r"7.bias of shape \(3,\) in every sample",
        ),
        (
            lambda s: [s[0], {**s[1], "7.bias": torch.full((3,), torch.nan)}],
            ValueError,
            "expected finite samples, got NaN",
        ),
        (lambda s: [s[:1], s[:2]], ValueError, r"expected chains of one length, got \[1, 2\]"),
        (lambda s: {"7.bias": torch.ones(3)}, ValueError, "share leading axes"),
        (
            lambda s: {"7.bias": torch.ones(2, 3), "7.weight": torch.ones(4, 3, 16)},
            ValueError,
            "share leading",
        ),
    ],
)
def test_bad_samples_are_refused(samples, error, message):
    made = nets(2)
    with pytest.raises(error, match=message):
        from_samples(made[0], samples(states(made)))


def test_bad_weights_are_refused():
    made = nets(2)
    with pytest.raises(TypeError, match="expected tensors or arrays of numbers, got str"):
        from_samples(made[0], states(made), weights="equal")
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="expected weights as 2 numbers"):
            from_samples(made[0], states(made), weights=weights)


@pytest.mark.parametrize("noisy", [pd.defenses.pni, pd.defenses.random_filters], ids=lambda b: b.__name__)
def test_states_may_hold_the_coefficients_of_noise_on_weights(noisy):
    made = [noisy(net) for net in nets(3)]
    x, _ = tiny_batch(5)
    for k, one in enumerate(made):
        for name, value in one.net.named_parameters():
            if name.endswith((".alpha", ".log_scale")):
                value.data.fill_(0.0 if name.endswith("alpha") else -100.0 - k)
    defense = from_samples(made[0], [one.net.state_dict() for one in made])
    if noisy is pd.defenses.pni:  # without noise they are the networks themselves
        torch.testing.assert_close(defense(x, 3).softmax(-1).mean(0), mean_of(nets(3), x))
    draws = defense.draw(x)
    chosen = int(draws["weights"])
    torch.testing.assert_close(
        defense.at(draws)(x), made[chosen].at({n: v for n, v in draws.items() if n != "weights"})(x)
    )


def test_arviz_sees_every_sample_of_one_list_once():
    made, (x, y) = nets(5), tiny_batch()
    tree = pd.to_arviz(from_samples(made[0], states(made)), (x, y), num_samples=12)
    with torch.no_grad():
        wanted = torch.stack([net(x).softmax(-1) for net in made])[None]
    np.testing.assert_allclose(tree["posterior_predictive"]["probs"].values, wanted, atol=1e-5)


@pytest.mark.parametrize("form", [states, lambda made: [states(made[:2]), states(made[2:])]])
def test_arviz_sees_weights(form):
    made, (x, y) = nets(4), tiny_batch()
    shares = torch.tensor([0.7, 0.1, 0.1, 0.1])
    defense = from_samples(made[0], form(made), weights=shares)
    seen = pd.to_arviz(defense, (x, y), num_samples=20)["posterior_predictive"]["probs"].values
    with torch.no_grad():
        each = torch.stack([net(x).softmax(-1) for net in made])
    wanted = torch.einsum("k,kbc->bc", shares, each)
    np.testing.assert_allclose(seen.mean((0, 1)), wanted, atol=1e-5)
