"""Builders put something only where the network runs, and say what they cannot see or reach."""

import warnings
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import probdefense as pd
from probdefense.defenses import bayesian, brelu, ensemble, jump_relu, mc_dropout, pni, rse
from tests.nn.test_passes import Attention, Encoder, Recurrent, hidden_net
from tests.worlds import import_torchvision, tiny_batch, tiny_net


class Tokens(nn.Module):
    """A transformer over the rows of the input; attention reads the weights of its ``out_proj``."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.emb, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.enc = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.head(self.enc(self.emb(x)).mean(1))


class Pool(nn.Module):
    """Averages over the first axis of the example, and so refuses vectors."""

    def __init__(self):
        super().__init__()
        self.f, self.o = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.o(self.f(x.mean(1)).relu())


class Odd(nn.Module):
    """An input that nobody guesses: five axes and a width that no layer shows."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.act(self.first(x[..., ::3].flatten(1))))


class Auxiliary(nn.Module):
    """A head that runs in training alone, a ReLU that nothing calls and a linear layer that is read."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.ReLU()
        self.read, self.act, self.drop, self.idle = (
            nn.Linear(4, 3),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Dropout(0.5),
        )

    def forward(self, x):
        z = self.drop(self.act(self.body(x)))
        return F.linear(z, self.read.weight) + (self.aux(z) if self.training else 0)


ROWS = torch.rand(6, 5, 4, generator=torch.Generator().manual_seed(0))


def alive(defense, x):
    """The sites that move the logits: changing the value of one alone changes the answer."""
    values = defense.draw(x)
    base = defense.at(values)(x)
    return [n for n in values if not torch.equal(defense.at(values | {n: values[n] + 1})(x), base)]


@pytest.mark.parametrize("example", [None, ROWS])
def test_noise_is_listed_only_where_it_acts(example):
    torch.manual_seed(0)
    defense = rse(Tokens(), before_linear=True, example=example)
    assert set(defense.sites) == {"input_noise", "head.noise", "enc.linear1.noise", "enc.linear2.noise"}
    assert set(alive(defense, ROWS)) == set(defense.sites)


@pytest.mark.parametrize("example", [None, ROWS])
@pytest.mark.parametrize(
    "build",
    [
        partial(rse, where=lambda path, _: path.endswith("out_proj"), init_at="conv"),
        partial(rse, where=lambda path, _: path.endswith(("out_proj", "emb"))),
    ],
)
def test_a_chosen_layer_that_never_runs_is_refused_by_name(build, example):
    with pytest.raises(ValueError, match=r"^enc\.self_attn\.out_proj never runs in evaluation mode"):
        build(Tokens(), example=example)


@pytest.mark.parametrize("place", ["input", "output"])
def test_pni_and_dropout_act_where_they_are_listed(place):
    torch.manual_seed(0)
    for build in (partial(pni, place=place), partial(mc_dropout, rate=0.5)):
        defense = build(Tokens())
        assert len(defense.sites) == 4 if build.func is pni else 3
        assert set(alive(defense, ROWS)) == set(defense.sites)
        assert not any("out_proj" in name for name in defense.sites)


def test_what_runs_in_training_alone_or_never_is_left_out():
    x = torch.rand(3, 4)
    assert list(rse(Auxiliary(), before_linear=True).sites) == ["input_noise"]
    assert list(pni(Auxiliary(), place="input").sites) == ["body.pni"]
    assert list(mc_dropout(Auxiliary(), rate=0.5).sites) == ["drop.dropout"]
    random = jump_relu(Auxiliary(), kappa=dist.Uniform(0.0, 0.5))
    assert list(random.sites) == ["act.jump"] and float(random(x, 50).detach().std(0).max()) > 0
    assert [n for n, m in brelu(Auxiliary()).net.named_modules() if isinstance(m, pd.nn.BReLU)] == [
        "act.bound"
    ]
    for build in (
        partial(rse, where=lambda path, _: path in ("aux", "body")),
        partial(jump_relu, kappa=0.1, where=lambda path, _: path == "unused"),
        partial(jump_relu, kappa={"unused": 0.1, "act": 0.1}),
        partial(jump_relu, kappa={"functional": 0.1}),
    ):
        with pytest.raises(ValueError, match=r"^(aux|unused|functional) never runs in evaluation mode"):
            build(Auxiliary())


def test_auxiliary_heads_of_torchvision_get_no_noise():
    torch.manual_seed(0)
    net = import_torchvision().models.googlenet(aux_logits=True, init_weights=False, num_classes=3)
    sites = list(rse(net).sites)
    assert len(sites) > 50 and not any(name.startswith("aux") for name in sites)


def test_own_noise_that_never_acts_is_refused_in_the_first_pass():
    net = Auxiliary()
    net.aux = nn.Sequential(pd.nn.Noise(0.1), net.aux)
    with pytest.raises(
        ValueError, match=r"the noise of site aux\.0 never acts: its layer does not run on inputs"
    ):
        pd.deterministic(net)(torch.rand(2, 4))


def test_a_network_that_pools_first_needs_no_example():
    assert set(rse(Pool(), before_linear=True).sites) == {"input_noise", "o.noise"}


BUILDS = {
    "rse": partial(rse, before_linear=True),
    "pni": partial(pni, place="input"),
    "mc_dropout": partial(mc_dropout, rate=0.5),
    "jump_relu": partial(jump_relu, kappa=0.1),
    "brelu": brelu,
}


@pytest.mark.parametrize("name", BUILDS)
def test_where_no_guess_fits_an_example_is_asked_for(name):
    x, build = torch.rand(2, 1, 2, 1, 9), BUILDS[name]
    with pytest.raises(
        ValueError, match="cannot tell from a guessed input which layers of Odd run; pass example=x"
    ):
        build(Odd())
    assert build(Odd(), example=x)(x, 2).shape[1:] == (2, 3)
    with pytest.raises(
        ValueError, match=r"the network cannot run on example= of shape \(2, 5\); pass a batch"
    ):
        build(Odd(), example=torch.rand(2, 5))
    with pytest.raises(ValueError, match="expected example as a batch of inputs"):
        build(Odd(), example=[1, 2])


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("make", [Recurrent, Attention, Encoder])
def test_recurrent_and_attention_nets_need_no_example(make, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), make(), nn.Linear(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mc_dropout names what it cannot reach
        defense = BUILDS[name](net)
    x = torch.rand(3, 4)
    assert defense(x, 2).shape[1:] == (3, 3)
    if defense.stochastic:
        assert set(alive(defense, x)) == set(defense.sites)


def test_a_layer_called_by_keyword_gets_its_noise_and_one_without_a_tensor_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(input=self.body(x))

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.sum = nn.Linear(4, 3), Sum()

        def forward(self, x):
            return self.sum((self.body(x), x[:, :3]))

    class Sum(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    x = torch.rand(2, 4)
    assert set(alive(rse(Named(), before_linear=True), x)) == {"input_noise", "head.noise"}
    with pytest.raises(ValueError, match="the first input of 'sum' is not a tensor"):
        rse(Pair(), where=lambda path, _: path == "sum")


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("LSTM", r"1\.cells \(LSTM\)"),
        ("attention", r"1\.attention \(MultiheadAttention\)"),
        ("functional dropout", r"1 \(Functional\)"),
        ("stochastic depth", r"1 \(Depth\)"),
        ("alpha dropout", r"1 \(AlphaDropout\)"),
        ("encoder layer", r"1\.layer\.self_attn \(MultiheadAttention\)"),
    ],
)
def test_mc_dropout_says_what_it_cannot_reach(layer, place):
    with pytest.warns(UserWarning, match=f"mc_dropout cannot reach what is drawn inside {place}: it acts"):
        defense = mc_dropout(hidden_net(layer), rate=0.5)
    assert set(alive(defense, torch.rand(2, 4))) == set(defense.sites)


def test_mc_dropout_says_nothing_where_it_reaches_all():
    mc_dropout(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.BatchNorm1d(4), nn.Linear(4, 3)), rate=0.5)
    mc_dropout(nn.Sequential(Tokens(dropout=0.0)), rate=0.5)


def frozen_layers():
    net = tiny_net()
    net[1].requires_grad_(False)
    return net


def test_frozen_parameters_stay_as_they_are_unless_they_are_asked_for():
    net, x = frozen_layers(), tiny_batch()[0]
    defense = bayesian(net)
    assert {n for group in defense.sites["weights"].names for n in group} == {
        "4.weight", "4.bias", "7.weight", "7.bias"
    }  # fmt: skip
    assert torch.equal(defense.net[1].weight, net[1].weight) and not defense.net[1].weight.requires_grad
    asked = bayesian(net, where=lambda name, _: name == "1.weight")
    assert asked.sites["weights"].names == (("1.weight",),)
    assert pni(net).sites["weight_noise"].names == (("4.weight",), ("7.weight",))
    assert float(pni(net)(x, 3).detach().std(0).max()) > 0


def test_where_all_is_frozen_the_error_says_so():
    net = tiny_net().requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"was chosen; all of them are frozen \(requires_grad=False\), and only where="
    ):
        bayesian(net)
    with pytest.raises(ValueError, match=r"all weights of Sequential are frozen \(requires_grad=False\)"):
        pni(net)
    assert list(bayesian(net, where=lambda *_: True).sites) == ["weights"]
    assert list(pni(net, place="input").sites) == ["1.pni", "4.pni", "7.pni"]


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.Sequential(nn.Identity(), net)])
@pytest.mark.parametrize("name", [*BUILDS, "bayesian", "ensemble"])
def test_networks_in_replicas_are_refused_with_the_way_out(name, wrap):
    build = BUILDS | {"bayesian": bayesian, "ensemble": lambda net: ensemble([net])}
    with pytest.raises(TypeError, match=r"got DataParallel .*around one; build from its \.module"):
        build[name](wrap(nn.DataParallel(tiny_net())))
