"""Where the command finds the processes that do its job."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.study.fabric import launched, processes
from tests.study.test_cli import run

NAMES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (1, 1)),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (8, 4)),
        ({"WORLD_SIZE": "2"}, (2, 2)),
        ({"SLURM_STEP_NUM_TASKS": "64", "SLURM_STEP_NUM_NODES": "8", "SLURM_NTASKS": "64"}, (64, 8)),
        ({"SLURM_NTASKS": "64"}, (1, 1)),  # a batch script without srun
        ({"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "8"}, (64, 8)),
    ],
)
def test_processes_are_those_of_torchrun_or_of_the_step_of_srun(told, expected, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert processes() == expected


def step(rank, port, arguments, **more):
    """A task of a step of two, as srun starts it."""
    known = {"JOB_ID": "7", "STEP_ID": "0", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "1", "NTASKS": "2"}
    known |= {"PROCID": str(rank), "LOCALID": str(rank), "NODEID": "0", "NNODES": "1", **more}
    slurm = {f"SLURM_{name}": value for name, value in known.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "probdefense", *arguments],
        env={
            **os.environ,
            **slurm,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.mark.slow
def test_tasks_of_srun_do_one_job_together(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    pd.save(pd.deterministic(net), tmp_path / "net.safetensors")
    asked = [
        "evaluate",
        str(tmp_path / "net.safetensors"),
        "--images",
        "8",
        "--chunk-size",
        "4",
        "--device",
        "cpu",
    ]
    asked += ["--attacks", "fgsm", "--num-samples", "2", "--out"]
    port = free_port()
    tasks = [step(rank, port, [*asked, str(tmp_path / "two")], NTASKS_PER_NODE="2") for rank in range(2)]
    told = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert run(monkeypatch, *asked, str(tmp_path / "one")) == 0
    both = [(tmp_path / name / "report.json").read_bytes() for name in ("one", "two")]
    assert both[0] == both[1]


def test_a_step_without_tasks_per_node_is_refused(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"STEP_NUM_TASKS": "2", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(ValueError, match="--ntasks-per-node"):
        launched(torch.device("cpu"))
