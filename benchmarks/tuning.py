"""The learning rate of every recipe, by one sweep with one budget, on a part of the training set.

    OMP_NUM_THREADS=1 python benchmarks/tuning.py [--out FOLDER] [name,name]

Every recipe that trains is trained with every rate on four fifths of the training digits, as the command
trains it but for fewer epochs, and judged on the last fifth: the mean of its clean accuracy and of its
accuracy under the suite. The rate with the best mean is the one in the table of recipes; test images are
never seen. Writes ``tuning.json`` and ``tuning.md``.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import probdefense as pd
from probdefense.study.recipes import BATCH, DECAY, INNER_STEPS, RECIPES, WARM_UP, Workshop

RATES = (4e-3, 8e-3, 16e-3, 32e-3)
EPOCHS, HELD_OUT, BUDGET, DRAWS, SEED = 24, 287, 1000, 20, 0


def held_out(data: pd.data.Split) -> pd.data.Split:
    """The training set without its last examples, and those to judge on; its order is random already."""
    parts = zip(*((t[:-HELD_OUT], t[-HELD_OUT:]) for t in data.train.tensors), strict=True)
    return pd.data.Split(*(TensorDataset(*part) for part in parts))


def tried(shop: Workshop, name: str) -> dict[str, float]:
    """What one recipe keeps with one rate."""
    start = time.process_time()
    defense = shop.make(name)
    trained = time.process_time() - start
    report = pd.evaluate(
        defense,
        shop.data.test,
        {"suite": partial(pd.attacks.suite, budget=BUDGET)},
        eps=shop.eps,
        rules=(pd.rules.mean_prob,),
        num_samples=DRAWS,
        seed=SEED,
    )
    clean, robust = (row["accuracy"] for row in report.rows)
    return {"clean": clean, "suite": robust, "mean": (clean + robust) / 2, "cpu_seconds": trained}


def swept(name: str, data: pd.data.Split, best: dict[str, float]) -> dict[str, dict[str, float]]:
    """One recipe with every rate; what it goes on from is trained with its own best."""
    found = {}
    for rate in RATES:
        shop = Workshop(data, pd.data.SOURCES["digits"].eps, EPOCHS, SEED, {**best, name: rate})
        if (base := RECIPES[name].base) is not None:
            shop.make(base)
        found[f"{rate:g}"] = tried(shop, name)
        print(name, f"{rate:g}", {k: round(v, 3) for k, v in found[f"{rate:g}"].items()}, flush=True)
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Clean accuracy / accuracy under the suite in percent by recipe and rate; the chosen one in bold."""
    lines = [f"| recipe | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---|" + "---|" * len(RATES)]
    for name, row in found.items():
        best = chosen(row)
        cells = [
            f"{100 * cell['clean']:.1f} / {100 * cell['suite']:.1f}"
            if key != best
            else f"**{100 * cell['clean']:.1f} / {100 * cell['suite']:.1f}**"
            for key, cell in row.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chosen(row: dict[str, dict[str, float]]) -> str:
    """The rate with the best mean; of equal ones the lowest."""
    return max(row, key=lambda rate: row[rate]["mean"])


def main() -> None:
    """Sweeps, prints the table, writes both files."""
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    folder = (
        Path(arguments.pop(arguments.index("--out") + 1)) if "--out" in arguments else Path(__file__).parent
    )
    names = [a for a in arguments if a != "--out"]
    trained = [name for name, recipe in RECIPES.items() if recipe.learning_rate is not None]
    data, found = held_out(pd.data.digits()), {}
    best: dict[str, float] = {}
    for name in names[0].split(",") if names else trained:
        found[name] = swept(name, data, best)
        best[name] = float(chosen(found[name]))
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "ema": DECAY, "warm_up": WARM_UP, "inner": INNER_STEPS}
    settings |= {"images": HELD_OUT, "budget": BUDGET, "num_samples": DRAWS, "seed": SEED}
    (folder / "tuning.json").write_text(
        json.dumps({"settings": settings, "best": best, "found": found}, indent=1) + "\n"
    )
    (folder / "tuning.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
