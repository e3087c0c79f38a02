"""Jobs of several processes on this machine, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def launched():
    """The Fabric of this process, on the CPU."""
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    return fabric


def torchrun(job, out, processes=2, **environment):
    """Runs ``job(out)``, a function of a test file, in several processes."""
    script = out / f"{job.__name__}.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nfrom {job.__module__} import {job.__name__}\n\n"
        f"{job.__name__}(Path(sys.argv[1]))\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, *command, str(script), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
    )
