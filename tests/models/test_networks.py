"""The networks: published sizes, published names, and every builder on networks of other people."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.models.residual import _WideResNet
from tests.test_real_networks import stored
from tests.worlds import import_torchvision

m = pd.models

SIZES = {
    "resnet20": (m.resnet20, 269_722),
    "resnet32": (lambda: m.resnet(32), 464_154),
    "resnet44": (lambda: m.resnet(44), 658_586),
    "resnet56": (lambda: m.resnet(56), 853_018),
    "resnet110": (lambda: m.resnet(110), 1_727_962),
    "resnet18": (m.resnet18, 11_173_962),
    "preact_resnet18": (m.preact_resnet18, 11_172_170),
    "wide_resnet": (m.wide_resnet, 36_479_194),
    "wide_resnet 34": (lambda: m.wide_resnet(34), 46_160_474),
    "resnext29": (m.resnext29, 9_128_778),
    "madry_cnn": (m.madry_cnn, 3_274_634),
    "strided_cnn": (m.strided_cnn, 166_406),
    "cohen_lenet": (m.cohen_lenet, 431_080),
}
"""Parameters as their papers and usual implementations count them."""


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    build, count = SIZES[name]
    assert sum(parameter.numel() for parameter in build().parameters()) == count


@pytest.mark.parametrize(
    "build",
    [
        lambda: m.resnet(8, 7),
        lambda: m.wide_resnet(10, 1, 7),
        lambda: m.resnext29(7),
        lambda: m.preact_resnet18(7),
    ],
)
def test_residual_networks_answer_train_and_take_noise(build):
    net, x = build(), torch.rand(2, 3, 32, 32)
    assert net(x).shape == (2, 7)
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert len(pd.defenses.rse(net).sites) == convolutions
    relus = [module for module in net.modules() if isinstance(module, nn.ReLU)]
    jumps = pd.defenses.jump_relu(net, kappa=0.1).net.modules()
    assert sum(isinstance(module, pd.nn.JumpReLU) for module in jumps) == len(relus)


def test_names_are_those_of_shared_checkpoints():
    names = set(m.resnet(20).state_dict())
    assert {
        "conv1.weight",
        "bn1.bias",
        "layer1.0.conv1.weight",
        "layer3.2.bn2.weight",
        "linear.bias",
    } <= names
    assert not any("shortcut" in name or "downsample" in name for name in names)
    wide = set(_WideResNet(1, 1, 10).state_dict())
    assert {
        "block1.layer.0.conv1.weight",
        "block2.layer.0.convShortcut.weight",
        "bn1.weight",
        "fc.bias",
    } <= wide
    assert "layer2.0.shortcut.1.running_mean" in m.resnet18().state_dict()
    assert {"layer2.0.shortcut.0.weight", "bn.weight"} <= set(m.preact_resnet18().state_dict())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: m.resnet(21), "expected depth as 6 n [+] 2, such as 20, 32, 44, 56 or 110, got 21"),
        (lambda: m.resnet(2), "expected depth >= 8"),
        (lambda: m.wide_resnet(27), "expected depth as 6 n [+] 4"),
        (lambda: m.wide_resnet(28, 0), "expected width >= 1"),
    ],
)
def test_depths_that_no_blocks_give_are_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()


@pytest.mark.parametrize(("depth", "file"), [(20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")])
def test_public_checkpoints_load_and_are_as_accurate_as_they_say(depth, file):
    np = pytest.importorskip("numpy")
    net = m.load_weights(m.resnet(depth), stored("weights", "akamaster_resnet_cifar10", file)).eval()
    images = np.load(stored("cifar10", "cifar10-lossless-test300.npz"))
    x = torch.as_tensor(images["x"]).permute(0, 3, 1, 2).float() / 255
    normalized = nn.Sequential(pd.nn.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), net)
    with torch.no_grad():
        right = (normalized(x).argmax(1) == torch.as_tensor(images["y"]).long()).float().mean()
    assert float(right) == pytest.approx({20: 0.917, 56: 0.935}[depth], abs=0.03)


# Networks of torchvision

STRANGERS = {
    "resnet18": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "vit_b_16": 224,
    "a small ViT": 32,
    "swin_t": 64,
    "convnext_tiny": 64,
}
"""The side of the images on which they run here; ViT takes one size."""

GELU = {"a small ViT", "swin_t", "convnext_tiny"}

SMALL = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}


def doubled(net):
    """The network with another function."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        list(twin.parameters())[-1].add_(1.0)
    return twin


