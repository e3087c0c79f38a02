"""From results to the page of the documentation."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pyro
import torch

import probdefense as pd
from benchmarks.measure import REGISTRY

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

TODAY = {
    "svi-cnn": "1.07",
    "svi-tensors": "0.79",
    "svi-mlp": "3.4-3.9 (by hand 2.5)",
    "svi-resnet18": "1.43 (by hand 1.23)",
    "rse-resnet20": "1.34",
    "predict-weights": "2.1-2.3 of the forwards alone",
    "predict-shared": "1.62-1.76",
    "predict-fresh": "2.05-2.38 of the forwards alone",
    "backends": "up to 1.59",
    "eot": "1.16",
    "pgd-4": "1.17-1.26",
    "pgd-32": "1.17-1.26",
    "sequential-draws": "4.3-5.1",
    "sequential-cpu": "1.4",
    "memory-predict": "134 MB per draw",
    "memory-gradient": "12",
    "verdicts": "0.73",
    "syncs-fit": "8 per step",
    "syncs-pgd": "1",
    "syncs-fmn": "about 20",
}
"""Before the work that these targets were set for."""

PEERS = ("foolbox", "pyautoattack", "bayesian_torch", "torch_blue", "torchattacks")

HEAD = """# Benchmarks

Made by `python -m benchmarks`; nothing here is written by hand. Variants of a row take turns, and the ratio
is the median over rounds of the ratio within a round, by CPU time of one thread on a CPU and by wall time on
a GPU: absolute times of a shared machine are noise. Brackets hold quartiles, and for a difference of
accuracies its 95 % interval. *Before* was measured when the targets were set, on another machine; *by hand*
is the same work written with torch alone. Other libraries are measured where they are installed (`pip install
foolbox pyautoattack torchattacks bayesian-torch torch-blue`).

"""


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found = {"hardware": f"{name}, {os.cpu_count()} cores, 1 thread", "python": platform.python_version()}
    found |= {"torch": torch.__version__, "pyro": pyro.__version__, "probdefense": pd.__version__}
    return found | {"peers": ", ".join(_version(peer) for peer in PEERS)}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} (not installed)"


def keep(results: dict[str, Any], device: torch.device) -> None:
    """Adds results to those of the device, and writes the page anew."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{device.type}.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    rows = known["rows"] | results
    found = {
        "machine": machine(device),
        "commit": _commit(),
        "rows": {n: rows[n] for n in REGISTRY if n in rows},
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(HEAD + "\n".join(_section(each) for each in sorted(RESULTS.glob("*.json"))))


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip()


def _section(path: Path) -> str:
    found = json.loads(path.read_text())
    lines = [f"## {path.stem.upper()}", "", "; ".join(f"{k}: {v}" for k, v in found["machine"].items()), ""]
    groups: dict[str, list[str]] = {}
    for name, row in found["rows"].items():
        groups.setdefault(row["group"], []).append(name)
    for group, names in groups.items():
        lines += [
            f"### {group.capitalize()}",
            "",
            "| what | before | measured | target | |",
            "|---|---|---|---|---|",
        ]
        lines += [_line(name, found["rows"][name]) for name in names] + [""]
    return "\n".join(lines) + _details(found["rows"])


def _line(name: str, row: dict[str, Any]) -> str:
    value, target = row["value"], row["target"]
    spread = row.get("interval") or row.get("ratios", {}).get("ours", [])[0::2]
    shown, *ends = (f"{number:.{3 if 'interval' in row else 2}f}" for number in (value, *spread))
    shown += f" [{', '.join(ends)}]" if ends else ""
    wanted = "" if target is None else f"{'at least' if row['least'] else 'at most'} {target:g}"
    cells = (row["title"], TODAY.get(name, ""), shown, wanted, _verdict(value, target, row["least"]))
    return f"| {' | '.join(cells)} |"


def _verdict(value: float, target: float | None, least: bool) -> str:
    if target is None:
        return ""
    if (value >= target) if least else (value <= target):
        return "met"
    return f"missed by {abs(value - target):.2f}"


def _details(rows: dict[str, Any]) -> str:
    """The other variants, and what a number is made of."""
    lines = ["", "### Details", ""]
    for row in rows.values():
        missed = _verdict(row["value"], row["target"], row["least"]).startswith("missed")
        parts = [row["why"]] if missed and row.get("why") else []
        parts += [f"{n} {q[1]:.2f}x" for n, q in row.get("ratios", {}).items() if n != "ours"]
        parts += [f"{n}: {v}" for n, v in row.get("about", {}).items() if n != "quartiles"]
        floor = row.get("milliseconds", {}).get("floor")
        parts += (
            [f"floor {floor['cpu'][1]:.2f} ms of CPU, {floor['wall'][1]:.2f} ms of wall time"]
            if floor
            else []
        )
        lines += [f"* **{row['title']}**: {'; '.join(parts)}"] if parts else []
    return "\n".join(lines) + "\n"
