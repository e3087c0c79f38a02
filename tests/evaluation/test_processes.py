"""Two processes find what one finds: reports and certificates to the byte, gradients to rounding."""

import atexit
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import probdefense as pd
from tests.contract import defended
from tests.torchrun import launched, torchrun
from tests.worlds import tiny_batch, tiny_net

ATTACKS = {
    "pgd": partial(pd.attacks.pgd, num_steps=3),
    "ddn": partial(pd.attacks.ddn, num_steps=3),
}


def files(report, folder):
    report.save(folder)
    return [(folder / name).read_bytes() for name in ("report.json", "arrays.npz")]


def smoothed():
    torch.manual_seed(0)
    return pd.defenses.rse(tiny_net(), sigma_init=0.25)


def evaluated(fabric=None, name="bayesian on rse", **options):
    data = options.pop("data", None) or tiny_batch(23)
    return pd.evaluate(
        defended(name),
        data,
        options.pop("attacks", ATTACKS),
        **{"norm": 2, "eps": [0.3, 0.6], "num_samples": 4, "chunk_size": 4, "fabric": fabric} | options,
    )


def certified(fabric=None, **options):
    options = {"n0": 20, "n": 100, "seed": 1, "chunk_size": 4, "fabric": fabric} | options
    found = pd.certify(smoothed(), tiny_batch(23)[0], **options)
    return [found.label.tolist(), found.radius.tolist(), found.share.tolist(), found.num_votes.tolist()]


def job(out):
    """What every process of a job does; each writes what it found."""
    fabric = launched()
    rank = fabric.global_rank
    atexit.register(lambda: (out / f"group {rank}").write_text(str(torch.distributed.is_initialized())))
    for name in ("bayesian on rse", "deterministic"):
        evaluated(fabric, name).save(out / f"{name} {rank}")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tiny_batch(23)), 5)
    evaluated(fabric, data=loader, journal=out / "journal").save(out / f"journal {rank}")
    races = certified(fabric, target_radius=0.1)
    unseeded = certified(fabric, seed=None)
    (out / f"certified {rank}").write_text(json.dumps([certified(fabric), races, unseeded]))


def slow(f, x, y, *, eps, norm):
    """An attack that takes a while; the second process dies of its first chunk but one."""
    time.sleep(0.2)
    if os.environ.get("DIE") and os.environ["RANK"] == "1":
        SEEN.append(1)
        if len(SEEN) == 3:
            Path(os.environ["DIE"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
    return pd.attacks.fgsm(f, x, y, eps=eps, norm=norm)


slow.fingerprint = "a slow attack"
SEEN: list[int] = []


def dying(out):
    """A job whose second process is killed where the environment says so."""
    fabric = launched()
    report = evaluated(fabric, attacks={"slow": slow}, journal=out / "journal", eps=0.3, chunk_size=2)
    report.save(out / f"resumed {fabric.global_rank}")


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(tmp_path):
    answer = torchrun(job, tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert [(tmp_path / f"group {rank}").read_text() for rank in (0, 1)] == ["False"] * 2
    for name in ("bayesian on rse", "deterministic"):
        one = files(evaluated(name=name), tmp_path / "one")
        assert all(files_of(tmp_path / f"{name} {rank}") == one for rank in (0, 1))
    expected = files(evaluated(), tmp_path / "whole")
    assert files_of(tmp_path / "journal 0") == files_of(tmp_path / "journal 1") == expected
    again = files(evaluated(journal=tmp_path / "journal"), tmp_path / "again")
    assert again == expected, "one process reads the journal of two"
    found = [json.loads((tmp_path / f"certified {rank}").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0][:2] == [certified(), certified(target_radius=0.1)]


def files_of(folder):
    return [(folder / name).read_bytes() for name in ("report.json", "arrays.npz")]


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_rerun_goes_on(tmp_path):
    answer = torchrun(dying, tmp_path, DIE=str(tmp_path / "died"))
    assert answer.returncode != 0 and "SIGKILL" in answer.stderr
    assert time.time() - float((tmp_path / "died").read_text()) < 15
    kept = set((tmp_path / "journal").glob("*.npz"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(kept) > 2
    answer = torchrun(dying, tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == before, "nothing was done twice"
    one = files(evaluated(attacks={"slow": slow}, eps=0.3, chunk_size=2), tmp_path / "one")
    assert not list((tmp_path / "journal").glob("*.partial"))
    assert files_of(tmp_path / "resumed 0") == files_of(tmp_path / "resumed 1") == one


@pytest.mark.slow
def test_one_process_of_a_fabric_is_one_process(tmp_path):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    assert files(evaluated(fabric), tmp_path / "fabric") == files(evaluated(), tmp_path / "plain")
    assert certified(fabric) == certified()


@pytest.mark.parametrize("call", [evaluated, certified])
def test_what_is_no_fabric_is_refused(call):
    with pytest.raises(TypeError, match=r"expected fabric as a lightning_fabric.Fabric, got str"):
        call("ddp")


def test_a_fabric_that_was_not_launched_is_refused():
    from lightning_fabric import Fabric

    with pytest.raises(ValueError, match=r"has not been launched; call fabric.launch\(\) first"):
        evaluated(Fabric(accelerator="cpu", devices=2, strategy="ddp"))
