"""A defense comes back from its file as it was, or the file is refused in one sentence."""

import copy
import json
import os
import subprocess
import sys
import warnings
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import probdefense as pd
from probdefense.core.persistence import header
from probdefense.core.registry import BUILDERS as REGISTRY
from probdefense.core.registry import builder, described, restored
from tests.contract import BUILDERS, ENSEMBLES, N, defended
from tests.worlds import tiny_batch, tiny_net

d = pd.defenses


@pytest.fixture
def path(tmp_path):
    return tmp_path / "defense.safetensors"


def answers(defense, x):
    torch.manual_seed(3)
    return defense(x, 4)


def moved(defense):
    """The same defense with other numbers in its parameters and running statistics, as after training."""
    with torch.no_grad():
        for tensor in (*defense.parameters(), *defense.buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1:
                tensor.add_(0.01 * torch.randn_like(tensor))
    return defense


NO_RECORD = {"bayesian of two families", "rse after blocks"}
"""Builders with a function among their arguments."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in NO_RECORD])
def test_every_builder_comes_back_from_its_calls(name, dtype, path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        defense = moved(BUILDERS[name](tiny_net().to(dtype)).eval().to(dtype))
    x = tiny_batch()[0].to(dtype)
    if name in ENSEMBLES and dtype == torch.float64:
        pytest.skip("the second member is made in single precision")
    pd.save(defense, path)
    loaded = pd.load(path, net=tiny_net().to(dtype))
    assert torch.equal(answers(loaded, x), answers(defense, x)) and not loaded.training
    assert repr(loaded) == repr(defense) and loaded.calls == defense.calls
    assert loaded.num_data == defense.num_data
    assert [type(s) for s in loaded.sites.values()] == [type(s) for s in defense.sites.values()]


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_comes_back_into_one_that_is_built(name, path):
    defense, x = moved(defended(name).train()), tiny_batch()[0]
    pd.save(defense, path)
    built = BUILDERS[name](tiny_net())
    loaded = pd.load(path, defense=built)
    assert loaded is built and loaded.training
    assert torch.equal(answers(loaded, x), answers(defense, x))


def test_calls_are_listed_in_order_and_go_with_copies():
    net = tiny_net()
    defense = d.brelu(d.bayesian(d.rse(net, sigma_init=0.1), num_data=N), ceiling=2.0)
    assert [call.builder for call in defense.calls] == ["rse", "bayesian", "brelu"]
    assert defense.calls[0].arguments["sigma_init"] == 0.1 and defense.calls[2].arguments["ceiling"] == 2.0
    assert copy.deepcopy(defense).calls == defense.calls
    assert d.rse(pd.Defense.from_sites(tiny_net(), [])).calls is None
    assert pd.deterministic(net).calls[0].builder == "deterministic"


ARGUMENTS = {
    "a torch distribution": lambda net: d.bayesian(net, prior=torch.distributions.Laplace(0.0, 0.3)),
    "a scale mixture of numbers": lambda net: d.bayesian(net, prior=dist.StudentT(3.0, 0.0, 0.7)),
    "a family": lambda net: d.bayesian(net, family=dist.Laplace),
    "our own family": lambda net: d.bayesian(net, family=d.MultiplicativeLogNormal, prior=None),
    "thresholds by path": lambda net: d.jump_relu(net, kappa={"3": 0.1, "5": dist.Uniform(0.0, 0.3)}),
    "noise of a family": lambda net: d.rse(net, family=dist.Laplace(0.0, 0.5), scale="learned"),
    "an example": lambda net: d.rse(net, scale="learned", scale_shape="element", example=tiny_batch()[0]),
    "a number of torch": lambda net: d.rse(net, sigma_init=torch.tensor(0.25).item()),
    "per tensor": lambda net: d.bayesian(net, layout="per_tensor", init_scale=0.3, floor=0.1),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_kept(name, path):
    defense = ARGUMENTS[name](tiny_net()).eval()
    pd.save(defense, path)
    loaded = pd.load(path, net=tiny_net())
    x = tiny_batch()[0]
    assert torch.equal(answers(loaded, x), answers(defense, x))
    warnings.simplefilter("ignore")  # of divergences that are estimated
    step, again = ([torch.manual_seed(0), f.step(*tiny_batch())][1] for f in (defense, loaded))
    assert {k: float(v) for k, v in step.kl.items()} == {k: float(v) for k, v in again.kl.items()}


class Scaled(dist.Normal):
    """A family of one's own."""


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda net: d.bayesian(net, prior=lambda *_: None), r"bayesian\(prior=\) was a function"),
        (lambda net: d.bayesian(net, where=lambda n, _: "weight" in n), r"bayesian\(where=\) was a function"),
        (lambda net: d.rse(net, family=Scaled(0.0, 1.0)), r"rse\(family=\) was a Scaled"),
        (lambda net: d.bayesian(net, family=Scaled), r"bayesian\(family=\) was a class Scaled"),
        (lambda net: d.rse(pd.Defense.from_sites(net, [])), "was not made by builders alone"),
        (lambda net: pd.Defense(pd.deterministic(net).model, pd.deterministic(net).guide), "builders alone"),
    ],
)
def test_what_no_file_holds_asks_for_the_defense(build, said, path):
    defense = build(tiny_net()).eval()
    pd.save(defense, path)
    with pytest.raises(ValueError, match=rf"{said}.*pass it as defense="):
        pd.load(path, net=tiny_net())
    x = tiny_batch()[0]
    assert torch.equal(answers(pd.load(path, defense=build(tiny_net())), x), answers(defense, x))


