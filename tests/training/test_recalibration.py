"""Which batches move the running statistics of BatchNorm, and statistics taken anew."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.objectives import adversarial, elbo
from tests.contract import defended
from tests.worlds import monte_carlo_tolerance, tiny_batch


def push(delta):
    """An attack that adds a constant."""
    return lambda logits_fn, x, y: (x + delta).clamp(0, 1)


def batch_norm_world():
    """BatchNorm on one pixel; clean batches have mean 0.25, attacked ones 0.75."""
    net = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0), nn.Linear(1, 2))
    return pd.deterministic(net).train(), torch.tensor([[0.0], [0.5]]), torch.tensor([0, 1])


@pytest.mark.parametrize(("bn_stats", "mean"), [("adversarial", 0.75), ("clean", 0.25), ("both", 0.25)])
def test_bn_stats_says_which_batches_move_running_statistics(bn_stats, mean):
    defense, x, y = batch_norm_world()
    adversarial(elbo, push(0.5), bn_stats=bn_stats)(defense, x, y).backward()
    layer = defense.net[0]
    assert float(layer.running_mean) == pytest.approx(mean)
    assert int(layer.num_batches_tracked) == (2 if bn_stats == "both" else 1)
    assert defense.net[1].weight.grad is not None


def test_both_moves_by_the_attacked_batch_first():
    defense, x, y = batch_norm_world()
    defense.net[0].momentum = 0.5
    adversarial(elbo, push(0.5), bn_stats="both")(defense, x, y)
    assert float(defense.net[0].running_mean) == pytest.approx((0.5 * 0.75) * 0.5 + 0.5 * 0.25)


def test_clean_statistics_add_nothing_to_the_history():
    x, y = tiny_batch(50)
    defense, epochs = defended("deterministic"), 1
    seen = []
    defense.register_step_hook(lambda step, y: seen.append(len(y)))
    objective = adversarial(elbo, push(0.1), bn_stats="clean")
    pd.fit(defense, [(x, y)], epochs=epochs, objective=objective, progress=False)
    assert seen == [50]


def test_the_inner_attack_leaves_running_statistics_alone():
    defense, (x, y) = defended("deterministic").train(), tiny_batch()
    layer = defense.net.get_submodule("2")
    adversarial(elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=3))(defense, x, y)
    assert int(layer.num_batches_tracked) == 1


def test_recalibration_is_the_average_over_batches_and_restores_the_layer():
    net = nn.Sequential(nn.BatchNorm1d(1, momentum=0.3), nn.Linear(1, 2))
    defense = pd.deterministic(net).eval()
    batches = [(torch.tensor([[a], [b]]), torch.tensor([0, 1])) for a, b in ((0.0, 0.2), (0.4, 1.0))]
    pd.recalibrate(defense, batches)
    assert float(net[0].running_mean) == pytest.approx((0.1 + 0.7) / 2)
    assert float(net[0].running_var) == pytest.approx((0.02 + 0.18) / 2)
    assert net[0].momentum == 0.3 and not net[0].training


def trained_layer(mean, var):
    """A defense whose layer has moved, and its layer."""
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2))
    net[0].running_mean.fill_(mean), net[0].running_var.fill_(var)
    return pd.deterministic(net).eval(), net[0]


TWO = [(torch.tensor([[a], [b]]), torch.tensor([0, 1])) for a, b in ((0.0, 0.2), (0.4, 1.0))]
"""Batches of means .1 and .7, variances .02 and .18."""


def test_old_statistics_stay_to_the_share_of_the_error_of_the_new_ones_by_hand():
    """Error .18 / 2 in a squared distance of .5^2, and .0128 / 2 in .2^2."""
    defense, layer = trained_layer(0.9, 0.3)
    pd.recalibrate(defense, TWO)
    assert float(layer.running_mean) == pytest.approx(0.4 + 0.36 * 0.5)
    assert float(layer.running_var) == pytest.approx(0.1 + 0.16 * 0.2)
    assert int(layer.num_batches_tracked) == 2 and layer.momentum == 0.1


def test_old_statistics_within_the_error_stay_and_one_batch_goes_half_the_way():
    defense, layer = trained_layer(0.6, 0.12)
    pd.recalibrate(defense, TWO)
    assert float(layer.running_mean) == pytest.approx(0.6)
    assert float(layer.running_var) == pytest.approx(0.12)
    pd.recalibrate(defense, TWO[1:])
    assert float(layer.running_mean) == pytest.approx((0.6 + 0.7) / 2)
    assert float(layer.running_var) == pytest.approx((0.12 + 0.18) / 2)


def test_much_data_replaces_the_old_statistics():
    defense, layer = trained_layer(0.9, 0.3)
    pd.recalibrate(defense, TWO * 100)
    assert float(layer.running_mean) == pytest.approx(0.4, abs=0.002)
    assert float(layer.running_var) == pytest.approx(0.1, abs=0.001)


def test_few_draws_of_random_weights_lose_no_accuracy():
    """One batch in place of what the training left: 97 % become 90 % or less; blended, they stay."""
    train, test = pd.data.digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    defense = pd.defenses.bayesian(net, num_data=len(train))
    optimizer = torch.optim.Adam(defense.param_groups(), lr=0.01)
    loader = torch.utils.data.DataLoader(train, 64, shuffle=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    pd.fit(defense, loader, epochs=20, optimizer=optimizer, schedule=decay, seed=0, progress=False)

    def accuracy(of):
        return float((pd.predict(of, test, 20, seed=0).label == test.tensors[1]).float().mean())

    defense.eval()
    few = [tuple(part[:20] for part in train.tensors)]
    replaced, blended = copy.deepcopy(defense), copy.deepcopy(defense)
    for layer in (m for m in replaced.modules() if isinstance(m, nn.BatchNorm1d)):
        layer.reset_running_stats()
    pd.recalibrate(replaced, few)
    pd.recalibrate(blended, few)
    assert accuracy(replaced) < accuracy(defense) - 0.03, "the world has no power"
    assert accuracy(blended) > accuracy(defense) - 0.01


def test_recalibration_sees_the_noise_of_the_posterior():
    net = nn.Sequential(pd.nn.Noise(0.5), nn.BatchNorm1d(1), nn.Linear(1, 2))
    defense, count = pd.deterministic(net), 20_000
    pd.recalibrate(defense, [(torch.full((count, 1), 0.5), torch.zeros(count).long())])
    relative = float(net[1].running_var) / 0.25 - 1
    assert abs(relative) < monte_carlo_tolerance(2**0.5, count)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown bn_stats 'none'"):
        adversarial(elbo, push(0.1), bn_stats="none")
    with pytest.raises(ValueError, match="found no normalization layer"):
        pd.recalibrate(pd.deterministic(nn.Linear(2, 2)), [])
