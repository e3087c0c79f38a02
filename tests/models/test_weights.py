"""Weights of other people's files: all of them or none, and a sentence that names what is missing."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import probdefense as pd
from probdefense.models import load_weights
from tests.worlds import tiny_net


def trained():
    torch.manual_seed(5)
    net = tiny_net()
    net(torch.rand(8, 1, 6, 6))
    return net


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


FORMS = {
    "as it is": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "best": 0.5},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "model and state_dict": lambda s: {"model": {"state_dict": s}},
    "module.": lambda s: prefixed(s, "module."),
    "_orig_mod.module.": lambda s: {"state_dict": prefixed(s, "_orig_mod.module.")},
    "half": lambda s: {
        name: value.half() if value.is_floating_point() else value for name, value in s.items()
    },
    "without counters": lambda s: {n: v for n, v in s.items() if not n.endswith("num_batches_tracked")},
    "float64": lambda s: {
        name: value.double() if value.is_floating_point() else value for name, value in s.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("old", [False, True])
def test_checkpoints_of_every_form_load(form, old, tmp_path):
    net, x = trained(), torch.rand(4, 1, 6, 6)
    torch.save(FORMS[form](net.state_dict()), tmp_path / "net.pth", _use_new_zipfile_serialization=not old)
    loaded = load_weights(tiny_net(), tmp_path / "net.pth").eval()
    assert loaded[1].weight.dtype == torch.float32
    torch.testing.assert_close(loaded(x), net.eval()(x), atol=3e-3 if form == "half" else 0, rtol=0)


def test_safetensors_load_and_names_that_belong_to_the_network_stay(tmp_path):
    inner = nn.Module()
    inner.module = nn.Linear(2, 3)
    save_file(inner.state_dict(), tmp_path / "net.safetensors")
    other = nn.Module()
    other.module = nn.Linear(2, 3)
    load_weights(other, str(tmp_path / "net.safetensors"))
    assert torch.equal(other.module.weight, inner.module.weight)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (lambda: nn.Sequential(*tiny_net(), nn.Linear(3, 2)), r"missing: 8\.weight, 8\.bias\)"),
        (lambda: tiny_net()[:7], r"left over: 7\.weight, 7\.bias\)"),
        (lambda: nn.Sequential(*tiny_net()[:7], nn.Linear(16, 5)), r"7\.weight \(3, 16\) for \(5, 16\)"),
        (lambda: nn.Sequential(tiny_net()), r"missing: .* and 7 more; left over: .* and 8 more"),
    ],
)
def test_networks_that_do_not_fit_stay_as_they_were(net, said, tmp_path):
    torch.save(trained().state_dict(), tmp_path / "net.pt")
    net = net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_weights(net, tmp_path / "net.pt")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def broken(kind, path):
    content = trained().state_dict()
    if kind == "truncated":
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "truncated, old":
        torch.save(content, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("hello", "abc"):  # which fail in other ways
        path.write_text(kind)
    elif kind == "a network":
        torch.save(tiny_net(), path)
    elif kind == "numbers":
        torch.save({"accuracy": 0.5}, path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "numpy":
        np.savez(path.with_suffix(".npz"), x=np.zeros(3))
        path.with_suffix(".npz").rename(path)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "truncated, old", "empty", "hello", "abc", "a network", "numbers", "a tensor", "numpy"],
)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_that_hold_no_weights_are_one_sentence(kind, ending, tmp_path):
    path = tmp_path / f"net{ending}"
    broken(kind, path)
    with pytest.raises(ValueError, match="expected the weights of a network in") as caught:
        load_weights(tiny_net(), path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_absent_files_and_defenses_are_refused(tmp_path):
    for place in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(OSError):
            load_weights(tiny_net(), place)
    torch.save(trained().state_dict(), tmp_path / "net.pt")
    with pytest.raises(TypeError, match=r"load a defense with probdefense\.load"):
        load_weights(pd.deterministic(tiny_net()), tmp_path / "net.pt")