def test_ensembles_take_one_network_or_all(path):
    nets = [tiny_net() for _ in range(3)]
    defense, x = d.rse(d.ensemble(iter(nets), num_data=N)).eval(), tiny_batch()[0]
    pd.save(defense, path)
    for net in (tiny_net(), [tiny_net() for _ in nets], nn.ModuleList(tiny_net() for _ in nets)):
        assert torch.equal(answers(pd.load(path, net=net), x), answers(defense, x))
    with pytest.raises(ValueError, match="expected net as one network or 3, got 2"):
        pd.load(path, net=nets[:2])


def test_shared_tensors_and_other_types_come_back(path):
    net = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.bfloat16))
    net[1].weight = net[0].weight
    net.register_buffer("seen", torch.tensor(3))
    net.register_buffer("turned", torch.arange(6.0).view(2, 3).T.expand(3, 2))
    pd.save(d.pni(net, alpha_init=0.5), path)
    other = copy.deepcopy(net)
    other.seen.zero_()
    loaded = pd.load(path, net=other)
    assert loaded.net[1].weight is loaded.net[0].weight and int(loaded.net.seen) == 3
    assert torch.equal(loaded.net[0].weight, net[0].weight) and torch.equal(loaded.net.turned, net.turned)


def test_notes_come_back_and_add_up(path):
    defense = pd.deterministic(tiny_net())
    pd.save(defense, path, accuracy=torch.tensor(0.5), mean=[0.3], trained="digits")
    loaded = pd.load(path, net=tiny_net())
    assert loaded.notes == {"accuracy": 0.5, "mean": [0.3], "trained": "digits"}
    pd.save(loaded, path, accuracy=0.75)
    assert header(path)["notes"] == {"accuracy": 0.75, "mean": [0.3], "trained": "digits"}
    assert header(path)["libraries"]["torch"] and header(path)["calls"][0]["builder"] == "deterministic"
    with pytest.raises(TypeError, match="expected notes that JSON can hold"):
        pd.save(defense, path, net=tiny_net())
    assert header(path)["notes"]["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
            "does not go through the calls .* with rse|does not go",
        ),
        (lambda: nn.Sequential(*tiny_net(), nn.Linear(3, 3)), "missing: model.net.8.weight"),
        (lambda: nn.Sequential(*list(tiny_net())[:-1], nn.Linear(16, 5)), r"\(3, 16\) for \(5, 16\)"),
        (lambda: tiny_net().double(), "of another type: .* torch.float32 for torch.float64"),
        (lambda: nn.Sequential(nn.Identity(), tiny_net()), "got another at 4.noise, 1.4.noise"),
        (lambda: "net", "expected an nn.Module or a Defense, got str"),
    ],
)
def test_networks_that_do_not_fit_are_refused(net, said, path):
    pd.save(d.rse(tiny_net()), path)
    with pytest.raises(ValueError, match=said):
        pd.load(path, net=net())


def test_defenses_of_other_settings_are_refused_and_stay_as_they_were(path):
    pd.save(d.jump_relu(tiny_net(), kappa=0.1), path)
    other = d.jump_relu(tiny_net(), kappa=0.2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"kappa is .* there, .* here"):
        pd.load(path, defense=other)
    with pytest.raises(ValueError, match="got another at input_noise, 4.noise"):
        pd.load(path, defense=d.rse(tiny_net()))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    for both in ({}, {"net": tiny_net(), "defense": other}, {"defense": tiny_net()}):
        with pytest.raises(TypeError, match=r"expected either net=.*\(jump_relu\)"):
            pd.load(path, **both)


