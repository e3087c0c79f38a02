"""Parameters that became random leave nothing behind that could not be copied, averaged, sent or saved."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import probdefense as pd
from probdefense.objectives import LossModule, elbo
from tests.contract import BUILDERS, defended
from tests.nn.test_passes import Attention, Recurrent
from tests.worlds import tiny_batch, tiny_net


def seeded(function, *args):
    torch.manual_seed(3)
    return function(*args)


def nudge(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("name", BUILDERS)
def test_averages_of_weights_are_the_averages_of_parameters(name, decay, use_buffers):
    defense, (x, _) = defended(name), tiny_batch(2)
    defense(x)  # what a first forward makes must not be in the way
    average = get_ema_multi_avg_fn(decay) if decay else None
    averaged = AveragedModel(defense, multi_avg_fn=average, use_buffers=use_buffers)
    first = {n: p.detach().clone() for n, p in defense.named_parameters()}
    averaged.update_parameters(defense)
    nudge(defense)
    defense(x)
    averaged.update_parameters(defense)
    share = decay or 0.5
    for n, p in averaged.module.named_parameters():
        torch.testing.assert_close(p, share * first[n] + (1 - share) * defense.get_parameter(n))
    assert averaged(x).shape == defense(x).shape
    for own, other in zip(averaged.module.buffers(), defense.buffers(), strict=True):
        torch.testing.assert_close(own, other)  # nothing but parameters moved


def test_the_average_of_an_ensemble_is_still_the_whole_ensemble():
    """The choice of a member is no number that an average could move."""
    defense = pd.defenses.ensemble([nn.Linear(4, 3) for _ in range(3)])
    averaged = AveragedModel(defense, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(4):
        averaged.update_parameters(defense)
    x = torch.rand(2, 4)
    torch.testing.assert_close(averaged.module.mean()(x), defense.mean()(x))


@pytest.mark.parametrize("name", ["bayesian", "rse", "pni", "deterministic"])
def test_update_bn_takes_the_statistics_anew(name):
    defense, (x, y) = defended(name).train(), tiny_batch(8)
    averaged = AveragedModel(defense)
    averaged.update_parameters(defense)
    other = copy.deepcopy(averaged.module)
    for module in (averaged, other):  # those of a new layer, which recalibrate replaces as update_bn does
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
    seeded(update_bn, [(x, y)], averaged)
    seeded(pd.recalibrate, other, [(x, y)])
    for own, theirs in zip(averaged.module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(own, theirs)
    layers = [m for m in averaged.modules() if isinstance(m, nn.BatchNorm2d)]
    assert layers and all(int(m.num_batches_tracked) == 1 and m.momentum == 0.1 for m in layers)
    assert not any(bool((m.running_var == 1).all()) for m in layers)


def test_update_bn_averages_over_batches_of_any_size():
    """Two batches of 200 rows with means .25 and .75, which one pass of 128 rows could not hold."""
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2))
    defense = pd.deterministic(net)
    batches = [torch.full((200, 1), value) for value in (0.25, 0.75)]
    update_bn(batches, defense)
    assert float(net[0].running_mean) == pytest.approx(0.5) and int(net[0].num_batches_tracked) == 2


def test_only_update_bn_moves_statistics_without_labels():
    net = nn.Sequential(nn.BatchNorm1d(1, momentum=None), nn.Linear(1, 2))
    defense = pd.deterministic(net).train()
    with torch.no_grad():
        defense(torch.rand(4, 1))
    assert int(net[0].num_batches_tracked) == 0


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["bayesian", "pni", "ensemble"])
def test_a_distributed_step_is_the_step(process_group, name):
    defense, (x, y) = defended(name).train(), tiny_batch(4)
    twin = copy.deepcopy(defense)
    seeded(lambda: elbo(twin, x, y).backward())
    seeded(lambda: DistributedDataParallel(LossModule(defense, elbo))(x, y).backward())
    for name, parameter in defense.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad)


@pytest.mark.parametrize("name", BUILDERS)
def test_removed_parameters_cost_nothing_and_are_nowhere(name):
    defense, (x, _) = defended(name), tiny_batch(2)
    defense(x)
    own = (".priors.", "running", ".rows")  # the table of given samples is the posterior itself
    held = sum(b.numel() for n, b in defense.named_buffers() if not any(part in n for part in own))
    assert held < 40, "constants of layers, not weights"
    assert all(t.is_contiguous() for t in [*defense.buffers(), *defense.parameters()])
    assert {n for n in defense.state_dict() if n.startswith("model.net.")} <= {
        f"model.net.{n}" for n in defense.net.state_dict()
    }


@pytest.mark.parametrize("move", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
@pytest.mark.parametrize("layer", [Recurrent, Attention, nn.Identity])
def test_copies_draw_the_same_numbers(layer, move):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), layer(), nn.Linear(4, 3))
    defense, x = pd.defenses.bayesian(net), torch.rand(2, 4, requires_grad=True)
    defense(x, 3)
    other = move(defense)
    assert torch.equal(seeded(defense, x, 3), seeded(other, x, 3))
    nudge(other)
    assert not torch.equal(seeded(defense, x, 3), seeded(other, x, 3))


@pytest.mark.parametrize("layer", [Recurrent, Attention, nn.Identity])
def test_double_precision_is_the_same_function(layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), layer(), nn.Linear(4, 3))
    defense, x = pd.defenses.bayesian(net), torch.rand(2, 4)
    draws = {name: value.detach() for name, value in defense.draw(x).items()}
    single = defense.at(draws)(x)
    double = defense.double().at({name: value.double() for name, value in draws.items()})(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_weights_of_recurrent_layers_are_those_drawn(kind):
    """The layer keeps a list of its weights; the answer at a draw is that of a plain layer with it."""
    torch.manual_seed(0)
    net = nn.Sequential(Recurrent(kind), nn.Linear(4, 3))
    defense, x = pd.defenses.bayesian(net, init_scale=0.3), torch.rand(2, 4)
    assert not any(name.startswith("model.net.0") for name, _ in defense.named_parameters())
    for backend in ("auto", "loop", "vmap"):
        assert float(defense(x, 5, backend=backend).detach().std(0).min()) > 0
    draws = defense.draw(x)
    plain = copy.deepcopy(net).eval()
    with torch.no_grad():
        for name, value in defense.sites["weights"].views(draws["weights"]).items():
            plain.get_parameter(name).copy_(value)
    torch.testing.assert_close(defense.at(draws)(x)[0], plain(x))
    defense.eval().step(x, torch.tensor([0, 1])).log_lik.sum().backward()
    gradient = defense.sites["weights"].views(defense.guide.posteriors["weights"].loc.grad)
    assert all(bool(part.any()) for part in gradient.values())


def test_frozen_recurrent_layers_stay_when_the_defense_is_trained():
    torch.manual_seed(0)
    net = nn.Sequential(Recurrent(), nn.Linear(4, 3))
    for defense in (pd.deterministic(copy.deepcopy(net)), pd.defenses.rse(net, before_linear=True)):
        frozen, x = defense.freeze(2), torch.rand(2, 4)
        before = frozen(x)
        nudge(defense)
        assert torch.equal(frozen(x), before) and not torch.allclose(defense(x), before[:1])


def test_builders_compose_on_random_weights_of_any_type():
    net = tiny_net().double()
    defense = pd.defenses.rse(pd.defenses.bayesian(net, where=lambda *_: True), before_linear=True)
    x = tiny_batch()[0].double()
    assert defense(x, 3).dtype == torch.float64
    assert float(defense(x, 3).detach().std(0).max()) > 0
    both = pd.defenses.pni(pd.defenses.bayesian(tiny_net()))
    assert both.sites["weight_noise"].shapes == tuple(
        torch.Size(s) for s in ((3, 1, 3, 3), (4, 3, 3, 3), (3, 16))
    )
