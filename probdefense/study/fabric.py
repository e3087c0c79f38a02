"""The processes of a command: one, or those that torchrun or srun has started."""

import os
from typing import Any

import torch

from probdefense.processes import leave_at_exit

DEVICES = ("auto", "cpu", "cuda")


def device_of(name: str) -> torch.device:
    """The device of this process by the name that a command knows: ``auto`` is a GPU where there is one.

    Raises:
        ValueError: no such device, or none here.

    Examples:
        >>> device_of("cpu")
        device(type='cpu')
    """
    kind = name.partition(":")[0]
    if kind not in DEVICES or (name != kind and not name.partition(":")[2].isdecimal()):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {name}; name one of these")
    count = torch.cuda.device_count()
    if kind == "auto":
        name = "cuda" if count else "cpu"
    elif kind == "cuda" and int(name.partition(":")[2] or 0) >= count:
        raise ValueError(
            f"expected one of the {count} GPUs that torch sees here, got {name}; cpu is always there"
        )
    return torch.device(name)


def launched(device: torch.device) -> Any:
    """The Fabric of this process where torchrun or srun has started several, else None.

    Raises:
        ImportError: Lightning Fabric is not there.
        ValueError: what srun was told does not suffice.
    """
    world, local = processes()
    if world == 1:
        return None
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import SLURMEnvironment
    except ImportError as error:
        raise ImportError(
            f"{world} processes need Lightning Fabric, which does not import ({error}); "
            "pip install probdefense[scale]"
        ) from error
    try:
        plugins = None if "WORLD_SIZE" in os.environ else [SLURMEnvironment(auto_requeue=False)]
        size: dict[str, Any] = {"devices": local, "num_nodes": world // local, "plugins": plugins}
        fabric = Fabric(accelerator=device.type, strategy="ddp", **size)
    except RuntimeError as error:  # Fabric names the option of srun that it misses
        raise ValueError(" ".join(str(error).split())) from error
    fabric.launch()
    leave_at_exit()
    return fabric


def processes() -> tuple[int, int]:
    """How many processes do this job, and how many of them on this node.

    What a batch script of SLURM runs without srun is one process, so the variables of the step count, not
    those of the job.
    """
    known = os.environ
    if "WORLD_SIZE" in known:
        world = int(known["WORLD_SIZE"])
        return world, int(known.get("LOCAL_WORLD_SIZE", world))
    world = int(known.get("SLURM_STEP_NUM_TASKS", 1))
    return world, max(1, world // int(known.get("SLURM_STEP_NUM_NODES", 1)))
