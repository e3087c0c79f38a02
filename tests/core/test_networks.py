"""Records of networks: what comes back is the same function, and what cannot come back has no record."""

import json

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.core.networks import record, remade
from probdefense.core.persistence import header

NETS = {
    "stack": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False, padding="same"), nn.GELU(), nn.Flatten()),
    "named": lambda: nn.Sequential(),
    "norms": lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.GroupNorm(1, 3), nn.LeakyReLU(0.1)),
    "pixels": lambda: nn.Sequential(
        pd.nn.Normalize([0.1, 0.2, 0.3], [1 / 3, 0.5, 0.7]), pd.models.resnet(8), pd.nn.BReLU(2.0)
    ),
    "double": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).double(),
    "small_cnn": lambda: pd.models.small_cnn(3, num_classes=4),
    "preact": pd.models.preact_resnet18,
}


@pytest.mark.parametrize("name", NETS)
def test_a_recorded_network_comes_back_as_the_same_function(name):
    net = NETS[name]().eval()
    if name == "named":
        net.add_module("first", nn.Flatten())
    again = remade(json.loads(json.dumps(record(net)))).eval()
    again.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 32, 32, dtype=next((p.dtype for p in net.parameters()), torch.float32))
    assert torch.equal(again(x), net(x))
    assert repr(again) == repr(net)


class Own(nn.Linear):
    pass


def _changed(change):
    net = pd.models.resnet(8)
    change(net)
    return net


def _tied():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = one.weight
    return nn.Sequential(one, other)


UNRECORDED = {
    "of one's own": lambda: Own(2, 2),
    "bare": nn.Module,
    "a list": lambda: nn.ModuleList([]),
    "in a stack": lambda: nn.Sequential(nn.Flatten(), Own(2, 2)),
    "twice": lambda: nn.Sequential(*[nn.Linear(2, 2)] * 2),
    "tied": _tied,
    "another head": lambda: _changed(lambda net: setattr(net, "linear", nn.Linear(64, 3))),
    "another activation": lambda: _changed(lambda net: setattr(net.layer1[0], "relu", nn.Tanh())),
    "another number": lambda: _changed(lambda net: setattr(net.bn1, "eps", 0.1)),
    "another forward": lambda: _changed(lambda net: setattr(net, "forward", lambda x: x)),
    "hooked": lambda: _changed(lambda net: net.conv1.register_forward_hook(lambda *_: None)),
    "two types": lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()),
    "no network": lambda: torch.relu,
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_what_would_come_back_otherwise_has_no_record(name):
    assert record(UNRECORDED[name]()) is None


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"layer": "torch.Module2", "settings": {}, "dtype": "float32"},
        {"layer": "os.system", "settings": {}, "dtype": "float32"},
        {"layer": "torch.functional", "settings": {}, "dtype": "float32"},
        {"layer": "torch.Linear", "settings": {"in_features": "x"}, "dtype": "float32"},
        {"network": "resnet", "settings": {"depth": 7}, "dtype": "float32"},
        {"network": "resnet", "settings": {"depth": 8}, "dtype": "float33"},
        {"layers": [1], "dtype": "float32"},
        [],
    ],
)
def test_records_that_say_nothing_are_refused(found):
    with pytest.raises(ValueError, match="says nothing that is known here"):
        remade(found)


def test_files_hold_the_record_of_the_network(tmp_path):
    net = nn.Sequential(pd.nn.Normalize([0.5], [0.5]), pd.models.small_cnn())
    defense = pd.defenses.bayesian(pd.defenses.rse(net), num_data=9)
    pd.save(defense, tmp_path / "mine.safetensors")
    found = header(tmp_path / "mine.safetensors")["network"]
    assert found == record(net)
    again = pd.load(tmp_path / "mine.safetensors", net=remade(found))
    assert again.origin == found, "a defense that was loaded can be saved again"
    several = pd.defenses.ensemble([pd.models.small_cnn() for _ in range(2)])
    assert several.origin == record(pd.models.small_cnn())
    mixed = pd.defenses.ensemble([pd.models.small_cnn(width=width) for width in (4, 8)])
    assert mixed.origin is None and pd.deterministic(Own(2, 2)).origin is None
