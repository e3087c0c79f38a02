"""Taking times and memory: variants take turns, and only ratios within one round mean something."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Variants = Mapping[str, Callable[[], object]]
"""What is run, by name; ``ours`` and ``floor`` make the ratio."""

REGISTRY: dict[str, "Benchmark"] = {}
"""Every benchmark, in the order of the page."""


class Benchmark(NamedTuple):
    """One row: what is measured, the ratio it should have, and how.

    ``make(device)`` gives variants to time, or numbers that were measured already, of which ``value`` is
    compared with the target; a target is an upper bound, or with ``least`` a lower one. ``why`` says what
    stands in the way of a target, and is shown where that is missed.
    """

    name: str
    title: str
    target: float | None
    make: Callable[[torch.device], Any]
    rounds: int = 15
    least: bool = False
    group: str = "targets"
    why: str = ""


def benchmark(name: str, title: str, target: float | None = None, **settings: Any) -> Callable[[Any], Any]:
    """Registers a function that makes the variants of a benchmark."""

    def register(make: Callable[[torch.device], Any]) -> Callable[[torch.device], Any]:
        REGISTRY[name] = Benchmark(name, title, target, make, **settings)
        return make

    return register


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def timed(variants: Variants, rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds of every variant in every round, after one round to warm up."""
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            for clock, seconds in spent.items() if number else ():
                found[name][clock].append(seconds)
    return found


def ratio(times: dict[str, dict[str, list[float]]], of: str, to: str, clock: str) -> list[float]:
    """Quartiles over rounds of the ratio of two variants."""
    return quartiles([a / b for a, b in zip(times[of][clock], times[to][clock], strict=True)])


def run(one: Benchmark, device: torch.device, quick: bool = False) -> dict[str, Any]:
    """The result of a benchmark as plain data."""
    torch.manual_seed(0)
    made = one.make(device)
    result: dict[str, Any] = {"title": one.title, "target": one.target, "group": one.group}
    result |= {"least": one.least, "device": str(device), "why": one.why}
    if "value" in made:
        return result | made
    times = timed(made, 2 if quick else one.rounds, device)
    clock = "wall" if device.type == "cuda" else "cpu"
    result["milliseconds"] = {
        name: {which: [1e3 * q for q in quartiles(values)] for which, values in spent.items()}
        for name, spent in times.items()
    }
    if "floor" in times:
        result["ratios"] = {name: ratio(times, name, "floor", clock) for name in times if name != "floor"}
        result["value"] = result["ratios"]["ours"][1]
        result["about"] = {"quartiles": [round(q, 3) for q in (result["ratios"]["ours"][0::2])]}
    return result


def peak(code: str) -> float:
    """Peak memory in MB of a process that runs some code, by what Linux keeps of its own address space.

    ``getrusage`` would count what the process that started it had, too.
    """
    read = "open('/proc/self/status').read().split('VmHWM:')[1].split()[0]"
    code = f"import torch; torch.set_num_threads(1)\n{code}\nprint(int({read}) / 1024)"
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
