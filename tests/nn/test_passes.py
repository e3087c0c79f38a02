"""Holding a network still: what is undeclared stops, what is declared stays, and all is put back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probdefense as pd
from probdefense.nn.passes import held_still
from probdefense.nn.randomness import random_in_training
from tests.worlds import import_torchvision


class Depth(nn.Module):
    """Stochastic depth by hand: a residual branch that is dropped by the example in training mode."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, x):
        kept = torch.rand(len(x), 1, device=x.device) < 0.5 if self.training else 0.5
        return x + kept * self.branch(x)


class Functional(nn.Module):
    """Dropout as a function, by the mode of the module."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training)


class Jitter(nn.Module):
    """Gaussian noise in training mode, from no site."""

    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Recurrent(nn.Module):
    """A recurrent layer over the pixels of a row, with dropout between its two layers."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.cells = kind(4, 4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.cells(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1]


class Attention(nn.Module):
    """Self-attention with dropout on its weights."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        tokens = x.unsqueeze(1) * torch.arange(1.0, 4.0, device=x.device).view(1, 3, 1)
        return self.attention(tokens, tokens, tokens)[0][:, 0]


class Encoder(nn.Module):
    """One layer of a transformer, dropout everywhere."""

    def __init__(self, **options):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x.unsqueeze(1) * torch.arange(1.0, 4.0, device=x.device).view(1, 3, 1))[:, 0]


class Dropping(nn.LSTM):
    """A subclass with a forward of its own, whose dropout held attributes do not reach."""

    def forward(self, x):
        x = F.dropout(x, 0.5, training=self.training)
        return super().forward(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1]


LAYERS = {
    "stochastic depth": Depth,
    "functional dropout": Functional,
    "gaussian noise": Jitter,
    "RReLU": nn.RReLU,
    "alpha dropout": nn.AlphaDropout,
    "feature alpha dropout": nn.FeatureAlphaDropout,
    "LSTM": Recurrent,
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "subclass of LSTM": lambda: Dropping(4, 4, batch_first=True),
    "attention": Attention,
    "encoder layer": Encoder,
    "encoder layer, norm first": lambda: Encoder(norm_first=True),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Sequential(Depth(), Jitter()))),
}


def hidden_net(name):
    """A classifier with one layer that is random in training mode, undeclared."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), LAYERS[name](), nn.Linear(4, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_held_still_is_evaluation_mode_whatever_the_mode(name):
    net, x = hidden_net(name), torch.rand(5, 4)
    with torch.no_grad():
        expected = net.eval()(x)
        for training in (True, False):
            net.train(training)
            with held_still(net):
                first, second = net(x), net(x)
            assert torch.equal(first, second)
            torch.testing.assert_close(first, expected)
            assert all(module.training == training for module in net.modules())


@pytest.mark.parametrize("name", ["LSTM", "attention", "encoder layer"])
def test_modes_and_dropout_are_put_back_also_after_a_failure(name):
    net = hidden_net(name).train()
    net[0].eval()

    def settings():
        return [
            (m.training, d if isinstance(d := getattr(m, "dropout", None), float) else None)
            for m in net.modules()
        ]

    before = settings()
    with pytest.raises(ValueError, match="in the block"), held_still(net):
        assert settings() != before
        raise ValueError("in the block")
    assert settings() == before


def test_modules_made_by_torchvision_stand_still():
    ops = import_torchvision().ops
    x = torch.rand(6, 3, 4, 4)
    for layer in (ops.StochasticDepth(0.5, "row"), ops.DropBlock2d(0.5, 3)):
        net = nn.Sequential(layer).train()
        assert not torch.equal(net(x), net(x))
        with held_still(net):
            assert torch.equal(net(x), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_modules_stand_still():
    net, x = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))).train(), torch.rand(9, 4)
    with held_still(net):
        assert torch.equal(net(x), net(x))
    assert net.training and not torch.equal(net(x), net(x))


def test_the_fast_path_of_attention_stays_off_and_the_switch_of_torch_is_not_touched():
    """In eval() without gradients torch runs the layer as one kernel, which calls no module inside."""
    encoder, x = nn.Sequential(Encoder()).eval(), torch.rand(2, 4)
    called = []
    encoder[0].layer.linear1.forward = lambda z: (
        called.append(len(z)) or F.linear(z, encoder[0].layer.linear1.weight, encoder[0].layer.linear1.bias)
    )
    with torch.no_grad():
        expected = encoder(x)
        assert not called, "the fast path is what torch takes by itself"
        with held_still(encoder):
            torch.testing.assert_close(encoder(x), expected)
    assert called == [2]
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_with_holes_keep_their_mode():
    net = nn.Sequential(pd.nn.Noise(0.5, when="train"), nn.Dropout(0.5)).train()
    with held_still(net):
        assert net[0].training and not net[1].training
    net.eval()
    with held_still(net):
        assert not net[0].training


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("stochastic depth", ["1 (Depth)"]),
        ("functional dropout", ["1 (Functional)"]),
        ("gaussian noise", ["1 (Jitter)"]),
        ("RReLU", ["1 (RReLU)"]),
        ("LSTM", ["1.cells (LSTM)"]),
        ("attention", ["1.attention (MultiheadAttention)"]),
        ("nested", ["1.0.0 (Dropout)", "1.0.1.0 (Depth)", "1.0.1.1 (Jitter)"]),
    ],
)
def test_what_is_random_in_training_is_found_by_what_it_draws(name, places):
    net = hidden_net(name).eval()
    x, state = torch.rand(2, 4), torch.get_rng_state()
    assert random_in_training(net, x) == places
    assert torch.equal(torch.get_rng_state(), state), "the search draws nothing itself"
    assert not any(module.training for module in net.modules())


def test_nothing_is_found_where_nothing_is_drawn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.0), Encoder(), nn.BatchNorm1d(4))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    assert random_in_training(net, torch.rand(2, 4)) == []


class Switched(nn.Module):
    """Noise by an attribute that only its own ``train`` sets."""

    def __init__(self):
        super().__init__()
        self.noisy = True

    def train(self, mode=True):
        self.noisy = mode
        return super().train(mode)

    def forward(self, x):
        return x + torch.randn_like(x) if self.noisy else x


def test_a_module_with_its_own_train_is_asked():
    net = nn.Sequential(Switched(), nn.BatchNorm1d(4)).train()
    net[1].eval()
    x = torch.rand(2, 4)
    with held_still(net):
        assert torch.equal(net(x), net(x)) and not net[0].noisy
    assert net[0].noisy and net[0].training and not net[1].training
    frozen = pd.defenses.rse(nn.Sequential(nn.Linear(4, 3), Switched()).train(), before_linear=True).freeze(2)
    assert torch.equal(frozen(x), frozen(x))
