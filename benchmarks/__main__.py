"""The command: ``python -m benchmarks [--only NAME] [--device DEVICE] [--quick] [--list]``.

Writes ``benchmarks/results/DEVICE.json`` and ``docs/benchmarks.md``; with ``--only`` the other rows stay.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import attacks, evaluation, layers, memory, prediction, training  # noqa: F401
from benchmarks.measure import REGISTRY, run
from benchmarks.page import keep


def main() -> None:
    """Runs what was asked for, and writes after every row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a row, or the beginning of its name")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--list", action="store_true", help="the names")
    asked = parser.parse_args()
    wanted = tuple(asked.only or [""])
    chosen = [one for name, one in REGISTRY.items() if name.startswith(wanted)]
    if asked.list or not chosen:
        parser.exit(0 if asked.list else 2, "\n".join(REGISTRY) + "\n")
    torch.set_num_threads(1)
    for one in chosen:
        start = time.perf_counter()
        result = run(one, asked.device, asked.quick)
        keep({one.name: result}, asked.device)
        seconds = time.perf_counter() - start
        print(f"{one.name:18s} {result['value']:8.3f}  target {one.target}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