BUILDS = {
    "deterministic": pd.deterministic,
    "rse": lambda net: pd.defenses.rse(net, before_linear=True),
    "pni": pd.defenses.pni,
    "pni on inputs": lambda net: pd.defenses.pni(net, place="input"),
    "bayesian": lambda net: pd.defenses.bayesian(net, num_data=10),
    "mc_dropout": lambda net: pd.defenses.mc_dropout(net, rate=0.1),
    "jump_relu": lambda net: pd.defenses.jump_relu(net, kappa=1e-3),
    "brelu": lambda net: pd.defenses.brelu(net, ceiling=1.0),
    "ensemble": lambda net: pd.defenses.ensemble([net, doubled(net)]),
}


@pytest.fixture(scope="module")
def stranger():
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            models = import_torchvision().models
            small = partial(models.VisionTransformer, **SMALL)
            net = made[name] = getattr(models, name, small)(num_classes=3).eval()
            if "vit" in name.lower():  # whose head starts at zero
                nn.init.normal_(net.heads[0].weight)
        return made[name], torch.rand(2, 3, STRANGERS[name], STRANGERS[name])

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mc_dropout cannot reach")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch lacks a rule for vmap
@pytest.mark.parametrize(
    ("name", "build"),
    [*((name, build) for name in STRANGERS if name != "vit_b_16" for build in BUILDS), ("vit_b_16", "rse")],
)
def test_every_builder_takes_networks_of_torchvision(name, build, stranger):
    net, x = stranger(name)
    if build in ("jump_relu", "brelu") and name in GELU:
        with pytest.raises(ValueError, match="found no ReLU"):
            BUILDS[build](net)(x)
        return
    defense = BUILDS[build](net).eval()
    logits = defense(x, 2)
    assert logits.shape == (2 if defense.stochastic else 1, 2, 3) and bool(torch.isfinite(logits).all())
    assert defense.stochastic == (build not in ("deterministic", "jump_relu", "brelu"))
    if defense.stochastic:
        assert not torch.equal(logits[0], logits[1])
    point = pd.attacks.fgsm(defense, x, torch.tensor([0, 1]), eps=0.01)
    assert bool((point != x).any())
    step = defense.train().step(x, torch.tensor([0, 1]))
    (step.log_lik.sum() - sum(step.kl.values(), torch.zeros(()))).backward()


@pytest.mark.parametrize("name", ["mobilenet_v2"])
def test_relu6_is_a_relu(name, stranger):
    net, x = stranger(name)
    sixes = sum(isinstance(module, nn.ReLU6) for module in net.modules())
    defense = pd.defenses.brelu(net, ceiling=0.5)
    assert sum(isinstance(module, pd.nn.BReLU) for module in defense.net.modules()) == sixes > 30
    assert not torch.equal(defense(x), pd.deterministic(net)(x))
    cut = pd.defenses.jump_relu(nn.Sequential(nn.ReLU6()), kappa=2.0)
    assert cut(torch.tensor([[1.0, 3.0, 9.0]])).tolist() == [[[0.0, 3.0, 6.0]]]

    class Called(nn.Module):
        def forward(self, x):
            return nn.functional.relu6(x)

    assert pd.defenses.jump_relu(Called(), kappa=2.0)(torch.tensor([[1.0, 3.0, 9.0]])).tolist() == [
        [[0, 3, 6]]
    ]


@pytest.mark.parametrize("name", ["swin_t"])
def test_noise_on_a_transformer_says_that_only_patches_get_it(name, stranger):
    net, x = stranger(name)
    with pytest.warns(
        UserWarning, match=r"noise goes before 1 of the layers of SwinTransformer.*before_linear=True.*where="
    ):
        defense = pd.defenses.rse(net)
    assert list(defense.sites) == ["input_noise"] and defense.input_noise is not None
    assert len(pd.defenses.rse(net, before_linear=True).sites) > 20
    blocks = pd.defenses.rse(net, where=lambda path, module: type(module).__name__ == "SwinTransformerBlock")
    assert len(blocks.sites) == 12 and blocks(x, 2).shape == (2, 2, 3)


def test_auxiliary_heads_are_refused_in_training_with_the_way_out():
    net = import_torchvision().models.googlenet(aux_logits=True, init_weights=False, num_classes=3)
    defense, x = pd.defenses.rse(net), torch.rand(2, 3, 64, 64)
    assert defense.eval()(x, 2).shape == (2, 2, 3)
    with pytest.raises(TypeError, match=r"got GoogLeNetOutputs; wrap it in a module .*net\(x\)\.logits"):
        defense.train().step(torch.rand(2, 3, 224, 224), torch.tensor([0, 1]))
