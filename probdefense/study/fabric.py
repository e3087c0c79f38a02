"""The processes of a command: one, or those that torchrun has started."""

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
    """The Fabric of this process where ``WORLD_SIZE`` says that there are several, else None.

    Raises:
        ImportError: Lightning Fabric is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return None
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ImportError(
            f"{world} processes need Lightning Fabric, which does not import ({error}); "
            "pip install probdefense[scale]"
        ) from error
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    fabric = Fabric(accelerator=device.type, devices=local, num_nodes=world // local, strategy="ddp")
    fabric.launch()
    leave_at_exit()
    return fabric
