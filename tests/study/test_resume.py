"""Jobs that end early: what is finished stays, a rerun goes on, and the bytes are those of one run."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import probdefense as pd
from probdefense.study import job, opponents, store, workshop
from tests.study.test_job import little, little_request, small, study_request  # noqa: F401


class Ended(Exception):
    """The job ended early."""


def ending_at(number):
    """Ends a job when its defense of that number begins."""

    def say(line):
        if line.startswith(f"[{number}/"):
            raise Ended

    return say


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(study_request, "QUICK", small(gradients=8, images=12, votes=20))
    names = ("none", "rse", "madry", "jump_relu")
    return job.prepare(little_request(defenses=names, attacks=("pgd",)))[0]


def trainings(monkeypatch):
    """A list that grows by every training."""
    done, fit = [], workshop.fit
    monkeypatch.setattr(workshop, "fit", lambda *a, **k: done.append(1) or fit(*a, **k))
    return done


@pytest.mark.slow
def test_a_job_that_ended_early_goes_on_to_the_same_bytes(asked, little, tmp_path, monkeypatch):  # noqa: F811
    whole = job.run(asked, little)
    assert asked.families[0] == ("madry", "jump_relu")  # which come last in the request, and first in time
    with pytest.raises(Ended):
        job.run(asked, little, ending_at(2), folder=tmp_path)
    partial = json.loads((tmp_path / "report.json").read_text())
    assert {row["defense"] for row in partial["rows"]} == {"none", "madry", "jump_relu"}
    assert {path.name for path in (tmp_path / "defenses").iterdir()} == {"none", "madry", "jump_relu"}
    done = trainings(monkeypatch)
    again = job.run(asked, little, folder=tmp_path, resume=True)
    assert len(done) == 1
    for result, folder in ((whole, "a"), (again, "b")):
        job.write(result, tmp_path / folder)
    for name in ("report.json", "arrays.npz", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for name in asked.defenses:
        a, b = (each.made[name].state_dict() for each in (whole, again))
        assert all(torch.equal(a[key], b[key]) for key in a if isinstance(a[key], torch.Tensor))
        assert [*map(str, whole.checks[name])] == [*map(str, again.checks[name])]
    assert torch.equal(whole.certificates["rse"].radius, again.certificates["rse"].radius)


def test_what_is_kept_can_be_loaded_and_reported(asked, little, tmp_path):  # noqa: F811
    request = job.prepare(little_request(defenses=("rse", "none"), attacks=("clean",)))[0]
    result = job.run(request, little, folder=tmp_path)
    place = tmp_path / "defenses" / "rse"
    loaded = pd.load(place / store.DEFENSE, net=pd.models.small_cnn())
    assert loaded.notes["accuracy"] == result.report.rows[0]["accuracy"]
    assert pd.Report.load(place).rows == result.report.only("rse").rows


def test_another_study_and_damaged_files_are_refused(asked, little, tmp_path):  # noqa: F811
    request = job.prepare(little_request(defenses=("none", "fast"), attacks=("clean",)))[0]
    job.run(request, little, folder=tmp_path)
    other = job.prepare(little_request(defenses=("none",), attacks=("clean",), eps=0.1))[0]
    with pytest.raises(ValueError, match=r"expected --resume of the same study.*eps was 0.2 and is 0.1"):
        job.run(other, little, folder=tmp_path, resume=True)
    job.run(other, little, folder=tmp_path)  # anew
    for name in ("study.json", "checks.json", "report.json"):
        path = tmp_path / "defenses" / "fast" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="damaged"):
            job.run(request, little, folder=tmp_path, resume=True)
        path.write_bytes(content)


def test_a_full_disk_costs_no_numbers(asked, little, tmp_path, monkeypatch):  # noqa: F811
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probdefense.study.trial.keep", full)
    said = []
    request = job.prepare(little_request(defenses=("none", "fast"), attacks=("clean",)))[0]
    assert job.run(request, little, said.append, folder=tmp_path).report.defenses == ["none", "fast"]
    assert any("none is not kept: No space left on device" in line for line in said)


@pytest.mark.slow
def test_several_seeds_are_replicates(little, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(study_request, "QUICK", small(gradients=8, images=24, votes=20))
    asked = {"defenses": ("none", "fast"), "attacks": ("clean",)}
    request, _ = job.prepare(little_request(**asked, seeds=(0, 1, 2)))
    result = job.run(request, little, folder=tmp_path)
    for row in result.report.rows:
        place = {name: row[name] for name in ("defense", "attack", "eps", "rule")}
        kept = [pd.Report.load(tmp_path / f"seed-{s}" / "defenses" / row["defense"]) for s in (0, 1, 2)]
        each = [report.row(**place)["accuracy"] for report in kept]
        assert row["accuracy"] == pytest.approx(np.mean(each)) and row["num_seeds"] == 3
        assert row["seed_spread"] == pytest.approx(np.std(each, ddof=1))
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert result.comparison.num_seeds == 3 and "trained anew" in result.comparison.scope
    assert result.report.settings["seed"] == [0, 1, 2]
    alone = job.run(job.prepare(little_request(**{**asked, "defenses": ("fast",)}, seed=1))[0], little)
    assert pd.Report.load(tmp_path / "seed-1" / "defenses" / "fast").rows == alone.report.rows


SETUP = (
    "import sys\n"
    "from probdefense.study import cli, request\n"
    "request.QUICK.update(epochs=2, gradients=16, images=40, adaptive_images=6, checked=12, check_gradients=16, "
    "votes=20)\n"
    "if __name__ == '__main__':\n    cli.main()\n"
)


def compare(folder, *options):
    """The command, with a small budget, in a process of its own."""
    script = folder / "command.py"
    script.write_text(SETUP)
    defenses = ["--defenses", "none,rse,fast", "--attacks", "clean", "--num-samples", "4", "--quick"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "compare", *defenses, *options]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path):
    start = time.monotonic()
    with compare(tmp_path, "--out", str(tmp_path / "whole")) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    seconds, moments = time.monotonic() - start, random.Random(0)
    out = ["--out", str(tmp_path / "killed"), "--resume"]
    for _ in range(2):
        with compare(tmp_path, *out) as process:
            time.sleep(moments.uniform(0.5, 1.0) * seconds)
            process.send_signal(signal.SIGKILL)
    with compare(tmp_path, *out) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for name in ("report.json", "arrays.npz", "study.toml"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_torchrun_trains_together_and_evaluates_to_the_bytes_of_one_process(tmp_path):
    script, out = tmp_path / "command.py", tmp_path / "out"
    script.write_text(SETUP)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    options = ["compare", "--defenses", "none,rse", "--attacks", "pgd", "--num-samples", "4", "--quick"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *options, "--out", str(out)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 8 and done.stderr.count("[1/2] none") == 1
    shared = pd.Report.load(out).only("rse")
    loaded = pd.load(out / "defenses" / "rse" / store.DEFENSE, net=pd.models.small_cnn())
    x, y = (part[:40] for part in pd.data.digits().test.tensors)
    attacks = {name: opponents.own_attack(name, {}, loaded, 16, math.inf) for name in ("pgd", "suite")}
    alone = pd.evaluate(loaded, (x, y), attacks, eps=0.2, num_samples=4, name="rse")
    assert alone.rows == shared.rows