def test_only_defenses_are_saved(path):
    x, y = tiny_batch()
    for other in (
        tiny_net(),
        pd.rmc(
            pd.deterministic(tiny_net()), (x, y), attack=partial(pd.attacks.fgsm, eps=0.1), num_neighbors=8
        ),
        None,
    ):
        with pytest.raises(TypeError, match="expected a Defense, got .* of an adaptive defense save the one"):
            pd.save(other, path)

    class Keeping(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    net = Keeping(4, 3)
    with pytest.raises(ValueError, match="expected a state of tensors, got dict at 'model.net._extra_state'"):
        pd.save(pd.deterministic(net), path)
    assert not path.exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(path):
    pd.save(pd.deterministic(tiny_net()), path, number=1)
    before = path.read_bytes()
    path.with_name(path.name + ".partial").mkdir()
    with pytest.raises(OSError):
        pd.save(pd.deterministic(tiny_net()), path, number=2)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        pd.save(pd.deterministic(tiny_net()), path.parent / "absent" / "file")


# Files that are none, or not as they were written


@pytest.fixture
def written(path):
    pd.save(d.rse(d.bayesian(nn.Linear(4, 3), num_data=N), before_linear=True), path, accuracy=0.5)
    return path


def refused(path, match="expected a file of probdefense.save"):
    with pytest.raises(ValueError, match=match) as caught:
        pd.load(path, net=nn.Linear(4, 3))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_part_of_a_file_is_refused(written, share):
    written.write_bytes(written.read_bytes()[: int(share * written.stat().st_size)])
    assert "got something else or a part of one" in refused(written)


def test_files_of_others_are_named(written, tmp_path):
    net = nn.Linear(4, 3)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    torch.save(net.state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    save_file(net.state_dict(), tmp_path / "c.safetensors")
    for name, said in (
        ("a.pt", "one of torch.save"),
        ("b.pt", "one of torch.save"),
        ("c.safetensors", "another program"),
    ):
        assert "probdefense.models.load_weights(net, path)" in refused(tmp_path / name, said)
    (tmp_path / "text").write_text("not a checkpoint at all")
    refused(tmp_path / "text", "something else")
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(OSError):
            pd.load(absent, net=net)


def rewritten(path, change, checksum=False):
    """The file with another header, whose checksum may be forged too."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    found = json.loads(head["__metadata__"]["probdefense"])
    before = head["__metadata__"]["probdefense"]
    head["__metadata__"]["probdefense"] = change(found) or json.dumps(found)
    assert head["__metadata__"]["probdefense"] != before
    if checksum:
        from safetensors.torch import load_file

        from probdefense.core.persistence import _checksum

        head["__metadata__"]["checksum"] = _checksum(head["__metadata__"]["probdefense"], load_file(path))
    new = json.dumps(head).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])


def test_a_newer_file_asks_for_an_update(written):
    rewritten(written, lambda found: found.update(format=2, more="?", sites=None))
    refused(written, "of format 1, got format 2, which a newer version wrote; update probdefense")


FORGED = {
    "no header": lambda found: " ",
    "no JSON": lambda found: "{",
    "a list": lambda found: "[1]",
    "deep": lambda found: "[" * 100_000,
    "no format": lambda found: found.pop("format") and None,
    "a format of another kind": lambda found: found.update(format="1"),
    "no sites": lambda found: found.pop("sites") and None,
    "sites of another kind": lambda found: found.update(sites=[1]),
    "other sites": lambda found: found["sites"].update(weights=3),
    "an unknown builder": lambda found: found["calls"][0].update(builder="os.system"),
    "an unknown argument": lambda found: found["calls"][0]["arguments"].update(command="x"),
    "arguments of another kind": lambda found: found["calls"][0].update(arguments=[1]),
    "members of another kind": lambda found: found["calls"][0].update(members="many"),
    "calls of another kind": lambda found: found.update(calls=["rse"]),
    "no calls": lambda found: found.update(calls=[]),
    "a family from elsewhere": lambda found: found["calls"][0]["arguments"].update(
        family={"family": "os.system"}
    ),
    "no family": lambda found: found["calls"][0]["arguments"].update(family={"family": "pyro.sample"}),
    "a prior of other numbers": lambda found: found["calls"][0]["arguments"]["prior"].update(
        numbers={"loc": 1}
    ),
    "a prior of no numbers": lambda found: found["calls"][0]["arguments"].update(
        prior={"distribution": "pyro.Normal", "numbers": {"loc": ["a", "float32"], "scale": [1, "save"]}}
    ),
    "an argument that says nothing": lambda found: found["calls"][0]["arguments"].update(prior={"odd": 1}),
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("checksum", [False, True])
def test_changed_headers_are_refused(written, name, checksum):
    rewritten(written, FORGED[name], checksum)
    refused(written, "." if checksum else "changed or damaged")


@pytest.mark.slow
def test_every_changed_byte_is_noticed(written):
    """Each byte of the header, and some of the tensors: a changed file is refused or says the same."""
    content = bytearray(written.read_bytes())
    expected = pd.load(written, net=nn.Linear(4, 3)).state_dict()
    header_end = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = [*range(header_end), *range(header_end, len(content), 7)]
    for place in places:
        flip = int(torch.randint(1, 256, (), generator=generator))
        written.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        try:
            found = pd.load(written, net=nn.Linear(4, 3)).state_dict()
        except ValueError as error:
            assert str(written) in str(error) and "\n" not in str(error)
            continue
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_noise_is_no_file(path, seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 2000, (), generator=generator))
    noise = bytes(torch.randint(256, (size,), generator=generator).tolist())
    path.write_bytes((min(size, 300).to_bytes(8, "little") if seed % 2 else b"") + noise)
    refused(path)


def test_nothing_is_unpickled(tmp_path):
    """A pickle that would make a file when it is read makes none."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "one of torch.save")
    with pytest.raises(ValueError, match="got objects that would run code"):
        pd.models.load_weights(nn.Linear(4, 3), tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


# The registry


def test_every_public_builder_is_registered():
    assert set(REGISTRY) >= {
        "rse",
        "pni",
        "mc_dropout",
        "bayesian",
        "ensemble",
        "jump_relu",
        "brelu",
        "deterministic",
    }

    def rse(net):
        return pd.deterministic(net)

    with pytest.raises(
        ValueError, match=r"expected a new name for a builder, got 'rse' of probdefense\.defenses"
    ):
        builder(rse)


def test_a_builder_of_ones_own_is_recorded(path, monkeypatch):
    def doubled(net, *, times=2):
        return pd.deterministic(nn.Sequential(net, *[nn.Identity()] * times))

    monkeypatch.delitem(REGISTRY, "doubled", raising=False)
    builder(doubled)
    build = builder(doubled)  # as when a cell of a notebook is run again
    pd.save(d.rse(build(tiny_net(), times=1)), path)
    assert [call["builder"] for call in header(path)["calls"]] == ["doubled", "rse"]
    x = tiny_batch()[0]
    loaded = pd.load(path, net=tiny_net())
    assert answers(loaded, x).shape == (4, 6, 3)
    monkeypatch.delitem(REGISTRY, "doubled")
    with pytest.raises(ValueError, match="no builder is named 'doubled' here; import the module"):
        pd.load(path, net=tiny_net())


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 0.1, "text", [1, 2.5], {"3": 0.1}, dist.Normal, d.MultiplicativeLogNormal],
)
def test_plain_values_are_their_own_record(value):
    record = json.loads(json.dumps(described(value, "a")))
    assert restored(record, "a") == value and type(restored(record, "a")) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        dist.Normal(torch.tensor(0.1, dtype=torch.float64), 0.3),
        torch.distributions.Normal(0.1, torch.tensor([0.2, 0.3])),
        dist.Gamma(2.0, 3.0),
        dist.Bernoulli(logits=torch.tensor(0.3)),
        dist.LogNormal(0.0, 0.5),
    ],
)
def test_distributions_come_back_bit_by_bit(value):
    again = restored(json.loads(json.dumps(described(value, "a"))), "a")
    assert type(again) is type(value)
    sample = value.sample()
    assert torch.equal(again.log_prob(sample), value.log_prob(sample))


def test_a_file_is_read_in_a_process_of_its_own(written):
    code = (
        "import torch, sys, probdefense as pd\n"
        f"defense = pd.load({str(written)!r}, net=torch.nn.Linear(4, 3))\n"
        "torch.manual_seed(0)\n"
        "print(float(defense(torch.ones(1, 4), 2).sum()))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    defense = pd.load(written, net=nn.Linear(4, 3))
    torch.manual_seed(0)
    assert float(answer.stdout) == pytest.approx(float(defense(torch.ones(1, 4), 2).detach().sum()), rel=1e-5)


def test_a_load_warns_of_nothing(written):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.load(written, net=nn.Linear(4, 3))
