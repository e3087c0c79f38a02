"""The whole road, as the page tells it: a trained network, noise, fine-tuning, a file, a report, a certificate."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/howto/retrofit.md").read_text()
COMMAND = [sys.executable, "-m", "probdefense"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

CIFAR = """
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd

root = Path(os.environ["PROBDEFENSE_DATA"])


def images(part):
    found = np.load(root / f"cifar10/cifar10-lossless-{part}.npz")
    x = torch.as_tensor(found["x"][:64]).permute(0, 3, 1, 2).float() / 255
    return TensorDataset(x, torch.as_tensor(found["y"][:64]).long())


def data():
    return images("train4000"), images("test300")


if __name__ == "__main__":
    torch.manual_seed(0)
    weights = root / "weights/akamaster_resnet_cifar10/resnet20-12fca82f.th"
    net = pd.models.load_weights(pd.models.resnet(20), weights)
    net = torch.nn.Sequential(pd.nn.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), net)
    defense, loader = pd.defenses.rse(net, sigma_init=0.05, sigma_inner=0.02), DataLoader(images("train4000"), 32)
    pd.recalibrate(defense, loader)
    optimizer = torch.optim.Adam(defense.param_groups(), lr=1e-4)
    pd.fit(defense, loader, epochs=1, optimizer=optimizer, progress=False)
    pd.save(defense.eval(), "rse.safetensors")
"""


def code(language):
    """The blocks of the page in a language."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def commands():
    """What the page types, as lists of words for this interpreter."""
    known = {"python": [sys.executable], "probdefense": COMMAND, "torchrun": TORCHRUN}
    lines = [line.split() for block in code("bash") for line in block.splitlines()]
    return [[*known[first], *rest] for first, *rest in lines]


def ran(command, place):
    answer = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def killed(command, place, out, more):
    """Kills a command when it has finished so many chunks more."""
    before = len(list(place.glob(f"{out}/journal/*.npz")))
    with subprocess.Popen(command, cwd=place, stdout=-3, stderr=-3) as process:
        while len(list(place.glob(f"{out}/journal/*.npz"))) < before + more:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (place / out / "report.json").exists()


def same(place, one, other):
    for name in ("report.json", "arrays.npz"):
        assert (place / one / name).read_bytes() == (place / other / name).read_bytes()


def walked(place, script, evaluate, certify, report, together):
    """The road with two falls, and beside it the road of two processes, which do not fall."""
    ran(script, place)
    out = evaluate[-1]
    for _ in range(2):
        killed(evaluate, place, out, 1)
    ran(evaluate, place)
    assert "certified accuracy" in ran(certify, place)
    page = (place / out / "report.html").read_text()
    assert "Certified accuracy" in page
    ran(report, place)
    assert (place / out / "report.html").read_text() == page
    ran(together, place)
    same(place, together[-1], out)
    return json.loads((place / out / "report.json").read_text())["rows"]


def test_the_page_is_short():
    assert len(code("python")[0].splitlines()) <= 40 and len(commands()) == 5


@pytest.mark.slow
def test_the_page_is_true(tmp_path):
    (tmp_path / "retrofit.py").write_text(code("python")[0])
    rows = walked(tmp_path, *commands())
    assert {row["attack"] for row in rows} == {"clean", "eot_pgd", "suite", "worst"}
    assert rows[0]["accuracy"] > 0.8


@pytest.mark.slow
def test_a_trained_resnet_walks_it_too(tmp_path):
    weights = Path(os.environ.get("PROBDEFENSE_DATA", "."), "weights/akamaster_resnet_cifar10")
    if not weights.exists():
        pytest.skip("needs the trained networks in PROBDEFENSE_DATA")
    (tmp_path / "retrofit.py").write_text(CIFAR)
    options = ["rse.safetensors", "--data", "retrofit.py:data", "--images", "12", "--chunk-size", "3"]
    cheap = ["--attacks", "fgsm", "--num-samples", "4", "--eps", "0.00784"]
    evaluate = ["evaluate", *options, *cheap, "--out", "judged"]
    certify = [*COMMAND, "certify", *options, "--num-draws", "40", "--n0", "10", "--out", "judged"]
    together = [*TORCHRUN, "--nproc-per-node", "2", "-m", "probdefense", *evaluate[:-1], "both"]
    script = [sys.executable, "retrofit.py"]
    rows = walked(tmp_path, script, [*COMMAND, *evaluate], certify, [*COMMAND, "report", "judged"], together)
    assert rows[0]["accuracy"] > 0.5
